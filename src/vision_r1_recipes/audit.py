"""
What is wrong with a recipe's data, before GPUs start.

```shell
python -m vision_r1_recipes.data audit RECIPE [--against PATH[:SPLIT] ...] [--allow "near duplicate=0.02" ...]
```

Rows go through the checks of the training itself, then their pictures and texts are held against each other. Findings,
of which a row may have several:

- the reasons for which the training would drop it (`data.py`);
- `never rewarded in stage 1`: the tags, the gold answer and the shortest plausible reasoning exceed that stage's cap;
- `exact duplicate` of a row before it: same pixels, same text (letter case, blanks, fonts and the like aside);
- `conflicting answers`: the same question with the same pixels has another answer elsewhere in the set;
- `near duplicate` of a row before it: near pictures, near text and the same answer;
- `leaked`: in the training set and in another one (`eval_datasets`, `--against`): near pictures, and all sentences of
  one question in the other, or near texts; in `eval_datasets` also the same answer, unless the pixels are the same;
- allowed unless `--allow` says otherwise: `shared picture` (only the picture is near another row's), `suspicious
  answer` (see `rewards check`; in a cold start, one that can't be graded), `no <think> and <answer>` (or an empty
  `<think>`, where most rows of a cold start have both), and rows without a picture in another set.

Rows that the training drops or leaves out are held against nothing. Pictures are near when their perceptual hashes
agree in one of four parts and in all but 8 of 64 bits, and small copies of them (32 x 32 grey, 8 x 8 in colour) differ
nowhere by more than 12 of 255, or by half the range of what is nearly blank: another compression or size, or a
small label changed, but no crop and no rotation. Texts are near when they have the same words, numbers, signs and
names in the same order, articles and the like and the spelling of a long word aside.
Of a question within another, how its mathematics is written and what stands around it (a template, a hint, options
that the other lacks or has in another order) make no difference; one without words is within none.

`--against` takes any layout of ours and the files of MathVista, MathVerse, DynaMath and MM-Math; of a folder that has
both, the parquet files and not the JSON. Writes `audit.md`, `audit.html`, `audit.json` and `findings.parquet` (every
flagged row) into `runs/audit/RECIPE`. Exit code 1 when a finding has a greater share of its set than allowed, 2 when
the recipe or a file can't be read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache, lru_cache, partial
from itertools import combinations, islice, product
from pathlib import Path
from typing import Any

import imagehash
import matplotlib
import numpy as np
import pandas as pd
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from qwen_vl_utils.vision_process import to_rgb
from transformers import ProcessorMixin

from . import data, golds
from .data import Drop
from .grading import POOL, agree, check_gold
from .grading.spelling import clean
from .plan import start_model
from .recipe import RecipeError, script
from .report import html, table
from .rewards import parse_format


matplotlib.use("Agg")
import matplotlib.pyplot as plt


TRAIN, EVAL, AGAINST = "datasets", "eval_datasets", "against"
NEVER = "never rewarded in stage 1"
EXACT, CONFLICT, NEAR = "exact duplicate", "conflicting answers", "near duplicate"
LEAKED, SHARED, SUSPICIOUS, UNTAGGED = "leaked", "shared picture", "suspicious answer", "no <think> and <answer>"
UNUSABLE, UNREADABLE, TEXT_ONLY = "unusable", "can't be compared", "without a picture"
# Greatest share of a set's rows; what the training drops has `max_dropped_share`.
ALLOWED = {NEVER: 0.01, EXACT: 0.01, CONFLICT: 0.0, NEAR: 0.05, LEAKED: 0.0, UNREADABLE: 0.0}
ALLOWED |= {SHARED: 1.0, SUSPICIOUS: 1.0, UNTAGGED: 1.0, TEXT_ONLY: 1.0, data.OUTSIDE: 1.0}
BITS, DIFFERENCE = 8, 12
# A picture is compared with this many others of near hash, and so many pairs of texts of two pictures: without a limit
# a set of blank pictures would take days. What is left out by it is counted in the report.
NEIGHBOURS, TEXT_PAIRS = 500, 250_000
QUESTIONS = ("question", "problem", "prompt", "conversations")  # columns of other sets, the first that there is
IMAGES = ("decoded_image", "images", "image", "file_name")
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
) -> tuple[pd.DataFrame, pd.DataFrame, Counter, int]:
    """
    Look at all rows of a recipe.

    Args:
        values (`dict`): The recipe, resolved.
        against (`list[str]`, *optional*): Other sets, `PATH` or `PATH:SPLIT`, that the training set must not have.
        processor (`str`, *optional*): Folder or Hub id. Defaults to the recipe's model.
        shortest_reasoning (`int`, *optional*, defaults to `16`): Tokens between the `<think>` tags.
        num_proc (`int`, *optional*): Processes; defaults to the recipe's.

    Returns:
        The rows that can be read (`set`, `source`, `id`, `question`, `answer`, `kind`, `tokens`, `area` in pixels,
        `used`: false where a row has too many tokens), the findings (`set`, `source`, `id`, `finding`, `detail`), how
        many rows each `(set, source)` has, and how many pairs were not compared for being too many.

    Raises:
        `RecipeError`: an unknown key, or a processor or a source that can't be read.
    """
    kind = _kind(values)
    data.check_least("--shortest_reasoning", shortest_reasoning, 0)
    data.check_least("--num_proc", num_proc, 1)
    limit = values.get("max_prompt_length" if kind == "rl" else "max_length")
    loaded = data.load_processor(
        processor or values.get("model_name_or_path") or "(not set)",
        values.get("min_pixels"),
        values.get("max_pixels"),
    )
    num_proc = num_proc or values.get("num_proc")
    frames, findings, totals = [], [], Counter()
    for name in (TRAIN, EVAL):
        sources = values.get(name) or []
        options = {"system_prompt": values.get("system_prompt"), "num_proc": num_proc, "name": name}
        parts = data.check_rows(sources, kind, loaded, **options) if sources or name == TRAIN else []
        for i, (source, part) in enumerate(zip(sources, parts, strict=True)):
            where = {"set": name, "source": _label(source)}
            totals[tuple(where.values())] += len(part)
            frame, dropped = _converted(part, source, kind, limit, num_proc, f"{name}[{i}]")
            frames.append(frame.assign(**where))
            findings += [{**where, **problem} for problem in dropped]
    for place in against:
        frame, problems = _other(place, num_proc)
        totals[AGAINST, place] += len(frame) + len(problems)
        frames.append(frame.assign(set=AGAINST, source=place))
        findings += [{"set": AGAINST, "source": place, **problem} for problem in problems]
    rows = pd.concat(frames, ignore_index=True).astype({"used": bool, "tagged": bool, "thinks": bool})
    findings += _on_answers(rows, loaded, values, kind, shortest_reasoning)
    on_pairs, not_compared = _on_pairs(rows[rows["used"]].reset_index(drop=True))
    findings = pd.DataFrame(findings + on_pairs, columns=["set", "source", "id", "finding", "detail"])
    return rows.drop(columns=["pixels", "phash", "small"]), findings, totals, not_compared


# Reading


def _kind(values: Mapping[str, Any]) -> str:
    kind = "rl" if script(values) == "grpo.py" else "sft"
    data.check_recipe(values, kind)
    return kind


def _label(source: Mapping[str, Any]) -> str:
    files, split = source.get("data_files"), source.get("split", "train")
    named = "/".join([source["path"], *([", ".join([files] if isinstance(files, str) else files)] if files else [])])
    return named if split == "train" else f"{named}:{split}"


def _converted(
    part: Dataset, source: Mapping[str, Any], kind: str, limit: int | None, num_proc: int | None, where: str
) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """The readable rows of a checked source, and why the training leaves which rows out."""
    ids, tokens, reasons = part["id"][:], part["tokens"][:], part["dropped"][:]
    details = [text.removeprefix(key).removeprefix(": ") for key, text in zip(ids, part["detail"], strict=True)]
    readable = [i for i, reason in enumerate(reasons) if not reason]
    for i in readable:
        if drop := data.too_long(tokens[i], limit):
            reasons[i], details[i] = drop.reason, drop.detail
    if source.get("pass_rates"):
        fitting = [i for i in readable if not reasons[i]]
        for k, rate in data.outside_band(part.select(fitting), source, where).items():
            reasons[fitting[k]], details[fitting[k]] = data.OUTSIDE, f"{rate:g}"
    dropped = [
        {"id": key, "finding": reason, "detail": detail}
        for key, reason, detail in zip(ids, reasons, details, strict=True)
        if reason
    ]
    part = part.select(readable)
    looks = part.select_columns("images").map(_look, features=_LOOK, remove_columns="images", num_proc=num_proc)
    rows = part.remove_columns("images")
    answers = rows["solution"] if kind == "rl" else (turns[0]["content"][0]["text"] for turns in rows["completion"])
    frame = pd.DataFrame({"id": rows["id"][:], "answer": list(answers), "tokens": rows["tokens"][:]})
    frame["tagged"] = frame["thinks"] = True
    if kind == "sft":
        parsed = [parse_format(text) for text in frame["answer"]]
        frame["tagged"] = [answer is not None for answer in parsed]
        frame["thinks"] = [not re.match(r"\s*<think>\s*</think>", text) for text in frame["answer"]]
        # Where the format is another one by intention, the whole is the answer.
        frame["answer"] = [
            whole if answer is None else answer for answer, whole in zip(parsed, frame["answer"], strict=True)
        ]
    frame["question"] = [data.question_of(prompt) for prompt in rows["prompt"]]
    frame["used"] = [not reasons[i] for i in readable]
    return _with_looks(frame, looks), dropped


def _with_looks(frame: pd.DataFrame, looks: Dataset) -> pd.DataFrame:
    # `map` gives a set without rows no columns.
    return frame.assign(**{column: looks[column][:] if len(looks) else [] for column in _LOOK})


def _look(row: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of a row's pictures."""
    digest, small, area, phash = hashlib.blake2b(digest_size=12), b"", [], None
    for image in row["images"]:
        picture = to_rgb(data.open_picture(image))  # as the model sees it: what is transparent becomes white
        digest.update(f"{picture.size}".encode() + picture.tobytes())
        phash = str(imagehash.phash(picture)) if phash is None else phash
        for mode, side in (("L", 32), ("RGB", 8)):
            small += picture.convert(mode).resize((side, side), PILImage.Resampling.BILINEAR).tobytes()
        area.append(picture.width * picture.height)
    return {"pixels": digest.hexdigest(), "phash": phash or "0", "small": small, "area": area}


