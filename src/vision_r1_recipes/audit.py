"""
What is wrong with a recipe's data, before GPUs start.

```shell
python -m vision_r1_recipes.data audit RECIPE [--against PATH[:SPLIT] ...] [--allow "near duplicate=0.02" ...]
```

Rows go through the checks of the training itself, then their pictures and texts are held against each other. Findings,
of which a row may have several:

- the reasons for which the training would drop it (`data.py`);
- `never rewarded in stage 1`: the tags, the gold answer and the shortest plausible reasoning exceed that stage's cap;
- `exact duplicate` of a row before it: same pixels, same text (letter case and blanks aside);
- `conflicting answers`: the same question with the same pixels has another answer elsewhere in the set;
- `near duplicate` of a row before it: near pictures, near text, the same numbers in it and the same answer;
- `leaked`: in the training set and in another one (`eval_datasets`, `--against`): near pictures, and near texts or one
  within the other;
- `shared picture`: only the picture is in another set; allowed unless `--allow` says otherwise;
- `suspicious answer`: see `rewards check`; allowed too.

Pictures are near when their perceptual hashes agree in one of four parts and in all but 8 of 64 bits, and small copies
of them (32 x 32 grey, 8 x 8 in colour) differ nowhere by more than 12 of 255: another compression or size, or a small
label changed, but no crop and no rotation. Texts are near when 70 % of their 5-grams of characters are common.

`--against` takes any layout of ours and the files of MathVista, MathVerse, DynaMath and MM-Math. Writes `audit.md`,
`audit.html`, `audit.json` and `findings.parquet` (every flagged row) into `runs/audit/RECIPE`. Exit code 1 when a
finding has a greater share of its set than allowed, 2 when the recipe or a file can't be read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import imagehash
import matplotlib
import numpy as np
import pandas as pd
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from PIL import Image as PILImage
from transformers import ProcessorMixin

from . import data, golds
from .data import Drop
from .grading import POOL, grade
from .recipe import RecipeError
from .report import html, table
from .rewards import parse_format


matplotlib.use("Agg")
import matplotlib.pyplot as plt


TRAIN, EVAL, AGAINST = "datasets", "eval_datasets", "against"
NEVER = "never rewarded in stage 1"
EXACT, CONFLICT, NEAR = "exact duplicate", "conflicting answers", "near duplicate"
LEAKED, SHARED, SUSPICIOUS = "leaked", "shared picture", "suspicious answer"
UNUSABLE, UNREADABLE = "unusable", "can't be compared"
# Greatest share of a set's rows; what the training drops has `max_dropped_share`.
ALLOWED = {NEVER: 0.01, EXACT: 0.01, CONFLICT: 0.0, NEAR: 0.05, LEAKED: 0.0, UNREADABLE: 0.0}
ALLOWED |= {SHARED: 1.0, SUSPICIOUS: 1.0}
BITS, DIFFERENCE, COMMON, GRAM = 8, 12, 0.7, 5
WINDOW = 500  # of pictures with a part of the hash in common, this many neighbours are compared
IMAGES = ("decoded_image", "images", "image", "file_name")  # columns of other sets, the first that there is
SHORTEST_REASONING = 16  # tokens
LIMITS = ("max_prompt_length", "max_length", "min_pixels", "max_pixels")
_LOOK = Features(
    {"pixels": Value("string"), "phash": Value("string"), "small": Value("binary"), "area": List(Value("int64"))}
)


def audit(
    values: Mapping[str, Any],
    against: Sequence[str] = (),
    processor: str | None = None,
    shortest_reasoning: int = SHORTEST_REASONING,
    num_proc: int | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame, Counter]:
    """
    Look at all rows of a recipe.

    Args:
        values (`dict`): The recipe, resolved.
        against (`list[str]`, *optional*): Other sets, `PATH` or `PATH:SPLIT`, that the training set must not have.
        processor (`str`, *optional*): Folder or Hub id. Defaults to the recipe's model.
        shortest_reasoning (`int`, *optional*, defaults to `16`): Tokens between the `<think>` tags.
        num_proc (`int`, *optional*): Processes; defaults to the recipe's.

    Returns:
        The rows that can be read (`set`, `source`, `id`, `question`, `answer`, `kind`, `tokens`, `area` in pixels),
        the findings (`set`, `source`, `id`, `finding`, `detail`), and how many rows each set has.

    Raises:
        `RecipeError`: the processor or a source can't be read.
    """
    kind = "rl" if values.keys() & {"stages", "prompts_per_rollout", "reward"} else "sft"
    limit = values.get("max_prompt_length" if kind == "rl" else "max_length")
    loaded = data.load_processor(
        processor or values["model_name_or_path"], values.get("min_pixels"), values.get("max_pixels")
    )
    num_proc = num_proc or values.get("num_proc")
    frames, findings, totals = [], [], Counter()
    for name in (TRAIN, EVAL):
        sources = values.get(name) or []
        options = {"system_prompt": values.get("system_prompt"), "num_proc": num_proc, "name": name}
        parts = data.check_rows(sources, kind, loaded, **options) if sources else []
        for source, part in zip(sources, parts, strict=True):
            totals[name] += len(part)
            frames.append(_converted(name, source["path"], part, kind, num_proc))
            for row in part.remove_columns("images"):
                where = {"set": name, "source": source["path"], "id": row["id"]}
                reason, detail = row["dropped"], row["detail"]
                if not reason and limit is not None and row["tokens"] > limit:
                    reason, detail = "too many tokens", f"{row['tokens']} tokens, the limit is {limit}"
                if reason:
                    findings.append({**where, "finding": reason, "detail": detail})
    for place in against:
        path, _, split = place.partition(":") if not Path(place).exists() else (place, "", "")
        frame, problems = _benchmark(path, split, num_proc)
        totals[AGAINST] += len(frame) + len(problems)
        frames.append(frame)
        findings += problems
    rows = pd.concat(frames, ignore_index=True)
    findings += _on_answers(rows, loaded, values, kind, shortest_reasoning)
    findings += _on_pairs(rows)
    shown = rows.drop(columns=["pixels", "phash", "small"])
    return shown, pd.DataFrame(findings, columns=["set", "source", "id", "finding", "detail"]), totals


# Reading


def _converted(name: str, source: str, part: Dataset, kind: str, num_proc: int | None) -> pd.DataFrame:
    """The usable rows of a checked source."""
    part = part.filter(lambda reason: not reason, input_columns="dropped")
    looks = part.select_columns("images").map(_look, features=_LOOK, remove_columns="images", num_proc=num_proc)
    rows = part.remove_columns("images")
    if kind == "rl":
        answers = rows["solution"][:]
    else:
        answers = [parse_format(turns[0]["content"][0]["text"]) or "" for turns in rows["completion"]]
    frame = pd.DataFrame({"id": rows["id"][:], "answer": answers, "tokens": rows["tokens"][:]})
    frame["question"] = [data.question_of(prompt) for prompt in rows["prompt"]]
    return _with_looks(frame, looks).assign(set=name, source=source)


def _with_looks(frame: pd.DataFrame, looks: Dataset) -> pd.DataFrame:
    return frame.assign(**{column: looks[column][:] for column in _LOOK})


def _look(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of a row's pictures."""
    digest, small, area, phash = hashlib.blake2b(digest_size=12), b"", [], None
    for image in row["images"]:
        picture = data.open_picture(image).convert("RGB")
        digest.update(f"{picture.size}".encode() + picture.tobytes())
        phash = str(imagehash.phash(picture)) if phash is None else phash
        for mode, side in (("L", 32), ("RGB", 8)):
            small += picture.convert(mode).resize((side, side), PILImage.Resampling.BILINEAR).tobytes()
        area.append(picture.width * picture.height)
    return {"pixels": digest.hexdigest(), "phash": phash or "0", "small": small, "area": area}


