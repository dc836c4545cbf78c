"""What runs and evaluations have left in their folders."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import recipe
from .evaluate import bucket_name
from .ptst import Stage, parse_stages, stage_at
from .recipe import RecipeError


@dataclass
class Run:
    """A GRPO run: its schedule, one log row per logged rollout, and one per evaluation during training."""

    label: str
    path: Path
    seed: int | None
    stages: list[Stage]
    prompts_per_rollout: float  # nan when the recipe is gone
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    start: Path | None = None  # the model it began with
    parent: Run | None = None  # the run that made it

    def column(self, key: str) -> np.ndarray:
        return np.array([row.get(key, np.nan) for row in self.rows], dtype=float)

    def spent(self, what: str) -> np.ndarray:
        """
        `"rollouts"`, `"tokens"` (sampled ones) or `"minutes"` (of training steps) up to each row, those of the run
        that made the start model included. A row that stands for several rollouts holds their means.
        """
        return self.before(what) + self._own(what)

    def before(self, what: str) -> float:
        """What the run that made the start model had spent."""
        return self.parent.spent(what)[-1] if self.parent else 0.0

    def _own(self, what: str) -> np.ndarray:
        rollouts = self.column("rollout")
        if what == "rollouts":
            return rollouts
        each = np.diff(rollouts, prepend=0)
        if what == "minutes":
            return np.cumsum(each * self.column("seconds_per_rollout")) / 60
        groups = each * self.column("stage/num_generations")
        if self.stages:
            sizes = [self.stages[stage_at(self.stages, i)].num_generations for i in range(int(rollouts[-1]))]
            groups = np.diff(np.concatenate([[0], np.cumsum(sizes)])[rollouts.astype(int)], prepend=0)
        return np.cumsum(groups * self.prompts_per_rollout * self.column("completions/mean_length"))

    def held_out(self, what: str, key: str = "eval_accuracy_rate") -> tuple[np.ndarray, np.ndarray]:
        """What was spent and `key` of held-out questions, at each evaluation during training."""
        at = np.array([row["rollout"] for row in self.evaluations], dtype=float)
        values = np.array([row.get(key, np.nan) for row in self.evaluations], dtype=float)
        own = np.interp(at, np.append(0, self._own("rollouts")), np.append(0, self._own(what)))
        return self.before(what) + own, values


@dataclass
class Evaluation:
    """What `evaluate.py` wrote: the summary, and the samples unless the file is gone."""

    label: str
    path: Path
    seed: int | None
    summary: dict[str, Any]
    samples: pd.DataFrame | None


def link(runs: Iterable[Run]) -> None:
    """Let every run know which of the others made its start model: what that one spent counts for both."""
    made = {run.path.resolve(): run for run in runs}
    for run in runs:
        run.parent = made.get(run.start.resolve()) if run.start else None
        if run.parent is run:
            run.parent = None


def by_label(items: Iterable[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    return groups


def buckets(group: Sequence[Evaluation]) -> dict[str, tuple[float | None, int]]:
    """Accuracy (`None` without questions) and number of questions of each length bucket, all seeds together."""
    right: dict[str, float] = {}
    questions: dict[str, int] = {}
    for bucket in (bucket for e in group for bucket in e.summary["by_length"]):
        name = bucket_name(bucket)
        right[name] = right.get(name, 0) + (bucket["accuracy"] or 0) * bucket["questions"]
        questions[name] = questions.get(name, 0) + bucket["questions"]
    return {name: (right[name] / n if n else None, n) for name, n in questions.items()}


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
    """The evaluation in `folder`; its seed is, unless given, that of the run around it, `None` without one."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        if "by_length" not in summary:
            raise ValueError("its summary.json is not one of evaluate.py")
        samples = folder / "samples.parquet"
        found = pd.read_parquet(samples) if samples.is_file() else None
        around = [place / "recipe.yaml" for place in (folder.resolve().parent, folder.resolve().parent.parent)]
        if seed is None:
            seed = next((recipe.load(path).get("seed") for path in around if path.is_file()), None)
        return Evaluation(label or summary["name"], folder, seed, summary, found)
    except (OSError, ValueError, KeyError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"can't read {folder}: {error!r}") from error


def read_json(path: Path) -> Any:
    """The content of a file that may be absent, or half written by a run that is going on; `None` then."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def state(folder: Path) -> dict[str, Any] | None:
    """The newest readable state of the run in `folder`, its log included; `None` before the first is saved."""
    found = map(read_json, [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")])
    return max(filter(None, found), key=lambda content: content["global_step"], default=None)


def load_run(label: str, folder: Path, seed: int | None = None) -> Run:
    """The run in `folder`, as far as it has come; its seed is, unless given, the one in its recipe."""
    try:
        saved = state(folder)
        if saved is None:
            below = ", ".join(str(path.parent) for path in sorted(folder.rglob("summary.json"))[:3])
            hint = f"There is a summary.json in {below}." if below else "Is it a run, and has it saved a checkpoint?"
            raise RecipeError(f"{folder} has no summary.json, trainer_state.json or checkpoint with one. {hint}")
        resolved = recipe.load(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
        stages = parse_stages(resolved["stages"]) if resolved.get("stages") else []
        log = saved["log_history"]
        rows = [row for row in log if "rollout" in row and "reward" in row]
        steps = rows[-1].get("step", np.nan) / rows[-1]["rollout"] if rows else 1
        for row in rows:
            row["seconds_per_rollout"] = steps * row.get("step_time", np.nan)
        return Run(
            label,
            folder,
            resolved.get("seed") if seed is None else seed,
            stages,
            resolved.get("prompts_per_rollout", np.nan),
            rows,
            [row for row in log if "eval_accuracy_rate" in row and "rollout" in row],
            Path(resolved["model_name_or_path"]) if "model_name_or_path" in resolved else None,
        )
    except (OSError, ValueError, KeyError) as error:
        raise error if isinstance(error, RecipeError) else RecipeError(f"can't read {folder}: {error!r}") from error
