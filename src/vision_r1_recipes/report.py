"""
A table like the paper's main table, the overthinking figure and the training curves, from runs and evaluations.

```shell
python -m vision_r1_recipes.report Zero=runs/demo/zero Vision-R1=runs/demo/ptst \\
    --evals Vision-R1-CI=runs/demo/cold_start/eval Vision-R1=runs/demo/ptst/eval --baseline Vision-R1-CI
```

A run is a folder that `grpo.py` writes, finished or not; an evaluation one that `evaluate.py` writes. Both can be
given anywhere, with a label (`label=path`) or without. A run and an evaluation of one label share a colour.
"""

import sys
from pathlib import Path


# A script's folder comes first on the path, where `evaluate.py` would shadow Hugging Face's `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import argparse  # noqa: E402
import json  # noqa: E402
import textwrap  # noqa: E402
from collections.abc import Iterable, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from vision_r1_recipes import preflight, recipe  # noqa: E402
from vision_r1_recipes.evaluate import REFLECTION, bucket_name, paired_difference, percent  # noqa: E402
from vision_r1_recipes.ptst import Stage, num_rollouts, parse_stages  # noqa: E402
from vision_r1_recipes.recipe import RecipeError  # noqa: E402


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")  # Okabe and Ito's
SAME = ("data", "sampling")  # of two summaries, for their numbers to be comparable


@dataclass
class Run:
    """A GRPO run: its schedule and one log row per logged rollout."""

    label: str
    path: Path
    stages: list[Stage]
    rows: list[dict[str, Any]]

    def column(self, key: str) -> np.ndarray:
        return np.array([row.get(key, np.nan) for row in self.rows], dtype=float)


@dataclass
class Evaluation:
    """What `evaluate.py` wrote: the summary, and the samples unless the file is gone."""

    label: str
    path: Path
    summary: dict[str, Any]
    samples: pd.DataFrame | None


def load(arguments: Iterable[str]) -> tuple[list[Run], list[Evaluation], list[str]]:
    """
    Read every `path` or `label=path`.

    Returns:
        Runs, evaluations, and notes on what was left out.

    Raises:
        `RecipeError`: a folder that is neither, or a label used twice.
    """
    runs, evaluations, notes = [], [], []
    for argument in arguments:
        labelled = "=" in argument and not Path(argument).exists()
        label, _, path = argument.partition("=") if labelled else ("", "", argument)
        folder = Path(path)
        if not folder.is_dir():
            raise RecipeError(f"{argument}: {path} is not a folder. Give a run or an evaluation, or label=folder.")
        try:
            if (folder / "summary.json").is_file():
                summary = json.loads((folder / "summary.json").read_text())
                if "by_length" not in summary:
                    raise ValueError("its summary.json is not one of evaluate.py")
                samples = folder / "samples.parquet"
                found = pd.read_parquet(samples) if samples.is_file() else None
                evaluations.append(Evaluation(label or summary["name"], folder, summary, found))
            else:
                run = _load_run(label or folder.resolve().name, folder)
                if run.rows:
                    runs.append(run)
                else:
                    notes.append(f"{run.label} ({folder}): no rollouts in its log, so no curves.")
        except (OSError, ValueError, KeyError) as error:
            raise (
                error if isinstance(error, RecipeError) else RecipeError(f"can't read {folder}: {error!r}")
            ) from error
    for kind in (runs, evaluations):
        labels = [item.label for item in kind]
        for label in labels:
            if labels.count(label) > 1:
                raise RecipeError(f"the label {label!r} is used {labels.count(label)} times: write label=folder.")
    return runs, evaluations, notes


