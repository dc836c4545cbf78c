"""The figures of a report, one PNG each, readable on a phone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from .evaluate import REFLECTION, bucket_name
from .results import Evaluation, Run, buckets, by_label


# Okabe and Ito's, which the colour-blind can tell apart, then more for long tables.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    *("#999933", "#882255", "#777777", "#44AA99", "#AA4499"),
)
SIZE = (5.4, 4.2)  # inches


def draw(runs: Sequence[Run], evaluations: Sequence[Evaluation], folder: Path) -> tuple[dict[str, str], list[str]]:
    """
    Draw what can be drawn into `folder`.

    Returns:
        The file of each figure, `""` where there is nothing to draw, and notes on what was left out.
    """
    labels = dict.fromkeys([e.label for e in evaluations] + [run.label for run in runs])
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    held_out = [run for run in runs if run.evaluations]
    logged = bool(runs) and all(np.isfinite(run.column("accuracy_rate")).any() for run in runs)
    notes: list[str] = []
    made = {
        "length": _figure(folder / "length.png", runs, colours, lambda axis: _length(axis, runs, colours)),
        "accuracy": _figure(folder / "accuracy.png", runs, colours, lambda axis: _reward(axis, runs, colours, logged)),
        "held_out": _figure(folder / "held_out.png", held_out, colours, lambda a: _held_out(a, held_out, colours)),
        "tokens": _figure(
            folder / "tokens.png",
            runs and [*runs, *evaluations],
            colours,
            lambda axis: _tokens(axis, runs, evaluations, colours),
        ),
        "buckets": _figure(
            folder / "buckets.png", evaluations, colours, lambda axis: notes.extend(_bars(axis, evaluations, colours))
        ),
        "reflection": _figure(
            folder / "reflection.png", evaluations, colours, lambda axis: _words(axis, evaluations, colours)
        ),
    }
    return made, notes


def _figure(path: Path, items: Sequence, colours: dict[str, str], fill: Callable[[plt.Axes], None]) -> str:
    if not items:
        return ""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        shown = [label for label in colours if any(item.label == label for item in items)]
        height = SIZE[1] + 0.2 * -(-len(shown) // 2)
        fig, axis = plt.subplots(figsize=(SIZE[0], height), layout="constrained")
        fill(axis)
        if axis.dataLim.ymin == 0:  # matplotlib's margin would show shares below it
            axis.set_ylim(bottom=0)
        handles = [Line2D([], [], color=colours[label], linewidth=4, label=label) for label in shown]
        fig.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        fig.savefig(path, dpi=150)
        plt.close(fig)
    return path.name


def _curve(axis, x: Sequence[np.ndarray], y: Sequence[np.ndarray], colour: str, smooth: int = 1, **style) -> None:
    """The mean of several seeds' curves, each smoothed over `smooth` points, and a band from the lowest to the
    highest; where some have ended, the mean of the others goes on no further."""
    lines = [pd.Series(values).rolling(smooth, center=True, min_periods=1).mean().to_numpy() for values in y]
    start, end = max(at[0] for at in x), min(at[-1] for at in x)
    grid = np.unique(np.concatenate(x))
    grid = grid[(grid >= start) & (grid <= end)]
    values = np.array([np.interp(grid, at, line) for at, line in zip(x, lines, strict=True)])
    width = 2.6 - 1.6 * COLOURS.index(colour) / len(COLOURS)  # what lies under another curve shows at its sides
    style |= {"clip_on": False, "zorder": 3}  # at 0, over the axis
    axis.plot(grid, values.mean(axis=0), color=colour, linewidth=width, **style)
    if len(x) > 1:
        axis.fill_between(grid, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.1, linewidth=0)


def _over_rollouts(axis, runs: Sequence[Run], key: str, colours: dict[str, str]) -> None:
    for label, group in by_label(runs).items():
        columns = [run.column(key) for run in group]
        x = [run.spent("rollouts") for run in group]
        if len(group) == 1:
            axis.plot(x[0], columns[0], ".", color=colours[label], alpha=0.25, markersize=3)
        _curve(axis, x, columns, colours[label], smooth=max(1, len(columns[0]) // 12))


def _length(axis, runs: Sequence[Run], colours: dict[str, str]) -> None:
    _over_rollouts(axis, runs, "completions/mean_length", colours)
    top = axis.get_ylim()[1]
    for label, group in by_label(runs).items():
        stages = group[0].stages
        edges = np.cumsum([0, *(stage.steps for stage in stages)]) + group[0].before("rollouts")
        caps = [stage.max_completion_length for stage in stages]
        if caps:
            axis.stairs(caps, edges, baseline=None, color=colours[label], linestyle="--", linewidth=1, alpha=0.7)
    held_out = [run for run in runs if run.evaluations]
    for run in held_out:
        x, lengths = run.held_out("rollouts", "eval_completions/mean_length")
        axis.plot(x, lengths, "x", color=colours[run.label], markersize=4)
    # A cap that nothing comes near would press the curves to the floor.
    lowest = min((s.max_completion_length for run in runs for s in run.stages), default=0)
    what = f"mean completion length, tokens\n(dashed: cap{'; x: held-out questions' if held_out else ''})"
    axis.set(xlabel="rollout", ylabel=what, xlim=(0, None))
    axis.set_ylim(0, max(1.1 * top, 1.1 * lowest))
    _stages(axis, runs)


def _reward(axis, runs: Sequence[Run], colours: dict[str, str], logged: bool) -> None:
    _over_rollouts(axis, runs, "accuracy_rate" if logged else "reward", colours)
    what = "accuracy" if logged else "reward"
    axis.set(xlabel="rollout", ylabel=f"{what} of the training rollouts", xlim=(0, None))
    _stages(axis, runs)


def _held_out(axis, runs: Sequence[Run], colours: dict[str, str]) -> None:
    for label, group in by_label(runs).items():
        curves = [run.held_out("rollouts") for run in group]
        _curve(axis, [x for x, _ in curves], [y for _, y in curves], colours[label], marker=".")
    axis.set(xlabel="rollout", ylabel="accuracy on held-out questions", xlim=(0, None))
    _stages(axis, runs)


def _tokens(axis, runs: Sequence[Run], evaluations: Sequence[Evaluation], colours: dict[str, str]) -> None:
    """Held-out accuracy over the tokens that were sampled for it: during training, and (dots) at the end."""
    final = by_label(evaluations)
    for label, group in by_label(runs).items():
        if all(run.evaluations for run in group):
            curves = [run.held_out("tokens") for run in group]
            _curve(axis, [x / 1e6 for x, _ in curves], [y for _, y in curves], colours[label])
        spent = np.mean([run.spent("tokens")[-1] for run in group]) / 1e6
        if label in final:
            accuracy = [e.summary["accuracy"] for e in final[label]]
            error = np.std(accuracy, ddof=1) if len(accuracy) > 1 else final[label][0].summary["accuracy_se"]
            axis.errorbar(spent, np.mean(accuracy), error, fmt="o", color=colours[label], capsize=2, markersize=5)
    for label, group in final.items():
        if label not in {run.label for run in runs}:  # without RL
            axis.axhline(np.mean([e.summary["accuracy"] for e in group]), color=colours[label], linestyle=":")
    axis.set(xlabel="tokens sampled in training, millions", ylabel="accuracy on held-out questions", xlim=(0, None))
    axis.set_title("dots: final evaluation with s.d. over seeds (one seed: standard error)", fontsize=8)


def _stages(axis, runs: Sequence[Run]) -> None:
    """Shade the stages of the run that has most of them, and name it."""
    staged = max(runs, key=lambda run: len(run.stages))
    edges = np.cumsum([0, *(stage.steps for stage in staged.stages)])
    for i, stage in enumerate(staged.stages):
        axis.axvspan(edges[i], edges[i + 1], color="0.5", alpha=0.06 if i % 2 == 0 else 0.16, linewidth=0, zorder=0)
        name = f"{stage.max_completion_length} x {stage.num_generations}"
        middle, top = (edges[i] + edges[i + 1]) / 2, axis.get_xaxis_transform()
        axis.text(middle, 1.02, name, ha="center", transform=top, fontsize=7)
    if staged.stages:
        axis.set_xlim(0, max(axis.get_xlim()[1], edges[-1]))
        axis.set_title(f"shaded: the stages of {staged.label}", fontsize=7, loc="left", pad=14)


def _bars(axis, evaluations: Sequence[Evaluation], colours: dict[str, str]) -> list[str]:
    names = [bucket_name(b) for b in evaluations[0].summary["by_length"]]
    drawn = [e for e in evaluations if [bucket_name(b) for b in e.summary["by_length"]] == names]
    groups = by_label(drawn).items()
    width = 0.84 / len(groups)
    for i, (label, group) in enumerate(groups):
        for j, (accuracy, questions) in enumerate(buckets(group).values()):
            at = j + (i - (len(groups) - 1) / 2) * width
            if accuracy is None:
                continue
            axis.bar(at, accuracy, 0.92 * width, color=colours[label])
            low, high = _wilson(accuracy, questions)
            axis.vlines(at, low, high, color="0.25", linewidth=0.8)
            axis.text(at, high + 0.01, questions, ha="center", va="bottom", fontsize=6, rotation=90)
    axis.set_xticks(range(len(names)), names)
    axis.set_title("lines: 95 % interval, numbers: questions", fontsize=8)
    axis.set(xlabel="tokens of the completion", ylabel="accuracy on held-out questions", ylim=(0, 1.12))
    return [f"{e.label}: other length buckets, not in the figure." for e in evaluations if e not in drawn]


def _words(axis, evaluations: Sequence[Evaluation], colours: dict[str, str]) -> None:
    groups = by_label(evaluations).items()
    width = 0.84 / len(groups)
    for i, (label, group) in enumerate(groups):
        rates = [np.mean([e.summary["reflection"][word]["per_1000_tokens"] for e in group]) for word in REFLECTION]
        at = np.arange(len(rates)) + (i - (len(groups) - 1) / 2) * width
        axis.bar(at, rates, 0.92 * width, color=colours[label])
    axis.set_xticks(range(len(REFLECTION)), REFLECTION)
    axis.set(ylabel="per 1,000 tokens")


def _wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, which is also right for a handful of questions."""
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)