def _benchmark(path: str, split: str, num_proc: int | None) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """The rows of a set that is not trained on, and findings on those that can't be compared."""
    files = [path]
    if Path(path).is_dir() and not split:
        files = sorted(str(file) for file in Path(path).rglob("*") if file.suffix in data.BUILDERS)
    split = {"split": split} if split else {}
    rows = concatenate_datasets([data.open_source({"path": file, **split}, AGAINST) for file in files or [path]])
    columns = set(rows.column_names)
    question = next((name for name in ("question", "problem", "prompt") if name in columns), None)
    images = next((name for name in IMAGES if name in columns), None)
    if question is None or images is None:
        known = f"question, problem or prompt, and {', '.join(IMAGES[:-1])} or {IMAGES[-1]}"
        raise RecipeError(f"against: {path} has the columns {', '.join(sorted(columns))}; needed are {known}.")
    feature = rows.features[images]
    if isinstance(feature, Image):
        rows = rows.cast_column(images, Image(decode=False))
    elif isinstance(feature, List) and isinstance(feature.feature, Image):
        rows = rows.cast_column(images, List(Image(decode=False)))
    ids = next((name for name in ("id", "pid", "sample_index") if name in columns), None)
    names = [str(key) for key in rows[ids]] if ids else [f"row {i}" for i in range(len(rows))]
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if images == "file_name":  # of MM-Math: somewhere below
        places = {file.name: str(file.absolute()) for file in folder.rglob("*") if file.is_file()}
        rows = rows.map(lambda row: {"file_name": places.get(Path(row["file_name"]).name, row["file_name"])})
    looks = rows.select_columns(images).map(
        partial(_try_look, column=images, folder=str(folder)),
        features=Features({**_LOOK, "problem": Value("string")}),
        remove_columns=images,
        num_proc=num_proc,
    )
    texts = [value if isinstance(value, str) else data.question_of(value) if value else "" for value in rows[question]]
    frame = _with_looks(pd.DataFrame({"id": names, "question": texts, "answer": "", "tokens": 0}), looks)
    frame = frame.assign(set=AGAINST, source=path)
    problems = looks["problem"][:]
    findings = [
        {"set": AGAINST, "source": path, "id": name, "finding": UNREADABLE, "detail": problem}
        for name, problem in zip(names, problems, strict=True)
        if problem
    ]
    return frame[[not problem for problem in problems]], findings