def _load_run(label: str, folder: Path) -> Run:
    states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    states = sorted(filter(Path.is_file, states), key=lambda path: json.loads(path.read_text())["global_step"])
    if not states:
        below = ", ".join(str(path.parent) for path in sorted(folder.rglob("summary.json"))[:3])
        hint = f"There is a summary.json in {below}." if below else "Is it a run, and has it saved a checkpoint?"
        raise RecipeError(f"{folder} has no summary.json, trainer_state.json or checkpoint with one. {hint}")
    log = json.loads(states[-1].read_text())["log_history"]
    resolved = folder / "recipe.yaml"
    stages = (recipe.load(resolved) if resolved.is_file() else {}).get("stages")
    return Run(
        label, folder, parse_stages(stages) if stages else [], [r for r in log if "rollout" in r and "reward" in r]
    )


# Tables


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown, aligned to be read as plain text too; the first column to the left."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    aligned = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        for row in cells
    ]
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (aligned[0], rule, *aligned[1:]))


def main_table(evaluations: Sequence[Evaluation]) -> str:
    header = ("Model", "Accuracy % (95 %)", "HFRRF %", "Format %", "Mean tokens", "Median", "Truncated %", "Questions")
    rows = []
    for e in evaluations:
        s = e.summary
        accuracy = f"{percent(s['accuracy'])} ± {percent(1.96 * s['accuracy_se'])}"
        shares = (percent(s["hfrrf"]), percent(s["format_rate"]))
        lengths = (f"{s['mean_tokens']:.1f}", f"{s['median_tokens']:g}", percent(s["truncated"]), s["questions"])
        rows.append((e.label, accuracy, *shares, *lengths))
    return table(header, rows)


def difference_table(evaluations: Sequence[Evaluation], baseline: Evaluation) -> tuple[str, list[str]]:
    """Accuracy and length of each model minus the baseline's, and notes on what could not be compared."""
    rows, notes = [], []
    for e in evaluations:
        if e is baseline:
            continue
        try:
            if e.samples is None or baseline.samples is None:
                raise ValueError("samples.parquet is missing.")
            mean, low, high = (100 * x for x in paired_difference(e.samples, baseline.samples))
        except ValueError as error:
            notes.append(f"{e.label} minus {baseline.label}: {error}")
            continue
        tokens = e.summary["mean_tokens"] - baseline.summary["mean_tokens"]
        rows.append(
            (f"{e.label} minus {baseline.label}", f"{mean:+.1f}", f"[{low:+.1f}, {high:+.1f}]", f"{tokens:+.1f}")
        )
    header = ("Paired difference", "Accuracy, points", "95 % interval", "Mean tokens")
    return table(header, rows) if rows else "", notes


def length_table(evaluations: Sequence[Evaluation]) -> str:
    names = list(dict.fromkeys(bucket_name(b) for e in evaluations for b in e.summary["by_length"]))
    rows = []
    for e in evaluations:
        cells = {bucket_name(b): f"{percent(b['accuracy'])} of {b['questions']}" for b in e.summary["by_length"]}
        rows.append((e.label, *(cells.get(name, "") for name in names)))
    return table(("Accuracy % by tokens", *names), rows)


def reflection_table(evaluations: Sequence[Evaluation]) -> str:
    rows = []
    for e in evaluations:
        words = (e.summary["reflection"][word] for word in (*REFLECTION, "any"))
        rows.append((e.label, *(f"{w['per_1000_tokens']:.1f} ({percent(w['share'])} %)" for w in words)))
    return table(("Per 1,000 tokens (in % of completions)", *REFLECTION, "any"), rows)


