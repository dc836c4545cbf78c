"""All that can be known to be wrong before a GPU is touched, and `recipe plan`, which prints it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig

from .configs import GRPO_DERIVED, DataArguments, VisionGRPOConfig, VisionSFTConfig
from .data import check_source
from .ptst import batch_arithmetic, num_rollouts, parse_stages
from .recipe import RecipeError, load, merge, parse, parse_overrides


# Values that TRL 1.16 knows; it looks at them only once training runs.
CHOICES = {
    "loss_type": ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "luspo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
# Real configurations of the models that the recipes name, so that plans and tests need no hub.
KNOWN_MODELS = Path(__file__).parents[2] / "data" / "models"


def check(problems: Sequence[str]) -> None:
    """Raise [`RecipeError`] with the whole list, if there is one."""
    if problems:
        raise RecipeError("\n".join(problems))


@contextlib.contextmanager
def kind_errors():
    """A [`RecipeError`] ends the process with its message, once and without a traceback, and exit code 2."""
    try:
        yield
    except RecipeError as error:
        if os.environ.get("RANK", "0") == "0":
            print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(2)


def model_config(model_name_or_path: str | None) -> PreTrainedConfig | None:
    """The model's configuration from its folder or from the ones kept with the recipes; `None` if neither has it."""
    for folder in (Path(model_name_or_path or ""), KNOWN_MODELS / Path(model_name_or_path or "").name):
        if (folder / "config.json").is_file():
            return AutoConfig.from_pretrained(folder)
    return None


def model_init_kwargs(model: ModelConfig, args: VisionSFTConfig | VisionGRPOConfig) -> dict[str, Any]:
    """How TRL is to load the weights: the recipe's model keys, with its `model_init_kwargs` over them."""
    chosen = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    return {**chosen, **(args.model_init_kwargs or {})}


