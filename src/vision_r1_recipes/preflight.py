"""All that can be known to be wrong before a GPU is touched."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_flash_attn_2_available
from trl import ModelConfig

from . import checkpoints
from .configs import GRPO_DERIVED, DataArguments, VisionGRPOConfig, VisionSFTConfig, derived_problem
from .data import check_source
from .ptst import Stage, parse_stages
from .recipe import RecipeError, load, parse_all


# Values that TRL 1.16 knows; it looks at them only once training runs.
CHOICES = {
    "loss_type": ("grpo", "dapo", "bnpo", "dr_grpo", "cispo", "luspo", "sapo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
INF = float("inf")
RANGES = (("learning_rate", 0, INF), ("temperature", 0, INF), ("top_p", 0, 1), ("repetition_penalty", 0, INF))
# Real configurations of the models that the recipes name, so that plans and tests need no hub.
KNOWN_MODELS = Path(__file__).parents[2] / "data" / "models"


def check(problems: Sequence[str]) -> None:
    """Raise [`RecipeError`] with the whole list, if there is one."""
    if problems:
        raise RecipeError("\n".join(problems))


def read(argv: Sequence[str], config_class: type) -> tuple:
    """
    Parse the command line of `sft.py` or `grpo.py` and check everything that needs neither data nor weights.

    Returns:
        `(recipe, data, args, model)`: the resolved recipe, [`DataArguments`], `config_class`, `ModelConfig`.

    Raises:
        `RecipeError`: the list of all problems.
    """
    values, instances, problems = parse_all(argv, (DataArguments, config_class, ModelConfig))
    if instances is not None:
        problems += recipe_problems(values, *instances) + run_problems(values, instances[1])
    check(list(dict.fromkeys(problems)))
    return values, *instances


def recipe_problems(
    values: dict, data: DataArguments, args: VisionSFTConfig | VisionGRPOConfig, model: ModelConfig
) -> list[str]:
    """Everything wrong with a recipe that [`recipe.parse_all`] has not found."""
    find = grpo_problems if isinstance(args, VisionGRPOConfig) else sft_problems
    return find(values, data, args, model)


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
            try:
                return AutoConfig.from_pretrained(folder)
            except (OSError, ValueError) as error:
                raise RecipeError(f"{folder / 'config.json'} can't be read: {error}") from error
    return None


def model_init_kwargs(model: ModelConfig, args: VisionSFTConfig | VisionGRPOConfig) -> dict[str, Any]:
    """How TRL is to load the weights: the recipe's model keys, with its `model_init_kwargs` over them."""
    chosen = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype}
    return {**chosen, **(args.model_init_kwargs or {})}


