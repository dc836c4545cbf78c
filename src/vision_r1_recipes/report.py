"""
Tables and figures like the paper's from any set of runs and evaluations, as HTML, Markdown and PNG.

```shell
python -m vision_r1_recipes.report Long=runs/long Vision-R1=runs/ptst \\
    --evals CI=runs/cold_start/eval/rl Vision-R1=runs/ptst/eval/rl --baseline CI
```

A run is a folder that `grpo.py` writes, finished or not; an evaluation one that `evaluate.py` writes. Both can be
given anywhere, with a label (`label=path`) or without. What has one label is one row at several seeds: tables give the
mean and the standard deviation over them, figures the mean and a band from the lowest to the highest.
"""

import sys
from pathlib import Path


# A script's folder comes first on the path, where `evaluate.py` would shadow Hugging Face's `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import argparse  # noqa: E402
import base64  # noqa: E402
import re  # noqa: E402
from collections.abc import Iterable, Sequence  # noqa: E402
from datetime import date  # noqa: E402
from html import escape  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

from vision_r1_recipes import preflight  # noqa: E402
from vision_r1_recipes.evaluate import (  # noqa: E402
    PROMPTS,
    REFLECTION,
    bucket_name,
    differing_settings,
    interval,
    paired_difference,
    per_question,
    percent,
)
from vision_r1_recipes.ptst import num_rollouts  # noqa: E402
from vision_r1_recipes.recipe import RecipeError  # noqa: E402
from vision_r1_recipes.results import Evaluation, Run, buckets, by_label, link, load, read_json  # noqa: E402


SPENT = {"rollouts": "{:g} rollouts", "tokens": "{:,.0f} sampled tokens", "minutes": "{:.3g} minutes"}
TOKENS = (("mean_tokens", ".1f"), ("median_tokens", "g"))
VERSIONS = ("trl", "transformers", "torch")
TOKEN_IDS = ("suppress_tokens", "eos_token_id", "pad_token_id", "bos_token_id")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 0 1rem 3rem; color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem }
img { max-width: 100%; height: auto } .table { overflow-x: auto; margin: 1.5rem 0 }
table { border-collapse: collapse; font-size: .85rem; white-space: nowrap }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; white-space: normal;
  min-width: 7.5rem; padding-left: 0 }
"""


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


def spread(values: Iterable[float | None], form: str = ".1f") -> str:
    """Mean, and from two values on the standard deviation (of a sample)."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    if not known:
        return "-"
    deviation = f" ± {np.std(known, ddof=1):{form.removeprefix('+')}}" if len(known) > 1 else ""
    return f"{np.mean(known):{form}}{deviation}"


def main_table(evaluations: Sequence[Evaluation]) -> str:
    header = ("Model", "Accuracy %", "Mean tokens", "95 %", "HFRRF %", "Format %", "Median", "Truncated %", "Seeds")
    rows = []
    for label, group in by_label(evaluations).items():
        summaries = [e.summary for e in group]
        questions = pooled(group)
        error = np.std(questions["correct"]) / np.sqrt(len(questions)) if questions is not None else None
        accuracy, *shares, truncated = (
            spread(100 * s[key] for s in summaries) for key in ("accuracy", "hfrrf", "format_rate", "truncated")
        )
        mean, median = (spread((s[key] for s in summaries), form) for key, form in TOKENS)
        half = "-" if error is None else f"± {percent(interval(error, len(questions)))}"
        rest = (truncated, len(group), "-" if questions is None else len(questions))
        rows.append((label, accuracy, mean, half, *shares, median, *rest))
    return table((*header, "Questions"), rows)


def pooled(group: Sequence[Evaluation]) -> pd.DataFrame | None:
    """
    The questions of all seeds: each once with its mean when the seeds were asked the same, else all of them. `None`
    when the samples of one are gone.
    """
    if any(e.samples is None for e in group):
        return None
    first, *others = frames = [per_question(e.samples) for e in group]
    keys = first.columns.drop("correct")
    if any(not frame[keys].equals(first[keys]) for frame in others):
        return pd.concat(frames)
    return first.assign(correct=np.mean([frame["correct"] for frame in frames], axis=0))