def run_table(runs: Sequence[Run]) -> str:
    def ends(run: Run, key: str, form: str, scale: float = 1) -> str:
        column, tenth = scale * run.column(key), max(1, len(run.rows) // 10)
        return f"{column[:tenth].mean():{form}} → {column[-tenth:].mean():{form}}".replace("nan", "-")

    header = ("Run", "Stages (cap x group: rollouts)", "Rollouts", "Reward", "Accuracy %", "Mean tokens", "Clipped %")
    rows = [
        (
            run.label,
            ", ".join(f"{s.max_completion_length} x {s.num_generations}: {s.steps}" for s in run.stages) or "?",
            f"{run.rows[-1]['rollout']:g} of {num_rollouts(run.stages) or '?'}",
            ends(run, "reward", ".2f"),
            ends(run, "accuracy_rate", ".1f", 100),
            ends(run, "completions/mean_length", ".1f"),
            ends(run, "completions/clipped_ratio", ".1f", 100),
        )
        for run in runs
    ]
    return table(header, rows)


# Figure


def figure(runs: Sequence[Run], evaluations: Sequence[Evaluation], path: Path) -> list[str]:
    """Draw length and accuracy or reward over rollouts, and accuracy by length: what there is. Returns notes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    labels = dict.fromkeys([e.label for e in evaluations] + [run.label for run in runs])
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    panels = 2 * bool(runs) + bool(evaluations)
    fig, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.9), layout="constrained", squeeze=False)
    axes = list(axes[0])
    notes = []
    if runs:
        length, reward = axes[:2]
        _length_panel(length, runs, colours)
        logged = all(np.isfinite(run.column("accuracy_rate")).any() for run in runs)
        for run in runs:
            _curve(reward, run, "accuracy_rate" if logged else "reward", colours[run.label])
        what = "accuracy of training rollouts" if logged else "reward of training rollouts"
        reward.set(xlabel="rollout", ylabel=what, ylim=(0, 1.02), xlim=(0, None))
        for axis in (length, reward):
            _bands(axis, runs)
    if evaluations:
        notes = _bucket_panel(axes[-1], evaluations, colours)
    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    fig.savefig(path, dpi=160)
    plt.close(fig)
    return notes


def _curve(axis, run: Run, key: str, colour: str) -> None:
    """One point per rollout, faint, and their moving average."""
    x, y = run.column("rollout"), run.column(key)
    window = max(1, len(y) // 12)
    smooth = pd.Series(y).rolling(window, center=True, min_periods=1).mean()
    axis.plot(x, y, ".", color=colour, alpha=0.3, markersize=3)
    axis.plot(x, smooth, color=colour, linewidth=1.8)


def _length_panel(axis, runs: Sequence[Run], colours: dict[str, str]) -> None:
    for run in runs:
        _curve(axis, run, "completions/mean_length", colours[run.label])
        edges = np.cumsum([0, *(stage.steps for stage in run.stages)])
        if run.stages:
            caps = [stage.max_completion_length for stage in run.stages]
            axis.stairs(caps, edges, baseline=None, color=colours[run.label], linestyle="--", linewidth=1)
    axis.set(xlabel="rollout", ylabel="mean completion length, tokens (dashed: cap)", ylim=(0, None), xlim=(0, None))


def _bands(axis, runs: Sequence[Run]) -> None:
    """Shade the stages of the run that has most of them."""
    staged = max(runs, key=lambda run: len(run.stages))
    edges = np.cumsum([0, *(stage.steps for stage in staged.stages)])
    for i, stage in enumerate(staged.stages):
        axis.axvspan(edges[i], edges[i + 1], color="0.5", alpha=0.06 if i % 2 == 0 else 0.16, linewidth=0, zorder=0)
        name = f"stage {i + 1}: {stage.max_completion_length} x {stage.num_generations}"
        axis.text(
            (edges[i] + edges[i + 1]) / 2, 1.02, name, ha="center", transform=axis.get_xaxis_transform(), fontsize=8
        )


def _bucket_panel(axis, evaluations: Sequence[Evaluation], colours: dict[str, str]) -> list[str]:
    names = [bucket_name(b) for b in evaluations[0].summary["by_length"]]
    drawn = [e for e in evaluations if [bucket_name(b) for b in e.summary["by_length"]] == names]
    width = 0.84 / len(drawn)
    for i, e in enumerate(drawn):
        x = np.arange(len(names)) + (i - (len(drawn) - 1) / 2) * width
        axis.bar(x, [b["accuracy"] or 0 for b in e.summary["by_length"]], 0.92 * width, color=colours[e.label])
        for at, bucket in zip(x, e.summary["by_length"], strict=True):
            low, high = _wilson(bucket["accuracy"] or 0, bucket["questions"])
            axis.vlines(at, low, high, color="0.25", linewidth=0.8)
            axis.text(at, high + 0.01, bucket["questions"], ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(names)), names)
    axis.set_title("lines: 95 % interval, numbers: questions", fontsize=8)
    axis.set(xlabel="tokens of the completion", ylabel="held-out accuracy", ylim=(0, 1.08))
    return [f"{e.label}: other length buckets, not in the figure." for e in evaluations if e not in drawn]


def _wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, which is also right for a handful of questions; empty for none."""
    if n == 0:
        return 0.0, 0.0
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)


