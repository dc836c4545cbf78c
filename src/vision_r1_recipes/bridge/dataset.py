"""The outcome of a run: a dataset for `cold_start.yaml`, what was rejected, and the dataset's card."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from ..data import MARKER
from ..evaluate import REFLECTION
from ..recipe import RecipeError
from ..report import table
from .journal import Journal, check_same, merged
from .rows import Sources
from .rules import finish
from .run import Run
from .steps import DUPLICATE, STEPS, Rejected, Row


SHARD = 1000  # rows of a parquet file
FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "conversations": List({"from": Value("string"), "value": Value("string")}),
        "answer": Value("string"),
        "source": Value("string"),
        "pseudo_cot": Value("string"),
        "description": Value("string"),
        "repairs": List(Value("string")),
    }
)
REJECTED = ("id", "source", "rule", "detail")
# Total counts, the paper's table [paper].
PUBLISHED = {
    "LLaVA-CoT-100K": {"wait": 2300, "hmm": 1, "mistake": 183, "alternatively": 251, "check": 8332},
    "Mulberry-260K": {"wait": 1122, "hmm": 0, "mistake": 8784, "alternatively": 68, "check": 26421},
    "Vision-R1-cold": {"wait": 585719, "hmm": 75853, "mistake": 26697, "alternatively": 188187, "check": 100148},
}
NUM_ROWS = {"LLaVA-CoT-100K": 100_000, "Mulberry-260K": 260_000, "Vision-R1-cold": 260_994}
BINS = (0, 50, 100, 200, 500, 1000, 2000, 5000, 10000)  # words


@dataclass
class Outcome:
    """What became of one row: a `completion` with its `repairs`, or the `rule` that rejected it."""

    position: int
    id: str
    source: str
    completion: str | None = None
    repairs: list[str] = field(default_factory=list)
    rule: str | None = None
    detail: str = ""


def judge(run: Run, sources: Sources, entry: dict[str, Any], journal: Journal) -> tuple[Outcome, Row | None] | None:
    """
    What the rules, as they are now, make of one entry of a journal, and its row if it was read; `None` before its end.
    """
    made = Outcome(entry["position"], entry["id"], entry["source"], rule=entry["rule"], detail=entry["detail"])
    if made.rule is not None:
        return made, None
    generation = journal.get(made.position, STEPS[-1])
    if generation is None:
        return None
    row = sources[made.position]
    check_same(row, made.id, entry["digest"])
    try:
        made.completion, made.repairs = finish(row, generation, run.rules)
    except Rejected as rejected:
        made.rule, made.detail = rejected.rule, rejected.detail
    return made, row


def outcomes(run: Run, sources: Sources, journals: list[Journal]) -> Iterator[tuple[Outcome, Row | None, Journal]]:
    """Every row that has come to its end, in order; kept ones with their row."""
    seen: set[str] = set()
    for entry, journal in merged(journals):
        if len(journals) > 1:  # ranks don't know each other's ids
            if entry["id"] in seen:
                entry = {**entry, "rule": DUPLICATE, "detail": ""}
            seen.add(entry["id"])
        if judged := judge(run, sources, entry, journal):
            yield *judged, journal


class Statistics:
    """Counts over outcomes, in constant memory."""

    def __init__(self):
        self.rules, self.sources, self.words = Counter(), Counter(), Counter()
        self.kept = self.repaired = 0
        self.lengths = np.zeros(len(BINS), int)
        self.samples: list[tuple[str, str, str]] = []

    def add(self, made: Outcome, row: Row | None) -> None:
        self.sources[made.source] += 1
        if made.rule is not None:
            self.rules[made.rule] += 1
            return
        self.kept += 1
        self.repaired += bool(made.repairs)
        for word, pattern in REFLECTION.items():
            self.words[word] += len(re.findall(pattern, made.completion, re.I))
        self.lengths[np.searchsorted(BINS, len(made.completion.split()), "right") - 1] += 1
        if len(self.samples) < 3:
            self.samples.append((made.id, row.question, made.completion))

    @property
    def total(self) -> int:
        return self.kept + sum(self.rules.values())


def write(run: Run, sources: Sources) -> tuple[Statistics, str]:
    """
    Write `dataset/` (parquet shards, pictures inside, and the card), `rejected.jsonl` and, where the recipe asks for
    them, the released JSON schemas with their image folders in `json/`. What was there before is replaced at the end;
    there is no `dataset/` without a row. Returns the counts and the card's text.
    """
    draft, statistics = run.folder / "draft", Statistics()
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "dataset" / "data").mkdir(parents=True)
    kept: list[dict[str, Any]] = []
    shards = 0
    with (
        _Json(draft, run.config.formats) as json_files,
        (draft / "rejected.jsonl").open("w", encoding="utf-8") as rejected,
        run.journals() as journals,
    ):
        for made, row, journal in outcomes(run, sources, journals):
            statistics.add(made, row)
            if made.rule is not None:
                entry = {name: getattr(made, name) for name in REJECTED}
                rejected.write(json.dumps(entry, ensure_ascii=False) + "\n")
                continue
            conversations = [
                {"from": "user", "value": MARKER * len(row.images) + row.question},
                {"from": "assistant", "value": made.completion},
            ]
            json_files.add(row, conversations)
            before = {s: g.text if (g := journal.get(row.position, s)) else None for s in STEPS[:-1]}
            kept.append(
                {"id": row.id, "images": row.images, "conversations": conversations, "answer": row.answer}
                | {"source": row.source, "repairs": made.repairs, **before}
            )
            if len(kept) == SHARD:
                shards = _shard(draft, shards, kept)
        if kept:
            shards = _shard(draft, shards, kept)
        requests = [journal.requests() for journal in journals]
    if statistics.total != len(sources):
        raise RecipeError(
            f"{len(sources)} rows in the sources, {statistics.total} have come to their end: run the command again."
        )
    text = card(run, statistics, requests)
    (draft / "dataset" / "README.md").write_text(front_matter(statistics) + text, encoding="utf-8")
    if not shards:
        shutil.rmtree(draft / "dataset")
    for made in ("dataset", "json", "rejected.jsonl"):
        old = run.folder / made
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        if (draft / made).exists():
            (draft / made).rename(old)
    draft.rmdir()
    return statistics, text


def _shard(draft: Path, number: int, rows: list[dict[str, Any]]) -> int:
    path = draft / "dataset" / "data" / f"train-{number:05d}.parquet"
    embedded = [
        {**row, "images": [{**i, "bytes": _bytes(i), "path": Path(i["path"] or "").name} for i in row["images"]]}
        for row in rows
    ]
    columns = {name: [row[name] for row in embedded] for name in FEATURES}
    Dataset.from_dict(columns, features=FEATURES).to_parquet(path)
    rows.clear()
    return number + 1


def _bytes(image: dict[str, Any]) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


JSON = {  # schema: file and folder of pictures [repo]
    "llava_cot": ("vision_r1_llava_cot_full.json", "llava_cot_images"),
    "mulberry": ("vision_r1_mulberry_sft_full.json", "mulberry_images"),
}


class _Json:
    """Both released schemas `[repo]`, written row by row."""

    def __init__(self, draft: Path, formats: list[str]):
        self.folder, self.formats = draft / "json", formats
        self.files: dict[str, Any] = {}

    def __enter__(self) -> _Json:
        for name in self.formats:
            (self.folder / JSON[name][1]).mkdir(parents=True)
            self.files[name] = (self.folder / JSON[name][0]).open("w", encoding="utf-8")
        return self

    def add(self, row: Row, conversations: list[dict[str, str]]) -> None:
        for name, file in self.files.items():
            paths = []
            for i, image in enumerate(row.images):
                data = _bytes(image)
                with PILImage.open(io.BytesIO(data)) as picture:
                    suffix = picture.format.lower()
                paths.append(f"{JSON[name][1]}/{row.position:07d}-{i}.{suffix}")
                (self.folder / paths[-1]).write_bytes(data)
            images = paths[0] if len(paths) == 1 else paths
            if name == "llava_cot":
                roles = {"user": "human", "assistant": "gpt"}
                turns = [{"from": roles[turn["from"]], "value": turn["value"]} for turn in conversations]
                entry = {"id": row.id, "image": images, "conversations": turns}
            else:
                entry = {"images": images, "conversations": conversations}
            file.write(("[\n" if file.tell() == 0 else ",\n") + json.dumps(entry, ensure_ascii=False))

    def __exit__(self, *error: Any) -> None:
        for file in self.files.values():
            file.write("[\n]\n" if file.tell() == 0 else "\n]\n")
            file.close()


# The card


def front_matter(statistics: Statistics) -> str:
    sizes = [("n<1K", 1_000), ("1K<n<10K", 10_000), ("10K<n<100K", 100_000), ("100K<n<1M", 1_000_000)]
    size = next((name for name, limit in sizes if statistics.kept < limit), "n>1M")
    values = {
        "task_categories": ["image-text-to-text"],
        "size_categories": [size],
        "tags": ["multimodal-reasoning", "chain-of-thought", "modality-bridging"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n\n"


def card(run: Run, statistics: Statistics, requests: list[dict[str, dict[str, float]]]) -> str:
    """The dataset card and the report's text, in Markdown."""
    total, kept = statistics.total, statistics.kept
    steps = [step for step in STEPS if step in run.prompts.templates]
    models = [
        (
            step,
            e.model,
            f"temperature {e.temperature:g}, top_p {e.top_p:g}, max_tokens {e.max_tokens}",
            run.prompts.hashes[step],
        )
        for step in steps
        for e in [run.endpoints[run.endpoint(step)]]
    ]
    used = []
    for step in steps:
        found = [each[step] for each in requests if step in each]
        sums = [
            sum(each[key] for each in found) for key in ("responses", "prompt_tokens", "completion_tokens", "seconds")
        ]
        used.append((step, *(f"{x:,.0f}" for x in sums[:3]), f"{sums[3] / max(1, sums[0]):.2f}"))
    share = f"{kept / max(1, total):.1%}"
    words = [(name, *(f"{counts[w] / NUM_ROWS[name]:.3f}" for w in REFLECTION)) for name, counts in PUBLISHED.items()]
    words.append(("**this set**", *(f"{statistics.words[w] / max(1, kept):.3f}" for w in REFLECTION)))
    totals = [("total here", *(f"{statistics.words[w]:,}" for w in REFLECTION))]
    most = max(1, statistics.lengths.max())
    names = [f"{a}-{b - 1}" for a, b in pairwise(BINS)] + [f"{BINS[-1]} and more"]
    histogram = [
        (name, count, "█" * round(30 * count / most)) for name, count in zip(names, statistics.lengths, strict=True)
    ]
    parts = [
        f"# {run.folder.name}: a cold start by modality bridging",
        f"{kept:,} of {total:,} rows ({share}), {statistics.repaired:,} of them with words replaced. Made on "
        f"{date.today().isoformat()} with vision-r1-recipes, after Vision-R1 (arXiv 2503.06749).",
        "## Sources",
        table(("Source", "Rows"), [(name, f"{count:,}") for name, count in statistics.sources.items()]),
        "## Models and prompts",
        table(("Step", "Model", "Sampling", "Prompt (SHA-256)"), models),
        "The reasoner was told the answer." if run.config.show_answer else "The reasoner was not told the answer.",
        "" if "pseudo_cot" in steps else "Without a pseudo-CoT: the description is a caption.",
        table(("Step", "Responses", "Prompt tokens", "Completion tokens", "Seconds each"), used),
        "## What was dropped, and why",
        table(
            ("Rule", "Rows", "%"),
            [(rule, f"{n:,}", f"{n / max(1, total):.1%}") for rule, n in statistics.rules.most_common()]
            + [("kept", f"{kept:,}", share)],
        ),
        "## Self-reflection words per row",
        table(("Set", *REFLECTION), words + totals),
        "The published totals [paper] are divided by 100,000, 260,000 and 260,994 rows.",
        "## Length of the completions, in words",
        table(("Words", "Rows", " "), histogram),
        "## Samples",
        *(f"**{name}**\n\n> {question}\n\n```text\n{text}\n```" for name, question, text in statistics.samples),
    ]
    parts += ["## Prompts", *(f"{step}:\n\n```text\n{run.prompts.sources[step].strip()}\n```" for step in steps)]
    return "\n\n".join(filter(None, parts)) + "\n"