def difference_table(evaluations: Sequence[Evaluation], baseline: str) -> tuple[str, list[str]]:
    """Accuracy and length of each model minus the baseline's at the same seed, and notes on what has no pair."""
    groups = by_label(evaluations)
    rows, notes = [], []
    for label, group in groups.items():
        if label == baseline:
            continue
        try:
            pairs = _pairs(group, groups[baseline])
            ours, theirs = (pooled([pair[i] for pair in pairs]) for i in (0, 1))
            if ours is None or theirs is None:
                raise ValueError("samples.parquet is missing.")
            low, high = (100 * x for x in paired_difference(ours, theirs)[1:])
        except ValueError as error:
            notes.append(f"{label} minus {baseline}: {error}")
            continue
        each = [100 * (a.summary["accuracy"] - b.summary["accuracy"]) for a, b in pairs]
        tokens = [a.summary["mean_tokens"] - b.summary["mean_tokens"] for a, b in pairs]
        rows.append((label, spread(each, "+.1f"), spread(tokens, "+.1f"), f"[{low:+.1f}, {high:+.1f}]", len(pairs)))
    header = (f"Minus {baseline}", "Accuracy, points", "Mean tokens", "95 %, accuracy", "Seeds")
    return table(header, rows) if rows else "", notes


def _pairs(ours: Sequence[Evaluation], theirs: Sequence[Evaluation]) -> list[tuple[Evaluation, Evaluation]]:
    """Pairs of one seed; a model that was not trained here has no seed and is one of every pair."""
    for group, others in ((ours, theirs), (theirs, ours)):
        if len(group) == 1 and group[0].seed is None:
            return [(e, group[0]) if group is theirs else (group[0], e) for e in others]
    seeds = {e.seed: e for e in theirs}
    if None in seeds or len(seeds) < len(theirs) or len({e.seed for e in ours}) < len(ours):
        raise ValueError("two evaluations of one label have the same seed or none: they can't be paired.")
    pairs = [(e, seeds[e.seed]) for e in ours if e.seed in seeds]
    if not pairs:
        raise ValueError("no seed in common.")
    return pairs


def length_table(evaluations: Sequence[Evaluation]) -> str:
    names = list(dict.fromkeys(bucket_name(b) for e in evaluations for b in e.summary["by_length"]))
    rows = []
    for label, group in by_label(evaluations).items():
        found = buckets(group)
        cells = (f"{percent(found[n][0])} of {found[n][1]}" if n in found else "" for n in names)
        rows.append((label, *cells))
    return table(("Accuracy % by tokens", *names), rows)


def reflection_table(evaluations: Sequence[Evaluation]) -> str:
    rows = []
    for label, group in by_label(evaluations).items():
        words = [[e.summary["reflection"][word] for e in group] for word in (*REFLECTION, "any")]
        rates = [np.mean([[w["per_1000_tokens"], w["share"]] for w in of_word], axis=0) for of_word in words]
        rows.append((label, *(f"{rate:.1f} ({percent(share)} %)" for rate, share in rates)))
    return table(("Per 1,000 tokens (in % of completions)", *REFLECTION, "any"), rows)


