"""What runs and evaluations have left in their folders."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import recipe
from .ptst import Stage, parse_stages
from .recipe import RecipeError


@dataclass
class Run:
    """A GRPO run: its schedule, one log row per logged rollout, and one per evaluation during training."""

    label: str
    path: Path
    seed: int | None
    stages: list[Stage]
    prompts_per_rollout: int
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    def column(self, key: str) -> np.ndarray:
        return np.array([row.get(key, np.nan) for row in self.rows], dtype=float)

    def spent(self, what: str) -> np.ndarray:
        """
        `"rollouts"`, `"tokens"` (sampled ones) or `"minutes"` (of training steps) from the start to each row. A row
        that stands for several rollouts holds their means.
        """
        rollouts = self.column("rollout")
        if what == "rollouts":
            return rollouts
        each = np.diff(rollouts, prepend=0)
        if what == "tokens":
            rows = self.prompts_per_rollout * self.column("stage/num_generations")
            return np.cumsum(each * rows * self.column("completions/mean_length"))
        return np.cumsum(each * self.column("seconds_per_rollout")) / 60

    def held_out(self, what: str) -> tuple[np.ndarray, np.ndarray]:
        """What was spent and the accuracy on held-out questions, at each evaluation during training."""
        at = np.array([row["rollout"] for row in self.evaluations], dtype=float)
        accuracy = np.array([row.get("eval_accuracy_rate", np.nan) for row in self.evaluations], dtype=float)
        return np.interp(at, self.spent("rollouts"), self.spent(what)), accuracy


@dataclass
class Evaluation:
    """What `evaluate.py` wrote: the summary, and the samples unless the file is gone."""

    label: str
    path: Path
    seed: int | None
    summary: dict[str, Any]
    samples: pd.DataFrame | None


def by_label(items: Iterable[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def load(arguments: Iterable[str]) -> tuple[list[Run], list[Evaluation], list[str]]:
    """
    Read every `path` or `label=path`.

    Returns:
        Runs, evaluations, and notes on what was left out.

    Raises:
        `RecipeError`: a folder that is neither, or one given twice.
    """
    runs, evaluations, notes, seen = [], [], [], set()
    for argument in arguments:
        labelled = "=" in argument and not Path(argument).exists()
        label, _, path = argument.partition("=") if labelled else ("", "", argument)
        folder = Path(path)
        if not folder.is_dir():
            raise RecipeError(f"{argument}: {path} is not a folder. Give a run or an evaluation, or label=folder.")
        if folder.resolve() in seen:
            raise RecipeError(f"{argument}: {path} is given twice.")
        seen.add(folder.resolve())
        if (folder / "summary.json").is_file():
            evaluations.append(load_evaluation(label, folder))
            continue
        run = load_run(label or folder.resolve().name, folder)
        if run.rows:
            runs.append(run)
        else:
            notes.append(f"{run.label} ({folder}): no rollouts in its log, so no curves.")
    return runs, evaluations, notes


def load_evaluation(label: str, folder: Path, seed: int | None = None) -> Evaluation:
    """The evaluation in `folder`; its seed is, unless given, that of the run around it."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        if "by_length" not in summary:
            raise ValueError("its summary.json is not one of evaluate.py")
        samples = folder / "samples.parquet"
        found = pd.read_parquet(samples) if samples.is_file() else None
        resolved = folder.parent / "recipe.yaml"
        if seed is None and resolved.is_file():
            seed = recipe.load(resolved).get("seed")
        return Evaluation(label or summary["name"], folder, seed, summary, found)
    except (OSError, ValueError, KeyError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"can't read {folder}: {error!r}") from error


def states(folder: Path) -> list[Path]:
    """The logs of a run, the newest last."""
    found = filter(Path.is_file, [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")])
    return sorted(found, key=lambda path: json.loads(path.read_text())["global_step"])


def load_run(label: str, folder: Path, seed: int | None = None) -> Run:
    """The run in `folder`, as far as it has come; its seed is, unless given, the one in its recipe."""
    try:
        logs = states(folder)
        if not logs:
            below = ", ".join(str(path.parent) for path in sorted(folder.rglob("summary.json"))[:3])
            hint = f"There is a summary.json in {below}." if below else "Is it a run, and has it saved a checkpoint?"
            raise RecipeError(f"{folder} has no summary.json, trainer_state.json or checkpoint with one. {hint}")
        state = json.loads(logs[-1].read_text())
        resolved = recipe.load(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
        stages = parse_stages(resolved["stages"]) if resolved.get("stages") else []
        rows = [row for row in state["log_history"] if "rollout" in row and "reward" in row]
        steps = state["global_step"] / rows[-1]["rollout"] if rows else 1
        for row in rows:
            row["seconds_per_rollout"] = steps * row.get("step_time", np.nan)
        return Run(
            label,
            folder,
            resolved.get("seed") if seed is None else seed,
            stages,
            resolved.get("prompts_per_rollout", 1),
            rows,
            [row for row in state["log_history"] if "eval_accuracy_rate" in row and "rollout" in row],
        )
    except (OSError, ValueError, KeyError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"can't read {folder}: {error!r}") from error