# The report


def write(
    runs: list[Run], evaluations: list[Evaluation], notes: list[str], output_dir: Path, baseline: str | None
) -> str:
    """Write `report.md` and `figure.png` into `output_dir`; returns the main tables as text."""
    labels = [e.label for e in evaluations]
    if evaluations and baseline not in (None, *labels):
        raise RecipeError(f"`--baseline`: {baseline!r} is none of the evaluations: {', '.join(labels)}.")
    output_dir.mkdir(parents=True, exist_ok=True)
    notes = notes + figure(runs, evaluations, output_dir / "figure.png")
    main, rest = [], ["![Length, accuracy and length buckets](figure.png)"]
    if evaluations:
        base = evaluations[labels.index(baseline or labels[0])]
        differences, not_compared = difference_table(evaluations, base)
        main += [main_table(evaluations), differences]
        rest += [length_table(evaluations), reflection_table(evaluations)]
        notes += not_compared + _notes_on_settings(evaluations)
    else:
        notes.append("no evaluations given: no accuracy table.")
    if runs:
        rest.append("Mean of the first and of the last tenth of the logged rollouts:\n\n" + run_table(runs))
    else:
        notes.append("no GRPO runs given: no curves.")
    listed = "\n".join(f"- {note}" for note in notes)
    parts = ["# Report", *main, *rest, f"Notes\n\n{listed}" if notes else ""]
    (output_dir / "report.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    return "\n\n".join(filter(None, [*main, listed]))


def _notes_on_settings(evaluations: Sequence[Evaluation]) -> list[str]:
    first = evaluations[0].summary
    sampling = ", ".join(
        f"{key} {first['sampling'][key]}" for key in ("temperature", "top_p", "max_new_tokens", "seed")
    )
    notes = [f"evaluated on {first['data']['path']}, split {first['data']['split']}, one sample each: {sampling}."]
    for e in evaluations[1:]:
        for part in SAME:
            ours, theirs = e.summary[part], first[part]
            other = [key for key in ours if ours[key] != theirs.get(key)]
            if other:
                values = ", ".join(f"{key} {_short(ours[key])} against {_short(theirs.get(key))}" for key in other)
                notes.append(f"{e.label} differs from {evaluations[0].label} in {part}: {values}.")
    return notes


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 60, placeholder=" ...")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vision_r1_recipes.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", help="folders of runs or evaluations, or label=folder")
    parser.add_argument("--evals", nargs="+", default=[], help="more of them")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/report"))
    parser.add_argument("--baseline", help="label of the evaluation that the others are compared with (the first)")
    args = parser.parse_args(argv)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RecipeError("matplotlib is missing: pip install 'vision-r1-recipes[report]'.") from error
    runs, evaluations, notes = load([*args.runs, *args.evals])
    if not runs and not evaluations:
        raise RecipeError("nothing to report: name folders of runs or evaluations." + "".join(f"\n{n}" for n in notes))
    print(write(runs, evaluations, notes, args.output_dir, args.baseline))
    print(f"\nwritten to {args.output_dir}/report.md and figure.png")


if __name__ == "__main__":
    with preflight.kind_errors():
        main()