def run_table(runs: Sequence[Run]) -> str:
    def ends(group: Sequence[Run], key: str, form: str, scale: float = 1) -> str:
        columns = [scale * run.column(key) for run in group]
        tenths = [(c[: max(1, len(c) // 10)].mean(), c[-max(1, len(c) // 10) :].mean()) for c in columns]
        return " → ".join(f"{mean:{form}}" for mean in np.mean(tenths, axis=0)).replace("nan", "-")

    header = ("Run", "Stages (cap x group: rollouts)", "Rollouts", "Reward", "Accuracy %", "Mean tokens", "Clipped %")
    rows = []
    for label, group in by_label(runs).items():
        stages, total = group[0].stages, num_rollouts(group[0].stages)
        done = sorted({run.rows[-1]["rollout"] for run in group})
        rows.append(
            (
                label,
                ", ".join(f"{s.max_completion_length} x {s.num_generations}: {s.steps}" for s in stages) or "?",
                f"{' to '.join(f'{d:g}' for d in dict.fromkeys((done[0], done[-1])))} of {total or '?'}",
                ends(group, "reward", ".2f"),
                ends(group, "accuracy_rate", ".1f", 100),
                ends(group, "completions/mean_length", ".1f"),
                ends(group, "completions/clipped_ratio", ".1f", 100),
                spread((run.spent("tokens")[-1] / 1e6 for run in group), ".3g"),
                spread((run.spent("minutes")[-1] for run in group), ".3g"),
            )
        )
    return table((*header, "Tokens, millions", "Minutes"), rows)


def budget_table(runs: Sequence[Run]) -> str:
    """Held-out accuracy in training where all runs have spent the same; empty without such evaluations. A run that
    others go on from is no end point and is left out."""
    passed = {id(run.parent) for run in runs}
    groups = by_label(run for run in runs if run.evaluations and id(run) not in passed)
    listed = [run for group in groups.values() for run in group if np.isfinite(run.spent("tokens")[-1])]
    if len(groups) < 2 or not listed:
        return ""
    budgets = {what: min(run.held_out(what)[0][-1] for run in listed) for what in SPENT}
    rows = []
    for label, group in groups.items():
        cells = []
        for what, budget in budgets.items():
            curves = [run.held_out(what) for run in group]
            cells.append(spread(100 * np.interp(budget, at, y) for at, y in curves if at[0] <= budget <= at[-1]))
        rows.append((label, *cells, len(group)))
    names = (SPENT[what].format(budget) for what, budget in budgets.items())
    return table(("Held-out accuracy % at the same", *names, "Seeds"), rows)


# The report


def write(
    runs: list[Run],
    evaluations: list[Evaluation],
    notes: list[str],
    output_dir: Path,
    baseline: str | None = None,
    title: str = "Report",
) -> str:
    """Write `report.html`, `report.md` and the figures into `output_dir`; returns the main tables as text."""
    from . import figures

    labels = list(dict.fromkeys(e.label for e in evaluations))
    if evaluations and baseline not in (None, *labels):
        raise RecipeError(f"`--baseline`: {baseline!r} is none of the evaluations: {', '.join(labels)}.")
    link(runs)
    output_dir.mkdir(parents=True, exist_ok=True)
    drawn, more = figures.draw(runs, evaluations, output_dir)
    notes, main, sections = notes + more, [], []
    if evaluations:
        differences, not_compared = difference_table(evaluations, baseline or labels[0])
        main += [main_table(evaluations), differences]
        notes += not_compared + _notes_on_settings(evaluations)
    else:
        notes.append("no evaluations given: no accuracy table.")
    if runs:
        sections += [
            ("Length", "", drawn["length"]),
            ("Accuracy in training", "", drawn["accuracy"]),
            ("Held-out accuracy in training", budget_table(runs), drawn["held_out"]),
        ]
    else:
        notes.append("no GRPO runs given: no curves.")
    sections.append(("Tokens spent", "", drawn["tokens"]))
    if evaluations:
        sections += [
            ("Accuracy by length", length_table(evaluations), drawn["buckets"]),
            ("Self-reflection", reflection_table(evaluations), drawn["reflection"]),
        ]
    if runs:
        sections.append(("Runs", f"Means of the first and of the last tenth of the log.\n\n{run_table(runs)}", ""))
    listed = "\n".join(f"- {note}" for note in notes)
    parts = [f"# {title}", _provenance(runs, evaluations), *main]
    for heading, text, figure in sections:
        if text or figure:
            parts += [f"## {heading}", text, f"![{heading}]({figure})" if figure else ""]
    parts += ["## Notes", listed] if notes else []
    text = "\n\n".join(filter(None, parts)) + "\n"
    (output_dir / "report.md").write_text(text)
    (output_dir / "report.html").write_text(html(text, title, output_dir))
    return "\n\n".join(filter(None, [*main, listed]))


def html(text: str, title: str, folder: Path) -> str:
    """Markdown as one page that needs nothing beside it: the figures are in it."""
    from markdown import markdown

    body = markdown(text, extensions=["tables"])
    body = body.replace("<table>", '<div class="table"><table>').replace("</table>", "</table></div>")

    def embedded(match: re.Match) -> str:
        return f'src="data:image/png;base64,{base64.b64encode((folder / match[1]).read_bytes()).decode()}"'

    body = re.sub(r'src="(\w+\.png)"', embedded, body)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    page = f"<!doctype html>\n<html lang=en>\n<head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>"
    return f"{page}\n<body>\n{body}\n</body>\n</html>\n"


def _provenance(runs: Sequence[Run], evaluations: Sequence[Evaluation]) -> str:
    """Seeds, versions and date in one sentence."""
    seeds = sorted({item.seed for item in (*runs, *evaluations) if item.seed is not None})
    kept = [e.summary["environment"] for e in evaluations if "environment" in e.summary]
    for run in runs:
        kept += filter(None, [read_json(run.path / "environment.json")])
    versions = {f"{name} {env['packages'][name]}" for env in kept for name in VERSIONS if env["packages"].get(name)}
    versions |= {f"commit {env['git_commit'][:7]}" for env in kept if env.get("git_commit")}
    parts = [f"seeds {', '.join(map(str, seeds))}" if seeds else "", ", ".join(sorted(versions))]
    return "; ".join(filter(None, [date.today().isoformat(), *parts])) + "."


def _notes_on_settings(evaluations: Sequence[Evaluation]) -> list[str]:
    first = evaluations[0].summary
    sampling = ", ".join(
        f"{key} {first['sampling'][key]}" for key in ("temperature", "top_p", "max_new_tokens", "seed")
    )
    n = first.get("samples_per_question", 1)
    each = "one sample" if n == 1 else f"{n} samples"
    notes = [f"evaluated on {first['data']['path']}, split {first['data']['split']}, {each} each: {sampling}."]
    if any(len(group) > 1 for group in by_label(evaluations).values()):
        notes.append(
            "± is the standard deviation over seeds; the 95 % are of the drawn questions, over the seeds given, and "
            "do not cover what another seed would train."
        )
    for label, group in by_label(evaluations).items():
        found = {}
        for e in group:
            # Each seed of a toy world has data and a tokenizer of its own.
            own = {*TOKEN_IDS, *(("path", PROMPTS) if e.seed != evaluations[0].seed else ())}
            found |= {k: said for k, said in differing_settings(e.summary, first).items() if k not in own}
        if found:
            notes.append(f"{label} differs from {evaluations[0].label} in: {', '.join(found.values())}.")
    return notes


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
    parser.add_argument("--title", default="Report")
    args = parser.parse_args(argv)
    check_installed()
    runs, evaluations, notes = load([*args.runs, *args.evals])
    if not runs and not evaluations:
        raise RecipeError("nothing to report: name folders of runs or evaluations." + "".join(f"\n{n}" for n in notes))
    print(write(runs, evaluations, notes, args.output_dir, args.baseline, args.title))
    print(f"\nwritten to {args.output_dir}/: report.html, report.md and the figures")


def check_installed() -> None:
    """Raise [`RecipeError`] when what only the report needs is not installed."""
    for name in ("matplotlib", "markdown"):
        if find_spec(name) is None:
            raise RecipeError(f"{name} is missing: pip install 'vision-r1-recipes[report]'.")


if __name__ == "__main__":
    with preflight.kind_errors():
        main()