def _other(place: str, num_proc: int | None) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """The rows of a set that is not trained on, and findings on those that can't be compared."""
    path, _, split = place.partition(":") if not Path(place).exists() else (place, "", "")
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    paths = [path]
    if Path(path).is_dir() and not split:
        # MathVista and MathVerse have their annotations as JSON once more, beside the parquet files with the pictures.
        found = sorted(file for file in folder.rglob("*") if file.suffix in data.BUILDERS)
        paths = [str(file) for file in found if file.suffix == ".parquet"] or list(map(str, found)) or paths
    files = {p: data.open_source({"path": p, **({"split": split} if split else {})}, AGAINST) for p in paths}
    if not any(set(rows.column_names) & set(IMAGES) for rows in files.values()):
        _refuse_columns(place, next(iter(files.values())))
    parts = [_compared(rows, place, folder, num_proc) for rows in files.values()]
    frame = pd.concat([part for part, _ in parts], ignore_index=True)
    return frame, [problem for _, problems in parts for problem in problems]


def _refuse_columns(place: str, rows: Dataset) -> None:
    columns = sorted(rows.column_names)
    shown = ", ".join(columns[:20]) + (f" and {len(columns) - 20} more" if len(columns) > 20 else "")
    known = f"one of {', '.join(QUESTIONS)} and one of {', '.join(IMAGES)}"
    raise RecipeError(f"against: {place} has the columns {shown}; needed are {known}. Name the right file.")