def run_problems(values: dict, args: VisionSFTConfig | VisionGRPOConfig) -> list[str]:
    """What is wrong on this machine, now."""
    problems = []
    folder = Path(args.output_dir)
    try:
        checkpoint, skipped = checkpoints.wanted(args.resume_from_checkpoint, folder)
    except RecipeError as error:
        return [str(error)]
    if checkpoint is None and (left := [path for path in checkpoints.saved(folder) if path not in skipped]):
        problems.append(
            f"`output_dir`: {folder} already holds checkpoints, {left[-1].name} the last. Go on with "
            "`--resume_from_checkpoint auto`, or name another output_dir."
        )
    resuming = checkpoints.newest_is_wanted(args.resume_from_checkpoint)
    if resuming and checkpoints.finished(folder, args.max_steps) and (folder / "recipe.yaml").is_file():
        before, now = (checkpoints.identity(recipe) for recipe in (load(folder / "recipe.yaml"), values))
        if (found := checkpoints.changes(before, now)) and not args.force_resume:
            problems += [f"`output_dir`: {folder} holds another run, finished: name another output_dir.", *found]
    used = checkpoints.saved(folder) or (folder / "trainer_state.json").is_file()
    if used and checkpoint is not None and checkpoint.parent.resolve() != folder.resolve():
        problems.append(f"`output_dir`: {folder} holds a run already, and {checkpoint} is of another: name a new one.")
    if checkpoint is not None:
        now = checkpoints.identity(values, num_processes=args._num_processes())
        problems += refuse_changes(checkpoint, now, args.force_resume)
        if last := getattr(args, "stop_after_rollouts", None):
            done = checkpoints.rollouts_done(checkpoint)
            if done >= last:
                problems.append(f"`stop_after_rollouts`: {last}, but {checkpoint} is at rollout {done} already.")
    if values.get("use_vllm") and find_spec("vllm") is None:
        problems.append(
            "`use_vllm`: true, but vLLM is not installed here: pip install -e '.[vllm]', or set it to false."
        )
    attention = values.get("attn_implementation")
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        problems.append(
            "`attn_implementation`: flash_attention_2, but flash-attn is not installed here, or sees no GPU: pip "
            "install flash-attn --no-build-isolation, or set it to sdpa."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and args.use_cpu:
        problems.append("FSDP on a CPU would silently be plain DDP: use recipes/accelerate/ddp.yaml.")
    return problems


def refuse_changes(checkpoint: Path, now: dict[str, Any], forced: bool) -> list[str]:
    """What differs between the run that wrote `checkpoint` and the one that would go on from it."""
    found = checkpoints.changes(checkpoints.read(checkpoint)["identity"], now)
    if not found or forced:
        return []
    return [
        f"{checkpoint} is of another run than this one would be. Take the old values, start afresh in another "
        "output_dir, or set `force_resume: true`.",
        *found,
    ]


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
    if args.push_to_hub and args.hub_strategy != "end":
        problems.append(
            f"`hub_strategy`: {getattr(args.hub_strategy, 'value', args.hub_strategy)} would push unfinished models. "
            "Set it to end."
        )
    for key, low, high in RANGES:
        value = getattr(args, key, None)
        if isinstance(value, (int, float)) and not low < value <= high:
            problems.append(
                f"`{key}`: {value:g} must be over {low:g}" + (f" and at most {high:g}." if high < INF else ".")
            )
    for key in ("beta", "entropy_coef", "weight_decay"):
        if (getattr(args, key, None) or 0) < 0:
            problems.append(f"`{key}`: {getattr(args, key):g} must not be negative.")
    trackers = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for tracker in set(trackers) - {"all", "none"} - INTEGRATION_TO_CALLBACK.keys():
        problems.append(f"`report_to`: {tracker!r} is not one of none, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}.")
    if args.remove_unused_columns and "remove_unused_columns" in values:
        problems.append("`remove_unused_columns`: true would take the pictures and answers away. Remove it.")
    return problems


def _derived_problems(values: dict, names: Sequence[str], because: str) -> list[str]:
    # The config refuses other values than the default, but can't know whether the default was asked for.
    return [derived_problem(key, values[key], because) for key in names if key in values]


def sft_problems(values: dict, data: DataArguments, args: VisionSFTConfig, model: ModelConfig) -> list[str]:
    """Everything wrong with an SFT recipe."""
    problems = _common_problems(values, data, args, model)
    if values.get("global_batch_size") is not None:
        problems += _derived_problems(values, ("gradient_accumulation_steps",), "`global_batch_size`")
    if bool(data.eval_datasets) != (str(args.eval_strategy) not in ("no", "IntervalStrategy.NO")):
        problems.append("`eval_datasets` and `eval_strategy` only work together: give both, or neither.")
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
    if args.use_transformers_continuous_batching:
        problems.append(
            "`use_transformers_continuous_batching`: TRL 1.16 hands no pictures to it, the model would be blind. "
            "Remove it, or use vLLM."
        )
    if args.sync_ref_model and args.save_every_rollouts:
        problems.append(
            "`sync_ref_model`: the reference is in no checkpoint, a resumed run would have another. Remove it, or "
            "`save_every_rollouts`."
        )
    if values.get("stages") is None:
        return [*problems, "`stages` is missing: give at least one {max_completion_length, num_generations, steps}."]
    problems += _derived_problems(values, GRPO_DERIVED, "`stages`")
    try:
        stages = parse_stages(values["stages"])
    except (ValueError, TypeError):  # which has been told
        stages = []
    if bool(data.eval_datasets) != bool(args.eval_every_rollouts):
        problems.append("`eval_datasets` and `eval_every_rollouts` only work together: give both, or neither.")
    longest = longest_sequence(data, args, stages)
    limit = _positions(model)
    if longest and limit and longest > limit:
        problems.append(f"longest sequence, {longest} tokens, is over the model's {limit} positions: shorten a cap.")
    if args.use_vllm:
        if data.max_prompt_length is None:
            problems.append("`max_prompt_length` is needed with vLLM: it bounds the longest sequence.")
        elif stages and (args.vllm_max_model_length is None or args.vllm_max_model_length < longest):
            problems.append(
                f"`vllm_max_model_length`: {args.vllm_max_model_length}, the longest sequence needs {longest}."
            )
        config = model_config(model.model_name_or_path)
        text = config.get_text_config() if config else None
        parallel = args.vllm_tensor_parallel_size
        if text and not _splits(text, parallel):
            fits = ", ".join(str(n) for n in range(1, 9) if _splits(text, n))
            problems.append(
                f"`vllm_tensor_parallel_size`: {parallel} doesn't divide {text.num_attention_heads} heads, or suit "
                f"{text.num_key_value_heads} KV heads; {fits} do."
            )
        if args.vllm_mode == "colocate" and args.world_size % parallel:
            problems.append(
                f"`vllm_tensor_parallel_size`: {parallel} doesn't divide the {args.world_size} training processes."
            )
    return problems


def _splits(text: PreTrainedConfig, n: int) -> bool:
    """Whether vLLM can spread the heads over `n` GPUs; KV heads are divided, or each is copied to as many GPUs."""
    kv = text.num_key_value_heads
    return text.num_attention_heads % n == 0 and (kv % n == 0 or n % kv == 0)


def longest_sequence(data: DataArguments, args: VisionGRPOConfig, stages: Sequence[Stage]) -> int | None:
    """Tokens of the longest prompt and completion of any stage or evaluation; `None` when prompts have no bound."""
    if data.max_prompt_length is None:
        return None
    caps = [stage.max_completion_length for stage in stages]
    return data.max_prompt_length + max([*caps, args.eval_max_completion_length or 0])


def _positions(model: ModelConfig) -> int | None:
    config = model_config(model.model_name_or_path)
    return config.get_text_config().max_position_embeddings if config else None
