"""`recipe plan`: what a recipe would do on so many processes, and what is wrong with it; no GPU, data or weights."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import load_dataset_builder
from transformers.utils import cached_file
from trl import ModelConfig

from . import memory
from .configs import DataArguments, VisionGRPOConfig, VisionSFTConfig
from .data import image_folder, local_files
from .preflight import longest_sequence, model_config, recipe_problems, run_problems
from .ptst import batch_arithmetic, num_rollouts, parse_stages
from .recipe import RecipeError, load, merge, parse_all, parse_overrides, script


BYTES_PER_PIXEL = 24  # Qwen2.5-VL's `pixel_values`: 3 colours x 2 frames x 4 bytes
BYTES_PER_PARAMETER = 14  # of a checkpoint: weights in bf16, master weights and AdamW's two moments in fp32


def planned(config_class: type, world_size: int) -> type:
    """`config_class` as it would be on `world_size` processes, on a machine that may have neither them nor a GPU."""
    assumed = {"world_size": property(lambda self: world_size), "_num_processes": lambda self: world_size}
    return type(config_class.__name__, (config_class,), assumed)


def plan(
    argv: Sequence[str],
    world_size: int = 1,
    gpus: int | None = None,
    seconds_per_rollout: float | None = None,
    zero_stage: int = 3,
    gpu_memory: float = 80,
    here: bool = False,
) -> tuple[str, list[str]]:
    """
    What `argv` (a recipe and overrides) would do.

    Args:
        world_size (`int`, *optional*, defaults to `1`):
            Training processes.
        gpus (`int`, *optional*):
            All GPUs instead: those of the training processes and, with `vllm_mode: server`, of the server.
        seconds_per_rollout (`float`, *optional*):
            Measured time of a rollout with its updates, for the GPU-hours.
        zero_stage (`int`, *optional*, defaults to `3`), gpu_memory (`float`, *optional*, defaults to `80`):
            DeepSpeed's stage (0: none) and the GB of a GPU, for the estimate of the memory.
        here (`bool`, *optional*, defaults to `False`):
            Whether the run would start on this machine now: what is installed and what `output_dir` holds count too.

    Returns:
        The plan as text, and all problems found.
    """
    recipe = merge(load(argv[0]), parse_overrides(argv[1:]))
    serving = 0
    if gpus is not None:
        if recipe.get("use_vllm") and recipe.get("vllm_mode") == "server":
            serving = recipe.get("vllm_tensor_parallel_size", 1)
        world_size = gpus - serving
        if world_size < 1:
            return f"{argv[0]}: can't be run", [f"--gpus: {gpus}, and the vLLM server alone takes {serving}."]
    config_class = VisionGRPOConfig if script(recipe) == "grpo.py" else VisionSFTConfig
    origin = start_model(argv[0], recipe.get("model_name_or_path"))
    argv = [*argv, "--model_name_or_path", origin] if origin else argv
    values, instances, problems = _check(argv, config_class, world_size)
    if here and origin:
        problems.append(f"`model_name_or_path`: {recipe['model_name_or_path']} is not here yet: train it first.")
    if here and instances is not None:
        problems += run_problems({**values, "use_cpu": recipe.get("use_cpu", False)}, instances[1])
    if here and not problems:
        problems += _absent(values)
    if problems and serving:
        fits = [n for n in range(1, 2 * gpus) if not _check(argv, config_class, n)[2]]
        near = sorted(sorted(fits, key=lambda n: abs(n - world_size))[:3])
        splits = ", ".join(f"{n} + {serving} = {n + serving}" for n in near) or "none"
        problems.append(f"--gpus: splits into training and server near {world_size} + {serving} that work: {splits}.")
    title = f"{argv[0]} on {world_size} process(es)" + (f" and {serving} GPU(s) of a vLLM server" if serving else "")
    if instances is None or getattr(instances[1], "stages", instances[1]) is None:
        return f"{title}: can't be run", problems
    data, args, model = instances
    name = recipe.get("model_name_or_path")
    about = partial(_about_the_model, name, model, args, world_size, zero_stage, gpu_memory)
    describe = _grpo if config_class is VisionGRPOConfig else _sft
    lines = describe(data, args, name, world_size, about)
    if seconds_per_rollout and config_class is VisionGRPOConfig:
        hours = seconds_per_rollout * num_rollouts(parse_stages(instances[1].stages)) / 3600
        lines.append(
            f"at {seconds_per_rollout:g} s a rollout: {hours:,.1f} h, {hours * (gpus or world_size):,.0f} GPU-h; a "
            f"preempted run keeps the rollout it is in when it is told {seconds_per_rollout:g} s before, and the time "
            "to write a checkpoint"
        )
    return "\n".join([f"{title}: {lines[0]}", *lines[1:]]), problems


def _absent(values: Mapping[str, Any]) -> list[str]:
    """Model and data that are not on this machine and don't come from the Hub."""
    name, revision = values.get("model_name_or_path"), values.get("model_revision")
    needed = [("model_name_or_path", name, partial(cached_file, name, "config.json", revision=revision))]
    for key in ("datasets", "eval_datasets"):
        for i, source in enumerate(values.get(key) or []):
            needed.append((f"{key}[{i}]", source["path"], partial(_look, source, f"`{key}[{i}]`")))
    problems = []
    for key, name, find in needed:
        try:
            if find() is None:
                raise FileNotFoundError("a folder without config.json; was it trained to its end?")
        except RecipeError as error:
            problems.append(str(error))
        except Exception as error:
            said = textwrap.shorten(str(error), 200, placeholder=" ...")
            problems.append(f"`{key}`: {name} can't be found here or on the Hub: {said}")
    return problems


