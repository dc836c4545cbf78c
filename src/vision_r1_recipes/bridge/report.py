"""Reports of a bridge run: what each filter did, and one row through all steps."""

from __future__ import annotations

import textwrap
from itertools import islice
from typing import Any

from ..recipe import RecipeError
from ..report import html
from .dataset import Statistics, card, judge, outcomes, write
from .journal import Journal, merged
from .rows import Sources
from .run import Run, ask
from .steps import DUPLICATE, UNANSWERED, Generation


def execute(run: Run) -> None:
    """Run a recipe here to its end: requests, dataset, report."""
    write_all(run, ask(run))


def write_all(run: Run, sources: Sources) -> None:
    """Write the dataset and the report of a run whose rows have all come to their end."""
    statistics, text = write(run, sources)
    _write_report(run, text)
    dropped = "\n".join(f"  {n} dropped: {rule}" for rule, n in statistics.rules.most_common())
    print(f"{statistics.kept} of {statistics.total} rows kept\n{dropped}".rstrip())
    if statistics.rules[UNANSWERED]:
        print(f"run the same command again to ask for the {statistics.rules[UNANSWERED]} without a response once more")
    if not statistics.kept:
        raise RecipeError(
            f"no row was kept: see {run.folder}/report.html, and `bridge show {run.folder} ID` for a row."
        )
    print(f"written to {run.folder}/: dataset/, rejected.jsonl, report.html. Train on it with")
    print(f"  --datasets '[{{path: {run.folder}/dataset}}]'")


def report(run: Run) -> None:
    """Write `report.md` and `report.html` into the run's folder; works while the run is going on."""
    sources, statistics = Sources(run.config.datasets), Statistics()
    with run.journals() as journals:
        for made, row, _ in outcomes(run, sources, journals):
            statistics.add(made, row)
        text = card(run, statistics, [journal.requests() for journal in journals])
    if statistics.total < len(sources):
        text += f"\n{len(sources) - statistics.total} of {len(sources)} rows have not come to their end yet.\n"
    _write_report(run, text)


def _write_report(run: Run, text: str) -> None:
    (run.folder / "report.md").write_text(text, encoding="utf-8")
    (run.folder / "report.html").write_text(html(text, f"Bridge: {run.folder.name}", run.folder), encoding="utf-8")


def show(run: Run, key: str) -> str:
    """One row: question, answer, what each step was asked and wrote, and what became of it."""
    sources = Sources(run.config.datasets)
    with run.journals() as journals:
        found = [(entry, journal) for entry, journal in merged(journals) if entry["id"] == key]
        if not found:
            near = ", ".join(entry["id"] for entry, _ in islice(merged(journals), 3))
            raise RecipeError(f"{key!r} is no id of {run.folder}; for example {near}.")
        for entry, _ in found[1:]:
            entry |= {"rule": DUPLICATE, "detail": ""}
        return "\n\n".join(_walk(run, sources, entry, journal) for entry, journal in found)


def _walk(run: Run, sources: Sources, entry: dict[str, Any], journal: Journal) -> str:
    row = sources[entry["position"]]
    parts = [f"{row.id} (row {row.position} of {row.source})", f"question: {row.question}", f"answer: {row.answer}"]
    parts += [f"picture: {image['path'] or 'embedded'}" for image in row.images]
    made: dict[str, Generation] = {}
    for step in run.prompts.templates:
        if (generation := journal.get(row.position, step)) is None:
            break
        content = run.prompts.render(step, row, made)[0]["content"]
        asked = content if isinstance(content, str) else content[-1]["text"]
        made[step] = generation
        parts.append(f"--- {step}: asked\n{_indented(asked)}")
        if generation.reasoning:
            parts.append(f"--- {step}: reasoning\n{_indented(generation.reasoning)}")
        tokens = f"{generation.prompt_tokens} + {generation.completion_tokens} tokens, {generation.finish_reason}"
        parts.append(f"--- {step}: answered ({tokens})\n{_indented(generation.text)}")
    judged = judge(run, sources, entry, journal)
    if judged is None:
        parts.append(f"--- not at its end yet: {len(made)} of {len(run.prompts.templates)} steps answered")
    elif judged[0].rule:
        parts.append(f"--- dropped: {judged[0].rule}" + (f" ({judged[0].detail})" if judged[0].detail else ""))
    else:
        parts += [f"--- mended: {repair}" for repair in judged[0].repairs]
        parts.append(f"--- kept\n{_indented(judged[0].completion)}")
    return "\n".join(parts)


def _indented(text: str) -> str:
    return textwrap.indent(text, "  ")