def _try_look(row: Mapping[str, Any], column: str, folder: str) -> dict[str, Any]:
    try:
        images = data.pictures(row[column])
        if not images:
            raise Drop("no image")
        for image in images:
            image["path"], _ = data.open_image(image, folder)
        return {**_look({"images": images}), "problem": ""}
    except Drop as drop:
        nothing = {"pixels": "", "phash": "0", "small": b"", "area": []}
        return {**nothing, "problem": f"{drop.reason}: {drop.detail}".rstrip(": ")}


# Findings


def _on_answers(
    rows: pd.DataFrame, processor: ProcessorMixin, values: Mapping[str, Any], kind: str, shortest: int
) -> list[dict[str, str]]:
    """Adds the answers' kinds to `rows`."""
    ours = rows["set"] != AGAINST
    different = sorted(set(rows["answer"][ours]))
    rows["kind"] = rows["answer"].map({answer: golds.kind_of(answer) for answer in different}).where(ours, "")
    if kind != "rl":
        return []
    said = {answer: golds.doubts(answer) for answer in different}
    texts = [f"<think>  </think><answer> Final Answer:{answer} </answer>" for answer in different]
    lengths = map(len, processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    least = {answer: length + 1 + shortest for answer, length in zip(different, lengths, strict=True)}
    caps = [stage["max_completion_length"] for stage in values.get("stages") or []]
    found = []
    for row in rows[ours].to_dict("records"):
        where = {key: row[key] for key in ("set", "source", "id")}
        if doubts := said[row["answer"]]:
            found.append({**where, "finding": SUSPICIOUS, "detail": f"{row['answer']!r}: {'; '.join(doubts)}"})
        needed = least[row["answer"]]
        if caps and needed > caps[0] and row["set"] == TRAIN:
            detail = f"needs {needed} tokens at least, the cap is {caps[0]}"
            found.append({**where, "finding": NEVER, "detail": detail})
    return found


def _on_pairs(rows: pd.DataFrame) -> list[dict[str, str]]:
    """Duplicates, conflicts and leaks."""
    texts = [" ".join(text.replace(data.MARKER, " ").casefold().split()) for text in rows["question"]]
    of = {key: list(rows[key]) for key in ("set", "source", "id", "answer", "pixels", "small")}
    found: list[dict[str, str]] = []

    def note(i: int, finding: str, detail: str) -> None:
        found.append({**{key: of[key][i] for key in ("set", "source", "id")}, "finding": finding, "detail": detail})

    def name(i: int) -> str:
        return f"{of['id'][i]} of {of['source'][i]}"

    same: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i in range(len(rows)):
        if of["set"][i] != AGAINST:
            same[of["set"][i], of["pixels"][i], texts[i]].append(i)
    groups = [group for group in same.values() if len(group) > 1]
    pairs = [(of["answer"][group[0]], of["answer"][i]) for group in groups for i in group[1:]]
    agree = iter(POOL.map(_agree, pairs))
    repeats = set()
    for group in groups:
        first = group[0]
        others = [i for i in group[1:] if not next(agree)]
        for i in group[1:]:
            repeats.add(i)
            note(i, EXACT, f"of {name(first)}")
        for i in [first, *others] if others else []:
            other = others[0] if i == first else first
            note(i, CONFLICT, f"{of['answer'][i]!r}; {of['answer'][other]!r} in {name(other)}")
    near: set[int] = set()
    leaked: dict[int, str] = {}
    shared: dict[int, str] = {}
    for i, j in _near_pictures(rows):
        sets = of["set"][i], of["set"][j]
        if sets[0] == sets[1]:
            i, j = min(i, j), max(i, j)
            if sets[0] == AGAINST or {i, j} & repeats or j in near or not _near_texts(texts[i], texts[j]):
                continue
            if _agree((of["answer"][i], of["answer"][j])):
                near.add(j)
                note(j, NEAR, f"of {name(i)}")
        elif TRAIN in sets:
            ours, theirs = (i, j) if sets[0] == TRAIN else (j, i)
            (leaked if _contained(texts[ours], texts[theirs]) else shared).setdefault(ours, name(theirs))
    for i, where in leaked.items():
        note(i, LEAKED, f"to {where}")
    for i, where in shared.items():
        if i not in leaked:
            note(i, SHARED, f"with {where}")
    return found


def _agree(answers: tuple[str, str]) -> bool:
    a, b = answers
    return a == b or grade(a, b) or grade(b, a)


def _near_pictures(rows: pd.DataFrame) -> Iterator[tuple[int, int]]:
    """Pairs of rows with the same or near pictures."""
    places: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, key in enumerate(zip(rows["pixels"], map(len, rows["small"]), strict=True)):
        places[key].append(i)
    for group in places.values():
        yield from _window(group)
    firsts = [group[0] for group in places.values()]
    members = list(places.values())
    hashes = np.array([int(rows["phash"].iat[i], 16) for i in firsts], np.uint64)
    small = [np.frombuffer(rows["small"].iat[i], np.uint8).astype(np.int16) for i in firsts]
    seen = set()
    for part in range(4):
        keys = (hashes >> np.uint64(16 * part)) & np.uint64(0xFFFF)
        order = np.lexsort((hashes, keys))
        for group in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            for u, v in _window(group.tolist()):
                pair = (u, v) if u < v else (v, u)
                if pair in seen or int(hashes[u] ^ hashes[v]).bit_count() > BITS or small[u].shape != small[v].shape:
                    continue
                seen.add(pair)
                if np.abs(small[u] - small[v]).max() <= DIFFERENCE:
                    yield from ((i, j) for i in members[u][:WINDOW] for j in members[v][:WINDOW])


def _window(group: Sequence[int]) -> Iterator[tuple[int, int]]:
    """All pairs of a group, of a very large one those that are not far apart."""
    return ((a, b) for k, a in enumerate(group) for b in group[k + 1 : k + 1 + WINDOW])


def _grams(text: str) -> set[str]:
    return {text[k : k + GRAM] for k in range(max(1, len(text) - GRAM + 1))}


def _near_texts(a: str, b: str) -> bool:
    if sorted(re.findall(r"\d+(?:\.\d+)?", a)) != sorted(re.findall(r"\d+(?:\.\d+)?", b)):
        return False
    a, b = _grams(a), _grams(b)
    return len(a & b) >= COMMON * len(a | b)


def _contained(a: str, b: str) -> bool:
    """Whether one text is near the other or within it, which may have options and instructions around it."""
    a, b = a.strip(" .?:"), b.strip(" .?:")
    return a in b or b in a or _near_texts(a, b)


# The report


def verdicts(
    findings: pd.DataFrame, totals: Mapping[str, int], max_dropped_share: float, allowed: Mapping[str, float]
) -> list[dict[str, Any]]:
    """
    Per set and finding: how many rows, their share, what is allowed, and whether that holds. What the training drops
    is allowed together, as `unusable`.

    Raises:
        `RecipeError`: `allowed` names no finding.
    """
    limits = {**ALLOWED, UNUSABLE: max_dropped_share}
    if wrong := allowed.keys() - limits.keys():
        raise RecipeError(f"`--allow`: {', '.join(sorted(wrong))}: none of {', '.join(sorted(limits))}.")
    limits |= allowed
    made = []
    for name, total in totals.items():
        counts = findings[findings["set"] == name].groupby("finding", sort=False)["id"].size()
        dropped = counts[~counts.index.isin(ALLOWED)]
        if len(dropped):
            counts[UNUSABLE] = dropped.sum()
        for finding, count in counts.sort_values(ascending=False).items():
            share, limit = count / total, limits.get(finding)
            verdict = {"set": name, "finding": finding, "rows": int(count), "share": share, "allowed": limit}
            made.append({**verdict, "holds": limit is None or share <= limit})
    return made


def report(
    values: Mapping[str, Any],
    recipe: str,
    against: Sequence[str] = (),
    allow: Sequence[str] = (),
    output_dir: str | None = None,
    **options: Any,
) -> int:
    """Audit a recipe and write the report; returns the exit code. `options` are those of [`audit`]."""
    allowed = {}
    for entry in allow:
        finding, _, share = entry.rpartition("=")
        try:
            allowed[finding] = float(share)
        except ValueError:
            raise RecipeError(f"`--allow`: {entry!r}, write FINDING=SHARE, for example '{NEAR}=0.02'.") from None
    verdicts(pd.DataFrame(columns=["set", "finding", "id"]), {}, 0.0, allowed)  # are they findings?
    rows, findings, totals = audit(values, against, **options)
    folder = Path(output_dir or Path("runs/audit", Path(recipe).stem))
    folder.mkdir(parents=True, exist_ok=True)
    made = verdicts(findings, totals, values.get("max_dropped_share", 0.05), allowed)
    findings.to_parquet(folder / "findings.parquet")
    bad = [verdict for verdict in made if not verdict["holds"]]
    (folder / "audit.json").write_text(json.dumps({"rows": totals, "findings": made}, indent=2) + "\n")
    _draw(rows, values, folder / "sizes.png")
    text = _text(recipe, rows, findings, totals, made, values)
    (folder / "audit.md").write_text(text, encoding="utf-8")
    (folder / "audit.html").write_text(html(text, f"Audit of {recipe}", folder), encoding="utf-8")
    for verdict in made:
        limit = "" if verdict["allowed"] is None else f", allowed {verdict['allowed']:.1%}"
        mark = "" if verdict["holds"] else "  <-- too many"
        print(f"{verdict['set']}: {verdict['rows']} {verdict['finding']} ({verdict['share']:.1%}{limit}){mark}")
    print(f"{sum(totals.values())} rows; written to {folder}/: audit.html, findings.parquet")
    return 1 if bad else 0


def _text(recipe, rows, findings, totals, made, values) -> str:
    parts = [f"# Audit of {recipe}", "## Findings"]
    shown = [
        (
            *(v["set"], v["finding"], v["rows"], f"{v['share']:.2%}"),
            *("-" if v["allowed"] is None else f"{v['allowed']:.2%}", "" if v["holds"] else "**too many**"),
        )
        for v in made
    ]
    parts.append(table(("Set", "Finding", "Rows", "Share", "Allowed", ""), shown) if shown else "Nothing was found.")
    for (name, finding), group in findings.groupby(["set", "finding"], sort=False):
        examples = [f"- {row.id} of {row.source}: {row.detail}"[:300] for row in group.head(5).itertuples()]
        parts += [f"### {name}: {finding}, {len(group)} rows", "\n".join(examples)]
    counted = [(name, source, len(group)) for (name, source), group in rows.groupby(["set", "source"], sort=False)]
    parts += ["## Rows that can be used", table(("Set", "Source", "Rows"), counted)]
    kinds = [
        (name, kind, len(group), f"`{group['answer'].iat[0][:60]}`")
        for (name, kind), group in rows[rows["set"] != AGAINST].groupby(["set", "kind"], sort=False)
    ]
    parts += ["## Answers", table(("Set", "Kind", "Rows", "For example"), kinds)]
    ours = rows[rows["set"] != AGAINST]
    quantiles = (0, 0.5, 0.9, 0.99, 1)
    sizes = {
        "tokens": ours["tokens"].to_numpy(),
        "pixels of a picture": np.array([a for r in ours["area"] for a in r]),
    }
    lines = [(name, *(f"{x:,.0f}" for x in np.quantile(of, quantiles))) for name, of in sizes.items() if len(of)]
    parts += ["## Sizes", table(("", *(f"{q:.0%}" for q in quantiles)), lines), "![Sizes](sizes.png)"]
    limits = [f"`{key}: {values[key]}`" for key in LIMITS if values.get(key) is not None]
    parts.append(f"Limits of the recipe (dashed): {', '.join(limits) or 'none'}.")
    return "\n\n".join(parts) + "\n"


def _draw(rows: pd.DataFrame, values: Mapping[str, Any], path: Path) -> None:
    """Histograms of tokens and picture sizes, with the recipe's limits."""
    ours = rows[rows["set"] != AGAINST]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    areas = [area for row in ours["area"] for area in row]
    for axis, sizes, label, keys in (
        (axes[0], ours["tokens"].to_numpy(), "tokens of a row, pictures included", LIMITS[:2]),
        (axes[1], np.array(areas), "pixels of a picture, as it is", LIMITS[2:]),
    ):
        axis.set(xlabel=label, ylabel="rows" if axis is axes[0] else "pictures")
        limits = {key: values[key] for key in keys if values.get(key) is not None}
        axis.hist(sizes, bins=np.linspace(0, 1.05 * max([*sizes, *limits.values(), 1]), 60), color="#4477aa")
        for (key, limit), colour in zip(limits.items(), ("#cc3311", "#ee7733"), strict=False):
            axis.axvline(limit, color=colour, linestyle="--", linewidth=1, label=key)
        if limits:
            axis.legend(frameon=False, fontsize=8)
    fig.savefig(path, dpi=130)
    plt.close(fig)