def _look(source: Mapping[str, Any], where: str) -> bool:
    image_folder(source, where)
    if local_files(source):  # which are taken for any split
        return True
    builder = load_dataset_builder(source["path"], source.get("name"), data_files=source.get("data_files"))
    splits = list(map(str, builder.info.splits or builder.config.data_files or ()))
    wanted = [part.partition("[")[0] for part in source.get("split", "train").split("+")]
    if splits and (wrong := [split for split in wanted if split not in (*splits, "all")]):
        raise RecipeError(f"{where}: {source['path']} has no split {', '.join(wrong)}, only {', '.join(splits)}.")
    return True


def start_model(path: str, name: str | None) -> str | None:
    """
    The model at the beginning of the chain that makes `name`, a run's output that is not here yet: its maker is
    looked for among the recipes beside the one at `path` and one folder up. `None` when there is nothing to find.
    """
    if name is None or model_config(name) is not None:
        return None
    folder = Path(path).resolve().parent
    made_from: dict[str, str | None] = {}
    for file in (file for place in (folder, folder.parent) for file in place.glob("*.yaml")):
        try:
            beside = load(file)
        except RecipeError:  # somebody else's
            continue
        made_from.setdefault(str(beside.get("output_dir")), beside.get("model_name_or_path"))
    found, seen = None, set()
    while name in made_from and name not in seen and model_config(name) is None:
        seen.add(name)
        found = name = made_from[name]
    return None if found in seen else found


def _check(argv: Sequence[str], config_class: type, world_size: int) -> tuple[dict, tuple | None, list[str]]:
    types = (DataArguments, planned(config_class, world_size), ModelConfig)
    values, instances, problems = parse_all([*argv, "--use_cpu", "true"], types)
    if instances is not None:
        problems = problems + recipe_problems(values, *instances)
    return values, instances, list(dict.fromkeys(problems))


def _sft(
    data: DataArguments, args: VisionSFTConfig, name: str | None, world_size: int, about: Callable[..., list[str]]
) -> list[str]:
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    return [
        f"SFT of {name}",
        f"rows per update {rows} = {args.per_device_train_batch_size} per micro-batch x "
        f"{args.gradient_accumulation_steps} micro-steps x {world_size} processes; longest row {args.max_length} "
        f"tokens; {args.num_train_epochs:g} epochs",
        *_about_the_data(data, None, None),
        *about([(args.per_device_train_batch_size, 0, args.max_length)] if args.max_length else []),
    ]