def _compared(
    rows: Dataset, place: str, folder: Path, num_proc: int | None
) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    columns = set(rows.column_names)
    question = next((name for name in QUESTIONS if name in columns), None)
    if question is None:
        _refuse_columns(place, rows)
    ids = next((name for name in ("id", "pid", "sample_index") if name in columns), None)
    names = [str(key) for key in rows[ids]] if ids else [f"row {i}" for i in range(len(rows))]
    texts = [_question(value) for value in rows[question]]
    known = {"answer": "", "tokens": 0, "tagged": True, "thinks": True, "used": True}
    frame = pd.DataFrame({"id": names, "question": texts, **known})
    images = next((name for name in IMAGES if name in columns), None)
    if images is None:  # a file of questions without pictures beside others
        missing = [{"id": name, "finding": TEXT_ONLY, "detail": ""} for name in names]
        return frame[:0].assign(**dict.fromkeys(_LOOK)), missing
    feature = rows.features[images]
    if isinstance(feature, Image):
        rows = rows.cast_column(images, Image(decode=False))
    elif isinstance(feature, List) and isinstance(feature.feature, Image):
        rows = rows.cast_column(images, List(Image(decode=False)))
    places = {}
    if images == "file_name":  # of MM-Math: somewhere below
        places = {file.name: str(file.absolute()) for file in folder.rglob("*") if file.is_file()}
    looks = rows.select_columns(images).map(
        partial(_try_look, column=images, folder=str(folder), places=places),
        features=Features({**_LOOK, "finding": Value("string"), "detail": Value("string")}),
        remove_columns=images,
        num_proc=num_proc,
        load_from_cache_file=False,  # the cache knows nothing of the picture files
    )
    found, details = (looks[column][:] if len(looks) else [] for column in ("finding", "detail"))
    problems = [
        {"id": name, "finding": finding, "detail": detail}
        for name, finding, detail in zip(names, found, details, strict=True)
        if finding
    ]
    return _with_looks(frame, looks)[np.array([not finding for finding in found], bool)], problems


