"""Which checkpoint to go on from: the newest complete one of the same run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Any

from .recipe import RecipeError, load


PREFIX = "checkpoint-"  # transformers' PREFIX_CHECKPOINT_DIR, which takes seconds to import
MARKER = "complete.json"
LAUNCH = ("num_processes", "distributed_type", "data")  # keys of an identity that are not a recipe's
# Keys of a recipe that change neither a rollout nor an update: a resumed run may have others.
FREE = (
    *("output_dir", "run_name", "report_to", "project", "disable_tqdm", "resume_from_checkpoint", "force_resume"),
    *("stop_after_rollouts", "accelerate_config", "probe_prompts", "num_proc", "ddp_timeout", "push_to_hub"),
    *("vllm_max_model_length", "per_device_eval_batch_size", "num_generations_eval", "dataloader_num_workers"),
    *("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_pin_memory"),
    *("num_completions_to_print", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode", "max_dropped_share"),
)
FREE_PREFIXES = ("log_", "logging_", "save_", "eval_", "hub_", "trackio_", "vllm_server_")


def mark(folder: str | Path, content: Mapping[str, Any]) -> None:
    """Declare the checkpoint in `folder` complete: the last thing written, in one stroke, with every file's size."""
    folder = Path(folder)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    files = {name: size for name, size in files.items() if not name.startswith(MARKER)}
    draft = folder / f"{MARKER}.draft"
    draft.write_text(json.dumps({**content, "files": files}, indent=1))
    os.replace(draft, folder / MARKER)


def read(folder: str | Path) -> dict[str, Any] | None:
    """The content of a complete checkpoint's marker; `None` when the checkpoint is not complete."""
    folder = Path(folder)
    try:
        content = json.loads((folder / MARKER).read_text())
        sizes = {name: (folder / name).stat().st_size for name in content["files"]}
    except (OSError, ValueError, KeyError):
        return None
    return content if sizes == content["files"] else None


def saved(output_dir: str | Path) -> list[Path]:
    """The checkpoints in `output_dir`, complete or not, oldest first."""
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX}*"):
        step = path.name.removeprefix(PREFIX)
        if path.is_dir() and step.isdigit():
            found[int(step)] = path
    return [found[step] for step in sorted(found)]


def newest_is_wanted(resume_from_checkpoint: Any) -> bool:
    """Whether `resume_from_checkpoint` names no folder but means the newest checkpoint: `true` or `auto`."""
    return str(resume_from_checkpoint).lower() in ("true", "auto")


def wanted(resume_from_checkpoint: Any, output_dir: str | Path) -> tuple[Path | None, list[Path]]:
    """
    The checkpoint that `resume_from_checkpoint` means.

    Args:
        resume_from_checkpoint (`str` or `bool`, *optional*):
            A folder; `true`, the newest complete checkpoint in `output_dir`; `auto`, the same, or a fresh start when
            there is none; `None` or `false`, a fresh start.
        output_dir (`str`):
            Where the run keeps its checkpoints.

    Returns:
        The checkpoint, or `None` for a fresh start, and the newer ones that are not complete.

    Raises:
        `RecipeError`: there is no such checkpoint, or the one named is not complete.
    """
    choice = str(resume_from_checkpoint).lower()
    if choice in ("none", "false"):
        return None, []
    if not newest_is_wanted(choice):
        folder = Path(resume_from_checkpoint)
        if not folder.is_dir():
            raise RecipeError(f"`resume_from_checkpoint`: {folder} is not a folder. Give a checkpoint, true or auto.")
        if read(folder) is None:
            raise RecipeError(
                f"`resume_from_checkpoint`: {folder} is not complete: {MARKER} is missing, or a file it lists. `auto` "
                "takes the newest complete checkpoint."
            )
        return folder, []
    skipped: list[Path] = []
    for folder in reversed(saved(output_dir)):
        if read(folder) is not None:
            return folder, skipped
        skipped.append(folder)
    if choice == "true":
        incomplete = f", only incomplete ones: {', '.join(map(str, skipped))}" if skipped else ""
        raise RecipeError(
            f"`resume_from_checkpoint`: true, but {output_dir} holds no complete checkpoint{incomplete}. `auto` "
            "starts afresh then."
        )
    return None, skipped


def finished(output_dir: str | Path, max_steps: int = -1) -> bool:
    """Whether the run in `output_dir` has come to its end, of at least `max_steps` steps."""
    try:
        state = json.loads((Path(output_dir) / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return state["global_step"] >= state["max_steps"] >= max_steps


def state(values: Mapping[str, Any]) -> str:
    """
    What there is of the run of a recipe: `finished`; `part finished`, as far as its `stop_after_rollouts` wants it;
    the newest complete checkpoint's name; or `nothing`.
    """
    folder = Path(str(values.get("output_dir")))
    if finished(folder) and (folder / "recipe.yaml").is_file():
        before, now = (_plain(identity(recipe)) for recipe in (load(folder / "recipe.yaml"), values))
        # More stages are no other run, but one that is not finished.
        same = before == now or (before.get("stages") == now.get("stages") and not changes(before, now))
        return "finished" if same else "another run, finished"
    newest, _ = wanted("auto", folder)
    last = values.get("stop_after_rollouts")
    if newest and last and rollouts_done(newest) >= last:
        return "part finished"
    return newest.name if newest else "nothing"


def rollouts_done(checkpoint: Path) -> int:
    """How many rollouts of a GRPO run lie before `checkpoint`."""
    from .ptst import num_rollouts, parse_stages  # which imports transformers

    state, stages = json.loads((checkpoint / "trainer_state.json").read_text()), read(checkpoint)["identity"]["stages"]
    return state["global_step"] * num_rollouts(parse_stages(stages)) // state["max_steps"]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """With lists of one item, as which a run saves a single value, undone."""
    single = {k: v[0] for k, v in values.items() if isinstance(v, list) and len(v) == 1 and not isinstance(v[0], dict)}
    return {**values, **single}


def identity(values: Mapping[str, Any], **launch: Any) -> dict[str, Any]:
    """What must not change between two parts of one run: the science of its recipe, and `launch` (world, data)."""
    science = {key: value for key, value in values.items() if key not in FREE and not key.startswith(FREE_PREFIXES)}
    return json.loads(json.dumps({**science, **launch}))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """
    A sentence for every key in which two identities differ; what `now` doesn't know yet of the launch is passed over.

    More stages behind the old ones are no change where the learning rate doesn't depend on the length of the run.
    """
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, defaults().get(key)), now.get(key, defaults().get(key))
        if old == new or (key in LAUNCH and key not in now):
            continue
        constant = now.get("lr_scheduler_type") == "constant"
        if key == "stages" and constant and isinstance(new, list) and new[: len(old or [])] == old:
            continue
        found.append(f"`{key}`: {_short(old)} in the checkpoint, {_short(new)} now")
    return found


@cache
def defaults() -> dict[str, Any]:
    """Defaults of the keys whose default is the same for SFT and GRPO."""
    from trl import ModelConfig

    from .configs import DataArguments, VisionGRPOConfig, VisionSFTConfig

    found: dict[str, list] = {}
    for kind in (DataArguments, ModelConfig, VisionSFTConfig, VisionGRPOConfig):
        for spec in fields(kind):
            found.setdefault(spec.name, []).append(None if spec.default is MISSING else spec.default)
    return {name: values[0] for name, values in found.items() if all(value == values[0] for value in values)}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