def checkpoint(args: VisionSFTConfig | VisionGRPOConfig) -> str | None:
    """
    The checkpoint that `resume_from_checkpoint` means: a path, or the newest in `output_dir` for `true` and `auto`.
    `auto` starts afresh when there is none.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() in ("false", "none"):
        return None
    if str(wanted).lower() not in ("true", "auto"):
        if not Path(wanted).is_dir():
            raise RecipeError(f"`resume_from_checkpoint`: {wanted} is not a folder. Give a checkpoint, true or auto.")
        return str(wanted)
    found = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    if found is None and str(wanted).lower() == "true":
        raise RecipeError(f"`resume_from_checkpoint`: true, but {args.output_dir} holds no checkpoint. `auto` starts.")
    return found


def run_problems(args: VisionSFTConfig | VisionGRPOConfig) -> list[str]:
    """What is wrong on this machine, now."""
    problems = []
    folder = Path(args.output_dir)
    if checkpoint(args) is None and folder.is_dir() and get_last_checkpoint(folder):
        problems.append(
            f"`output_dir`: {folder} already holds checkpoints. Go on with `--resume_from_checkpoint auto`, or name "
            "another output_dir."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and args.use_cpu:
        problems.append("FSDP on a CPU would silently be plain DDP: use recipes/accelerate/ddp.yaml.")
    return problems


def _common_problems(values: dict, data: DataArguments, args, model: ModelConfig) -> list[str]:
    problems = []
    if not model.model_name_or_path:
        problems.append("`model_name_or_path` is missing: name a checkpoint's folder or a Hub id.")
    if not data.datasets:
        problems.append("`datasets` is empty: name at least one source, for example [{path: runs/toy/data/rl}].")
    if args.save_only_model:
        problems.append(
            "`save_only_model`: true leaves the optimizer out of the checkpoints: no run could be resumed. Remove it."
        )
    for key, sources in (("datasets", data.datasets), ("eval_datasets", data.eval_datasets)):
        for i, source in enumerate(sources or []):
            try:
                check_source(source, f"{key}[{i}]")
            except RecipeError as error:
                problems.append(str(error))
    if not 0 <= data.max_dropped_share <= 1:
        problems.append(f"`max_dropped_share`: {data.max_dropped_share} is a share: from 0 to 1.")
    if data.min_pixels and data.max_pixels and data.min_pixels > data.max_pixels:
        problems.append(f"`min_pixels` {data.min_pixels} is over `max_pixels` {data.max_pixels}.")
    if args.remove_unused_columns and "remove_unused_columns" in values:
        problems.append("`remove_unused_columns`: true would take the pictures and answers away. Remove it.")
    return problems


def _derived_problems(values: dict, names: Sequence[str], because: str) -> list[str]:
    # The config refuses other values than the default, but can't know whether the default was asked for.
    return [
        f"`{key}`: {values[key]!r} can't stand beside {because}: it is derived. Remove it."
        for key in names
        if key in values
    ]


def sft_problems(values: dict, data: DataArguments, args: VisionSFTConfig, model: ModelConfig) -> list[str]:
    """Everything wrong with an SFT recipe."""
    problems = _common_problems(values, data, args, model)
    if args.global_batch_size is not None:
        problems += _derived_problems(values, ("gradient_accumulation_steps",), "`global_batch_size`")
    if args.packing or args.padding_free:
        problems.append("`packing` and `padding_free` are not supported for rows with pictures. Remove them.")
    limit = _positions(model)
    if args.max_length and limit and args.max_length > limit:
        problems.append(f"`max_length` {args.max_length} is over the model's {limit} positions.")
    return problems


def grpo_problems(values: dict, data: DataArguments, args: VisionGRPOConfig, model: ModelConfig) -> list[str]:
    """Everything wrong with a GRPO recipe, batch arithmetic apart (the config has refused that already)."""
    problems = _common_problems(values, data, args, model)
    for key, choices in CHOICES.items():
        if (value := getattr(args, key)) not in choices:
            problems.append(f"`{key}`: {value!r} is not one of {', '.join(choices)}.")
    if args.stages is None:
        return [*problems, "`stages` is missing: give at least one {max_completion_length, num_generations, steps}."]
    problems += _derived_problems(values, GRPO_DERIVED, "`stages`")
    if bool(data.eval_datasets) != bool(args.eval_every_rollouts):
        problems.append("`eval_datasets` and `eval_every_rollouts` only work together: give both, or neither.")
    longest = longest_sequence(data, args)
    limit = _positions(model)
    if longest and limit and longest > limit:
        problems.append(f"longest sequence, {longest} tokens, is over the model's {limit} positions: shorten a stage.")
    if args.use_vllm:
        if longest is None:
            problems.append("`max_prompt_length` is needed with vLLM: it bounds the longest sequence.")
        elif args.vllm_max_model_length is None or args.vllm_max_model_length < longest:
            problems.append(f"`vllm_max_model_length`: {args.vllm_max_model_length}, the last stage needs {longest}.")
        config = model_config(model.model_name_or_path)
        heads = config.get_text_config().num_attention_heads if config else 0
        parallel = args.vllm_tensor_parallel_size
        if heads % parallel:
            fits = ", ".join(str(n) for n in range(1, 9) if heads % n == 0)
            problems.append(f"`vllm_tensor_parallel_size`: {parallel} doesn't divide {heads} heads; {fits} do.")
        if args.vllm_mode == "colocate" and args.world_size % parallel:
            problems.append(
                f"`vllm_tensor_parallel_size`: {parallel} doesn't divide the {args.world_size} training processes."
            )
    return problems


def longest_sequence(data: DataArguments, args: VisionGRPOConfig) -> int | None:
    """Tokens of the longest prompt and completion of any stage; `None` when prompts have no bound."""
    if data.max_prompt_length is None:
        return None
    return data.max_prompt_length + max(stage.max_completion_length for stage in parse_stages(args.stages))


def _positions(model: ModelConfig) -> int | None:
    config = model_config(model.model_name_or_path)
    return config.get_text_config().max_position_embeddings if config else None


def planned(config_class: type, world_size: int) -> type:
    """`config_class` as it would be on `world_size` processes, on a machine that may have neither them nor a GPU."""
    assumed = {"world_size": property(lambda self: world_size), "_num_processes": lambda self: world_size}
    return type(config_class.__name__, (config_class,), assumed)


def plan(argv: Sequence[str], world_size: int) -> tuple[str, list[str]]:
    """
    What `argv` (a recipe and overrides) would do on `world_size` training processes.

    Returns:
        The plan as text, and all problems found.
    """
    recipe = merge(load(argv[0]), parse_overrides(argv[1:]))
    is_grpo = not recipe.keys().isdisjoint(("stages", "prompts_per_rollout"))
    config_class = planned(VisionGRPOConfig if is_grpo else VisionSFTConfig, world_size)
    try:
        values, data, args, model = parse([*argv, "--use_cpu", "true"], (DataArguments, config_class, ModelConfig))
    except RecipeError as error:
        return f"{argv[0]} on {world_size} process(es): can't be run", str(error).splitlines()
    if not is_grpo:
        text = (
            f"{argv[0]} on {world_size} process(es): SFT of {model.model_name_or_path}\n"
            f"rows per update {args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size} = "
            f"{args.per_device_train_batch_size} per micro-batch x {args.gradient_accumulation_steps} micro-steps x "
            f"{world_size} processes; longest row {args.max_length} tokens; {args.num_train_epochs:g} epochs"
        )
        return text, sft_problems(values, data, args, model)
    stages = parse_stages(args.stages)
    numbers, _ = batch_arithmetic(
        stages,
        args.prompts_per_rollout,
        args.prompts_per_update,
        args.per_device_train_batch_size,
        world_size,
        args.num_iterations,
    )
    rows = [
        ("stage", *(str(i + 1) for i in range(len(stages)))),
        ("rollouts", *(str(s.steps) for s in stages)),
        ("optimizer steps", *(str(s.steps * numbers.updates_per_rollout) for s in stages)),
        ("max_completion_length", *(str(s.max_completion_length) for s in stages)),
        ("num_generations", *(str(s.num_generations) for s in stages)),
        ("completions per rollout", *(str(args.prompts_per_rollout * s.num_generations) for s in stages)),
        ("completions per update", *(str(args.prompts_per_update * s.num_generations) for s in stages)),
        ("rows per micro-batch", *(str(n) for n in numbers.rows_per_micro_batch)),
        (
            "completion tokens per micro-batch, at most",
            *(f"{n * s.max_completion_length:,}" for n, s in zip(numbers.rows_per_micro_batch, stages, strict=True)),
        ),
        (
            "completion tokens in all, at most",
            *(f"{s.steps * args.prompts_per_rollout * s.num_generations * s.max_completion_length:,}" for s in stages),
        ),
    ]
    width = max(len(row[0]) for row in rows)
    columns = [max(len(row[i]) for row in rows) for i in range(1, len(stages) + 1)]
    lines = [
        f"{argv[0]} on {world_size} process(es): GRPO of {model.model_name_or_path}, reward {args.reward}",
        f"{args.prompts_per_rollout} prompts per rollout, {args.prompts_per_update} per update; "
        f"{numbers.micro_steps_per_update} micro-steps per update, "
        f"{numbers.updates_per_rollout} update(s) per rollout; "
        f"{num_rollouts(stages)} rollouts, {args.max_steps} optimizer steps, "
        f"{num_rollouts(stages) * args.prompts_per_rollout:,} prompts",
        "",
        *(
            f"{row[0]:<{width}}  " + "  ".join(f"{v:>{c}}" for v, c in zip(row[1:], columns, strict=True))
            for row in rows
        ),
        "",
        f"longest sequence {longest_sequence(data, args) or 'unbounded (no max_prompt_length)'} tokens",
    ]
    if model_config(model.model_name_or_path) is None:
        lines.append(f"note: {model.model_name_or_path} is not here: its positions and heads were not checked.")
    if args.loss_type == "bnpo" and len(set(numbers.rows_per_micro_batch)) > 1:
        lines.append("warning: loss_type bnpo averages over the micro-batch, whose rows change between the stages.")
    return "\n".join(lines), grpo_problems(values, data, args, model)