def _question(value: Any) -> str:
    """The question of a row: text, messages, or turns of a conversation."""
    if not value or isinstance(value, str):
        return value or ""
    if "from" in value[0]:
        return next((turn["value"] or "" for turn in value if data.ROLES.get(turn["from"]) == "user"), "")
    content = value[-1]["content"]
    return content if isinstance(content, str) else data.question_of(value)


def _try_look(row: Mapping[str, Any], column: str, folder: str, places: Mapping[str, str]) -> dict[str, Any]:
    nothing = {"pixels": "", "phash": "0", "small": b"", "area": []}
    try:
        images = data.pictures(row[column] or None)
        if not images:
            return {**nothing, "finding": TEXT_ONLY, "detail": ""}
        for image in images:
            image["path"] = places.get(Path(image["path"] or "").name, image["path"])
            image["path"], _ = data.open_image(image, folder)
        return {**_look({"images": images}), "finding": "", "detail": ""}
    except Drop as drop:
        return {**nothing, "finding": UNREADABLE, "detail": f"{drop.reason}: {drop.detail}".rstrip(": ")}


# Findings


def _on_answers(
    rows: pd.DataFrame, processor: ProcessorMixin, values: Mapping[str, Any], kind: str, shortest: int
) -> list[dict[str, str]]:
    """Adds the answers' kinds to `rows`."""
    ours = rows["set"] != AGAINST
    different = sorted(set(rows["answer"][ours]))
    kinds = {answer: golds.kind_of(answer) for answer in different}
    rows["kind"] = rows["answer"].map(kinds).where(ours, "")
    found: list[dict[str, str]] = []

    def note(row: Mapping[str, Any], finding: str, detail: str) -> None:
        found.append({key: row[key] for key in ("set", "source", "id")} | {"finding": finding, "detail": detail})

    used = rows[ours & rows["used"]].drop(columns=["small", "area"])
    if kind == "sft":
        for _, group in used.groupby(["set", "source"], sort=False):
            if group["tagged"].mean() < 0.5:  # direct answers, by intention
                continue
            tagged = sorted(set(group["answer"][group["tagged"]]))
            reasons = dict(zip(tagged, POOL.map(check_gold, tagged), strict=True))
            left_out = group["thinks"].mean() < 0.5  # the reasoning, by `drop_reasoning`
            for row in group.to_dict("records"):
                if not row["tagged"]:
                    note(row, UNTAGGED, f"ends with {row['answer'][-60:]!r}")
                    continue
                if not row["thinks"] and not left_out:
                    note(row, UNTAGGED, "the <think> is empty")
                if reason := reasons[row["answer"]]:
                    note(row, SUSPICIOUS, f"{row['answer']!r} can't be graded: {reason}")
        return found
    said = {answer: golds.doubts(answer) for answer in different}
    texts = [f"<think>  </think><answer> Final Answer:{answer} </answer>" for answer in different]
    lengths = map(len, processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
    least = {answer: length + 1 + shortest for answer, length in zip(different, lengths, strict=True)}
    caps = [stage["max_completion_length"] for stage in values.get("stages") or []]
    cap = next(iter(caps), values.get("max_completion_length"))
    for row in used.to_dict("records"):
        if doubts := said[row["answer"]]:
            note(row, SUSPICIOUS, f"{row['answer']!r}: {'; '.join(doubts)}")
        needed = least[row["answer"]]
        if cap is not None and needed > cap and row["set"] == TRAIN:
            note(row, NEVER, f"needs {needed} tokens at least, the cap is {cap}")
    return found


def _on_pairs(rows: pd.DataFrame) -> tuple[list[dict[str, str]], int]:
    """Duplicates, conflicts and leaks, and how many pairs were not compared."""
    plain = [" ".join(_unset(text.replace(data.MARKER, " ")).split()) for text in rows["question"]]
    texts = [text.casefold() for text in plain]
    asked = cache(lambda i: _asked(rows["question"].iat[i]))
    words = cache(lambda i: _words(plain[i]))
    of = {key: list(rows[key]) for key in ("set", "source", "id", "answer", "pixels")}
    found: list[dict[str, str]] = []

    def note(i: int, finding: str, detail: str) -> None:
        found.append({**{key: of[key][i] for key in ("set", "source", "id")}, "finding": finding, "detail": detail})

    def name(i: int) -> str:
        return f"{of['id'][i]} of {of['source'][i]}"

    same: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for i in range(len(rows)):
        same[of["set"][i], of["pixels"][i], texts[i]].append(i)
    first_of = {i: group[0] for group in same.values() for i in group}
    groups = [group for (where, _, _), group in same.items() if len(group) > 1 and where != AGAINST]
    pairs = [(of["answer"][group[0]], of["answer"][i]) for group in groups for i in group[1:]]
    agreeing = iter(POOL.map(lambda pair: agree(*pair), pairs))
    for group in groups:
        first = group[0]
        others = [i for i in group[1:] if not next(agreeing)]
        for i in group[1:]:
            note(i, EXACT, f"of {name(first)}")
        for i in group if others else []:
            other = first if i in others else others[0]
            note(i, CONFLICT, f"{of['answer'][i]!r}; {of['answer'][other]!r} in {name(other)}")
    near: set[int] = set()
    leaked: dict[int, int] = {}
    shared: dict[int, int] = {}
    for (where, pixels, text), group in same.items():
        if where != TRAIN and (TRAIN, pixels, text) in same:
            leaked.setdefault(same[TRAIN, pixels, text][0], group[0])
    # Repeats have what is found on the first of them.
    once = sorted(set(first_of.values()))
    alike, not_compared = _near_pictures(rows.iloc[once])
    for left, right in alike:
        pairs = combinations(left, 2) if left is right else product(left, right)
        total = len(left) * (len(left) - 1) // 2 if left is right else len(left) * len(right)
        not_compared[0] += max(0, total - TEXT_PAIRS)
        for i, j in islice(pairs, TEXT_PAIRS):
            i, j = sorted((once[i], once[j]))
            sets = of["set"][i], of["set"][j]
            if sets[0] == sets[1] != AGAINST:
                if j in near:
                    continue
                if _near_texts(words(i), words(j)) and agree(of["answer"][i], of["answer"][j]):
                    near.add(j)
                    note(j, NEAR, f"of {name(i)}")
                else:
                    shared.setdefault(j, i)
            elif TRAIN in sets and sets[0] != sets[1]:
                ours, theirs = (i, j) if sets[0] == TRAIN else (j, i)
                if ours in leaked:
                    continue
                is_so = _contained(asked(ours), asked(theirs)) or _near_texts(words(ours), words(theirs))
                # `Find x.` is asked of many a figure; of other sets the answers are not known.
                if is_so and AGAINST not in sets and of["pixels"][ours] != of["pixels"][theirs]:
                    is_so = agree(of["answer"][ours], of["answer"][theirs])
                (leaked if is_so else shared).setdefault(ours, theirs)
    for i, first in first_of.items():
        if first in leaked:
            note(i, LEAKED, f"to {name(leaked[first])}")
        elif i in shared and i not in near:
            note(i, SHARED, f"with {name(shared[i])}")
    return found, not_compared[0]


def _near_pictures(rows: pd.DataFrame) -> tuple[Iterator[tuple[list[int], list[int]]], list[int]]:
    """Lists of rows (places in `rows`) with the same or near pictures, two at a time; and a count that grows on the
    way, of pairs of pictures with near hashes that were too many to look at."""
    places: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, key in enumerate(zip(rows["pixels"], map(len, rows["small"]), strict=True)):
        places[key].append(i)
    members, left_out = list(places.values()), [0]
    hashes = np.array([int(rows["phash"].iat[group[0]], 16) for group in members], np.uint64)
    small = [np.frombuffer(rows["small"].iat[group[0]], np.uint8) for group in members]
    parts = [(hashes >> np.uint64(16 * k)) & np.uint64(0xFFFF) for k in range(4)]

    def pairs() -> Iterator[tuple[list[int], list[int]]]:
        yield from ((group, group) for group in members if len(group) > 1)
        for k, keys in enumerate(parts):
            order = np.lexsort((hashes, keys))
            tried = np.zeros(len(order), np.int64)
            at = np.arange(len(order) - 1)
            distance = 1
            while at.size:  # neighbours in order, then those two apart, ... as long as this part of the hash is theirs
                at = at[at + distance < len(order)]
                at = at[keys[order[at]] == keys[order[at + distance]]]
                u, v = order[at], order[at + distance]
                close = np.bitwise_count(hashes[u] ^ hashes[v]) <= BITS
                for earlier in parts[:k]:
                    close &= earlier[u] != earlier[v]
                left_out[0] += int((close & (tried[u] >= NEIGHBOURS)).sum())
                close &= tried[u] < NEIGHBOURS
                tried[u] += close
                for a, b in zip(u[close].tolist(), v[close].tolist(), strict=True):
                    if small[a].shape != small[b].shape:
                        continue
                    allowed = min(DIFFERENCE, max(2, max(np.ptp(small[a]), np.ptp(small[b])) // 2))
                    if np.abs(small[a].astype(np.int16) - small[b]).max() <= allowed:
                        yield members[a], members[b]
                distance += 1

    return pairs(), left_out


def _unset(text: str) -> str:
    """Without what only sets it: commas of thousands, fonts and bars."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"\\(?:overline|text|mathrm|mathbf) ?\{([^{}]*)\}", r"\1", text)


# Words that make no other question of one.
_SMALL = {
    *("a", "an", "the", "this", "that", "these", "those", "is", "are", "was", "were", "be", "of", "in", "on", "at"),
    *("by", "to", "if", "when", "please", "find", "calculate", "compute", "determine", "what", "which", "figure"),
    *("image", "picture", "diagram", "shown", "given"),
    *"\u7684\u4e86\u662f\u5728\u4e2d\u5982\u56fe\u6240\u793a\u8bf7\u6c42",
}


def _words(text: str) -> list[str]:
    """Words, numbers, signs and names (`AB`, `x`) of a text in their order, without small words and punctuation."""
    found = (word.casefold() if word[1:].islower() else word for word in _TOKEN.findall(text))
    return [word for word in found if word not in _SMALL and word not in '.,;:?"()[]{}*\u3002\uff0c\uff1f']


def _near_texts(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether two texts (see [`_words`]) say the same: `AB` for `BC`, or `more` for `less`, asks something else."""
    return len(a) == len(b) and all(u == v or _misspelt(u, v) for u, v in zip(a, b, strict=True))


@lru_cache(maxsize=10_000)
def _misspelt(u: str, v: str) -> bool:
    if min(len(u), len(v)) < 5 or not (u + v).islower() or u[0] != v[0]:  # regular and irregular are two words
        return False
    return SequenceMatcher(None, u, v).ratio() > 0.82


# Where a sentence ends: not at the point of 1.5, the colon of AB : BC or the sign of 5!
_ENDS = re.compile(
    r"\n|</?[A-Za-z_]{3,}>|[?;\u3002\uff1f\uff1b]|\.(?!\d)|(?<=[A-Za-z]{2})[!\uff01](?!=)"
    r"|(?:(?<=[a-z]{2})|(?<=\bQ)|(?<=[\u4e00-\u9fff]))(?::\**\s|\uff1a)|(?<=[\u4e00-\u9fff]):"
)
# The letter of an option, `(A)`, `B.`, `C:`: not f(A) and no function's name.
_LETTERED = re.compile(r"(?<![\w\\])[(\[\uff08]?([A-J])(?:[)\]\uff09][.:]?|[.:\u3001\uff0e\uff1a])(?!\d*\w*\()\s*")
_CHOICES = re.compile(r"(?:\b(?:choices|options)|\u9009\u9879)\W*$", re.I)
_TOKEN = re.compile(r"\\[a-z]+|\d+(?:\.\d+)?|[\u4e00-\u9fff]|(?:(?![\u4e00-\u9fff])[^\W\d_])+|[^\w\s$]|_")


def _asked(question: str) -> tuple[str, frozenset[str]]:
    """The sentences of a question, one per line, in one spelling; and its options without their letters."""
    question = re.sub(r"[^\S\n]+", " ", _unset(question))
    found = list(_LETTERED.finditer(question))
    letters = "".join(match[1] for match in found)
    start, options = letters.rfind("AB"), []
    if start >= 0:
        chosen = [match for match, letter in zip(found[start:], "ABCDEFGHIJ", strict=False) if match[1] == letter]
        for match, following in zip(chosen, [*chosen[1:], None], strict=True):
            if following:
                options.append(question[match.end() : following.start()])
        last, *after = _ENDS.split(question[chosen[-1].end() :], maxsplit=1)
        options.append(last)
        question = "\n".join([_CHOICES.sub("", question[: chosen[0].start()]), *after])
    sentences = filter(None, map(_spelled, _ENDS.split(question)))
    return "\n".join(sentences), frozenset(filter(None, map(_spelled, options)))


def _spelled(sentence: str) -> str:
    return " ".join(_TOKEN.findall(clean(sentence).casefold())).strip(" ,.;:*")


def _contained(a: tuple[str, frozenset[str]], b: tuple[str, frozenset[str]]) -> bool:
    """Whether one question (see [`_asked`]) is within the other: whole sentences, and no other options."""
    (a, of_a), (b, of_b) = sorted((a, b), key=lambda asked: len(asked[0]))
    if of_a and of_b and of_a != of_b:
        return False
    # One word alone, `Area?`, may be in anything.
    return bool(a) and (a == b or (" " in a and f"\n{a}\n" in f"\n{b}\n"))


# The report


def verdicts(
    findings: pd.DataFrame,
    totals: Mapping[tuple[str, str], int],
    max_dropped_share: float,
    allowed: Mapping[str, float],
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
    for name, total in _per_set(totals).items():
        counts = findings[findings["set"] == name].groupby("finding", sort=False)["id"].size()
        dropped = counts[~counts.index.isin(ALLOWED)]
        if len(dropped):
            counts[UNUSABLE] = dropped.sum()
        for finding, count in counts.sort_values(ascending=False).items():
            share, limit = count / total, limits.get(finding)
            verdict = {"set": name, "finding": finding, "rows": int(count), "share": share, "allowed": limit}
            made.append({**verdict, "holds": limit is None or share <= limit})
    return made


def _per_set(totals: Mapping[tuple[str, str], int]) -> Counter:
    summed: Counter = Counter()
    for (name, _), total in totals.items():
        summed[name] += total
    return summed


def report(
    values: Mapping[str, Any],
    recipe: str,
    against: Sequence[str] = (),
    allow: Sequence[str] = (),
    output_dir: str | None = None,
    processor: str | None = None,
    **options: Any,
) -> int:
    """Audit a recipe and write the report; returns the exit code. `options` are others of [`audit`]."""
    allowed = {}
    for entry in allow:
        finding, _, share = entry.rpartition("=")
        try:
            allowed[finding] = float(share)
        except ValueError:
            raise RecipeError(f"`--allow`: {entry!r}, write FINDING=SHARE, for example '{NEAR}=0.02'.") from None
        data.check_share(f"--allow {finding}", allowed[finding])
    verdicts(pd.DataFrame(columns=["set", "finding", "id"]), {}, 0.0, allowed)  # are they findings?
    # Before the cold start there is no model of its own: the one that it begins from has the same processor.
    processor = processor or start_model(recipe, values.get("model_name_or_path"))
    folder = Path(output_dir or Path("runs/audit", Path(recipe).stem))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"`--output_dir`: {folder}: {error.strerror}; name a folder.") from error
    rows, findings, totals, not_compared = audit(values, against, processor, **options)
    made = verdicts(findings, totals, values.get("max_dropped_share", 0.05), allowed)
    findings.to_parquet(folder / "findings.parquet")
    content = {"rows": _per_set(totals), "findings": made, "pairs_not_compared": not_compared}
    (folder / "audit.json").write_text(json.dumps(content, indent=2) + "\n")
    _draw(rows, values, folder / "sizes.png")
    text = _text(recipe, rows, findings, totals, made, values, not_compared)
    (folder / "audit.md").write_text(text, encoding="utf-8")
    (folder / "audit.html").write_text(html(text, f"Audit of {recipe}", folder), encoding="utf-8")
    for verdict in made:
        limit = "" if verdict["allowed"] is None else f", allowed {verdict['allowed']:.1%}"
        mark = "" if verdict["holds"] else "  <-- too many"
        print(f"{verdict['set']}: {verdict['rows']} {verdict['finding']} ({verdict['share']:.1%}{limit}){mark}")
    if not_compared:
        print(_about(not_compared))
    print(f"{sum(totals.values())} rows; written to {folder}/: audit.html, findings.parquet")
    return 0 if all(verdict["holds"] for verdict in made) else 1


def _about(not_compared: int) -> str:
    return f"{not_compared:,} pairs of rows or pictures were not compared: too many rows have pictures that are alike."


def _plain(text: str, most: int = 300) -> str:
    """Text of a row as one line of Markdown that shows it as it is."""
    text = " ".join(text.split())
    text = text if len(text) <= most else f"{text[:most]} ..."
    text = re.sub(r"([\\`*_{}\[\]#])", r"\\\1", text)
    return re.sub(r"[<>&|]", lambda match: f"&#{ord(match[0])};", text)


def _text(recipe, rows, findings, totals, made, values, not_compared) -> str:
    parts = [f"# Audit of {_plain(recipe)}", "## Findings"]
    shown = [
        (
            *(v["set"], _plain(v["finding"]), v["rows"], f"{v['share']:.2%}"),
            *("-" if v["allowed"] is None else f"{v['allowed']:.2%}", "" if v["holds"] else "**too many**"),
        )
        for v in made
    ]
    parts.append(table(("Set", "Finding", "Rows", "Share", "Allowed", ""), shown) if shown else "Nothing was found.")
    parts += [_about(not_compared)] if not_compared else []
    for (name, finding), group in findings.groupby(["set", "finding"], sort=False):
        examples = (
            f"{row.id} of {row.source}{f': {row.detail}' * bool(row.detail)}" for row in group.head(5).itertuples()
        )
        more = [f"- and {len(group) - 5} more in `findings.parquet`"] if len(group) > 5 else []
        parts += [f"### {name}: {_plain(finding)}, {len(group)} row{'s' * (len(group) > 1)}"]
        parts.append("\n".join([*(f"- {_plain(example)}" for example in examples), *more]))
    used = rows[rows["used"]].groupby(["set", "source"], sort=False).size()
    counted = [(name, _plain(source), n, used.get((name, source), 0)) for (name, source), n in totals.items()]
    parts += ["## Rows", table(("Set", "Source", "Rows", "Usable"), counted)]
    ours = rows[rows["set"] != AGAINST]
    kinds = [
        (name, kind, len(group), _plain(group["answer"].iat[0], 60))
        for (name, kind), group in ours.groupby(["set", "kind"], sort=False)
    ]
    parts += ["## Answers", table(("Set", "Kind", "Rows", "For example"), kinds)]
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