def _grpo(
    data: DataArguments, args: VisionGRPOConfig, name: str | None, world_size: int, about: Callable[..., list[str]]
) -> list[str]:
    stages = parse_stages(args.stages)
    numbers, _ = batch_arithmetic(
        stages,
        args.prompts_per_rollout,
        args.prompts_per_update,
        args.per_device_train_batch_size,
        world_size,
        args.num_iterations,
    )
    micro_batches, prompt = numbers.rows_per_micro_batch, data.max_prompt_length

    def tokens(rows: int, cap: int) -> str:
        return f"{rows * (cap + prompt):,}" if prompt else f"{rows * cap:,} + prompts"

    table = [
        ("stage", [i + 1 for i in range(len(stages))]),
        ("rollouts", [s.steps for s in stages]),
        ("optimizer steps", [s.steps * numbers.updates_per_rollout for s in stages]),
        ("max_completion_length", [s.max_completion_length for s in stages]),
        ("num_generations", [s.num_generations for s in stages]),
        ("prompts per rollout", [args.prompts_per_rollout] * len(stages)),
        ("completions per rollout", [args.prompts_per_rollout * s.num_generations for s in stages]),
        ("completions per update", [args.prompts_per_update * s.num_generations for s in stages]),
        ("rows per micro-batch", micro_batches),
        (
            "tokens per micro-batch, at most",
            [tokens(n, s.max_completion_length) for n, s in zip(micro_batches, stages, strict=True)],
        ),
        (
            "completion tokens in all, at most",
            [f"{s.steps * args.prompts_per_rollout * s.num_generations * s.max_completion_length:,}" for s in stages],
        ),
    ]
    text = [(name, list(map(str, values))) for name, values in table]
    width = max(len(name) for name, _ in text)
    columns = [max(len(values[i]) for _, values in text) for i in range(len(stages))]
    longest = longest_sequence(data, args, stages)
    prompts = num_rollouts(stages) * args.prompts_per_rollout
    lines = [
        f"GRPO of {name}, reward {args.reward}",
        f"{args.prompts_per_rollout} prompts per rollout, {args.prompts_per_update} per update; "
        f"{numbers.micro_steps_per_update} micro-steps per update, "
        f"{numbers.updates_per_rollout} update(s) per rollout; "
        f"{num_rollouts(stages)} rollouts, {args.max_steps} optimizer steps, {prompts:,} prompts",
        "",
        *(
            f"{name:<{width}}  " + "  ".join(f"{v:>{c}}" for v, c in zip(values, columns, strict=True))
            for name, values in text
        ),
        "",
        f"longest sequence {longest or 'unbounded (no max_prompt_length)'} tokens"
        + (f", vllm_max_model_length {args.vllm_max_model_length}" if args.use_vllm else ""),
        *_about_the_data(data, prompts, args.prompts_per_rollout // world_size),
        *about(
            [(n, prompt or 0, s.max_completion_length) for n, s in zip(micro_batches, stages, strict=True)], longest
        ),
    ]
    if args.use_vllm and args.vllm_mode == "server":
        lines.append(f"server: {serve_command(name, args)}")
    if args.loss_type == "bnpo" and len(set(micro_batches)) > 1:
        lines.append("warning: loss_type bnpo averages over the micro-batch, whose rows change between the stages.")
    return lines


def serve(argv: Sequence[str]) -> str:
    """The command of the rollout server of `argv` (a recipe with `vllm_mode: server`, and overrides)."""
    values, instances, problems = _check(argv, VisionGRPOConfig, 1)
    if instances is None:
        raise RecipeError("\n".join(problems))
    return serve_command(values["model_name_or_path"], instances[1])


def serve_command(model_name_or_path: str, args: VisionGRPOConfig) -> str:
    """
    The command of the vLLM server that a recipe with `vllm_mode: server` expects. TRL's own launcher adds what its
    client needs (weight transfer, processed log-probabilities, scale-out endpoints).
    """
    return (
        f"trl vllm-serve --model {model_name_or_path} --tensor_parallel_size {args.vllm_tensor_parallel_size} "
        f"--max_model_len {args.vllm_max_model_length} --port {args.vllm_server_port}"
    )


def _about_the_data(data: DataArguments, prompts: int | None, held: int | None) -> list[str]:
    counts = [_num_rows(source) for source in data.datasets]
    rows = None if None in counts else sum(counts)
    known = (
        f"{rows:,} rows before any is dropped" if rows is not None else "rows unknown, not all of it is here or taken"
    )
    passes = f", {prompts / rows:.2f} passes over them" if rows and prompts else ""
    lines = [f"data: {known}{passes}"]
    if held and data.max_pixels:
        pixels = min(data.max_pixels, 28 * 28 * (data.max_prompt_length or data.max_pixels))
        lines.append(
            f"pictures of a rollout in each process' host memory: {held * pixels * BYTES_PER_PIXEL / 1e9:.2f} GB at "
            "most, with one picture a prompt"
        )
    return lines


def _num_rows(source: dict) -> int | None:
    """Rows of a source that lies here, from the files alone; `None` when it doesn't, or only a part is taken."""
    path, split = str(source.get("path")), str(source.get("split", "train"))
    if "[" in split or "+" in split:
        return None
    try:
        files = [Path(file) for file in local_files({**source, "path": path})]
        files = files or sorted(Path(path).rglob(f"*{split}*.parquet"))
        rows = sum(
            pq.read_metadata(file).num_rows
            if file.suffix == ".parquet"
            else len(json.loads(file.read_text()))
            if file.suffix == ".json"
            else sum(1 for line in file.open() if line.strip())
            for file in files
        )
    except (OSError, ValueError):
        return None
    return min(rows, source.get("limit") or rows) if files else None


def _about_the_model(
    name: str | None,
    model: ModelConfig,
    args: VisionSFTConfig | VisionGRPOConfig,
    world_size: int,
    zero_stage: int,
    gpu_memory: float,
    micro_batches: Sequence[tuple[int, int, int]],
    longest: int | None = None,
) -> list[str]:
    config = model_config(model.model_name_or_path)
    if config is None:
        return [
            f"note: {model.model_name_or_path} is not here, its size, positions and heads were not checked: plan "
            "again with, for example, `--model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct`"
        ]
    counts = memory.Model.of(config, model, getattr(args, "freeze_vision", False))
    origin = f", those of {model.model_name_or_path}, which it starts from" if name != model.model_name_or_path else ""
    lines = [f"model: {counts.parameters / 1e9:.3g} billion parameters{origin}"]
    if model.use_peft:
        lines.append("checkpoints hold the adapter only")
    elif args.save_strategy != "no":
        each = counts.parameters * BYTES_PER_PARAMETER / 1e9
        kept = f"{args.save_total_limit} kept, {each * (args.save_total_limit + 1):,.0f} GB while one is written"
        lines.append(
            f"checkpoint: {each:,.0f} GB with bf16 and DeepSpeed's fp32 master weights; "
            + (kept if args.save_total_limit else "all kept, no save_total_limit")
        )
    if micro_batches and model.dtype == "bfloat16":
        lines += memory.describe(counts, args, micro_batches, longest, world_size, zero_stage, gpu_memory)
    return lines
