"""
Any supported source -> rows for the trainers.

| layout | columns | released as `[repo]` |
|---|---|---|
| RL | `images` (list of pictures), `problem` (with `<image>` markers), `answer` | Vision-R1-rl (geometry3k's layout) |
| cold start | `image` or `images` (path or paths), `conversations` (`from`, `value`) | both files of Vision-R1-cold |
| ready | `prompt`, `images`, and `solution` (RL) or `completion` (SFT) | |

A row that can't be used is dropped, counted and listed by reason; losing more than a stated share is an error. Nothing
is truncated. Pictures stay undecoded until a row is read, and are bounded here for SFT, rollouts and evaluation.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets, load_dataset
from datasets.config import HF_DATASETS_CACHE
from PIL import Image as PILImage
from PIL import UnidentifiedImageError
from qwen_vl_utils import fetch_image, smart_resize
from transformers import AutoProcessor, ProcessorMixin
from trl import ModelConfig

from . import grading
from .configs import DataArguments, VisionGRPOConfig, VisionSFTConfig
from .grading import check_gold
from .ptst import parse_stages
from .recipe import RecipeError, check_keys, fill, load, merge, parse_overrides, refuse_other_kind


MARKER = "<image>"
SOURCE_KEYS = (
    *("path", "name", "split", "data_files", "image_folder", "limit", "drop_reasoning"),
    *("pass_rates", "pass_rate_band"),
)
OUTSIDE = "pass rate outside the band"
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_TURNS = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
_FEATURES = {
    "prompt": _TURNS,
    "images": List(Image(decode=False)),
    "id": Value("string"),
    "tokens": Value("int64"),
    "dropped": Value("string"),
    "detail": Value("string"),
}
_TARGET = {"rl": {"solution": Value("string")}, "sft": {"completion": _TURNS}}


@dataclass
class DataReport:
    """What became of the rows of all sources: how many were read and kept, and why the others were dropped."""

    read: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    fingerprint: str = ""  # of a run's training rows, in their order: a resumed run must have the same

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.read} rows kept"]
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            lines.append(f"  {count} dropped: {reason}; for example {'; '.join(self.examples[reason][:3])}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")


def load_processor(
    model_name_or_path: str, min_pixels: int | None = None, max_pixels: int | None = None, revision: str = "main"
) -> ProcessorMixin:
    """
    The model's processor, padding on the left, bounded to pictures of `min_pixels` to `max_pixels` (area, in pixels).

    The bounds are saved with every checkpoint, so that a trained model is evaluated on what it was trained on.
    """
    try:
        processor = AutoProcessor.from_pretrained(model_name_or_path, revision=revision, padding_side="left")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"`model_name_or_path`: {model_name_or_path} is neither a folder with a model and its processor (train or "
            f"download it first) nor a Hub id that this machine can reach. {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise RecipeError(
            f"`model_name_or_path`: {model_name_or_path} has no image processor: a vision-language model is needed."
        )
    size = processor.image_processor.size
    low = size["shortest_edge"] if min_pixels is None else min_pixels
    high = size["longest_edge"] if max_pixels is None else max_pixels
    if low > high:
        raise RecipeError(f"`min_pixels` {low} is over `max_pixels` {high}.")
    processor.image_processor.size = {"shortest_edge": low, "longest_edge": high}
    return processor


def image_bounds(processor: ProcessorMixin) -> dict[str, int]:
    """`factor` (side of a token, in pixels), `min_pixels` and `max_pixels` of qwen-vl-utils' resize rule."""
    images = processor.image_processor
    return {
        "factor": images.patch_size * images.merge_size,
        "min_pixels": images.size["shortest_edge"],
        "max_pixels": images.size["longest_edge"],
    }


def check_recipe(values: Mapping[str, Any], kind: Literal["rl", "sft"]) -> None:
    """Raise [`RecipeError`] when a recipe is of another kind, has an unknown key or a value of a wrong type."""
    configs = (DataArguments, ModelConfig, VisionGRPOConfig if kind == "rl" else VisionSFTConfig)
    hints = {name: hint for config in configs for name, hint in get_type_hints(config).items()}
    valid = {spec.name for config in configs for spec in fields(config)}
    refuse_other_kind(dict(values), valid)
    check_keys(dict(values), valid)
    fill(make_dataclass("Recipe", [(key, hints[key]) for key in values]), dict(values))
    if values.get("stages") is not None:
        try:
            parse_stages(values["stages"])
        except ValueError as error:
            raise RecipeError(str(error)) from error
    check_share("max_dropped_share", values.get("max_dropped_share", 0))
    check_least("num_proc", values.get("num_proc"), 1)


def check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise RecipeError(f"`{name}`: {value} is a share: from 0 to 1.")


def check_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise RecipeError(f"`{name}`: {value}, needs at least {least}.")


def prepare(
    data_args: DataArguments, model_args: ModelConfig, kind: Literal["rl", "sft"], max_length: int | None
) -> tuple[ProcessorMixin, Dataset, Dataset | None, DataReport]:
    """Processor, training rows, evaluation rows (if any) and report of a run; the main process goes first."""
    with PartialState().main_process_first():
        processor = load_processor(
            model_args.model_name_or_path, data_args.min_pixels, data_args.max_pixels, model_args.model_revision
        )
        load = partial(
            load_rows,
            kind=kind,
            processor=processor,
            system_prompt=data_args.system_prompt,
            max_length=max_length,
            max_dropped_share=data_args.max_dropped_share,
            num_proc=data_args.num_proc,
        )
        rows, report = load(data_args.datasets)
        eval_rows = load(data_args.eval_datasets, name="eval_datasets")[0] if data_args.eval_datasets else None
    report.fingerprint = fingerprint(rows.with_format(None))
    if PartialState().is_main_process:
        print(report, flush=True)
    return processor, rows, eval_rows, report


def load_rows(
    sources: Sequence[Mapping[str, Any]],
    kind: Literal["rl", "sft"],
    processor: ProcessorMixin,
    system_prompt: str | None = None,
    max_length: int | None = None,
    max_dropped_share: float = 0.05,
    num_proc: int | None = None,
    name: str = "datasets",
) -> tuple[Dataset, DataReport]:
    """
    Read, check and convert all `sources`.

    Args:
        sources (`list[dict]`):
            `{path, name?, split?, data_files?, image_folder?, limit?, drop_reasoning?}`: a Hub id, folder or file;
            `image_folder` is where the pictures of a cold-start file lie (default: beside it); `limit` takes the
            first rows only; `drop_reasoning` empties the `<think>` of an SFT row and keeps its answer;
            `pass_rates` is a file of `difficulty.py`, and `pass_rate_band` what to keep of an RL source by it, `[low,
            high]`, both inclusive. What is outside is left out and counted, not a loss by `max_dropped_share`.
        kind (`str`):
            `"rl"`: rows `{prompt, images, solution}`. `"sft"`: rows `{prompt, completion, images}`.
        max_length (`int`, *optional*):
            Rows with more tokens (prompt, image tokens and completion together) are dropped.
        name (`str`, *optional*, defaults to `"datasets"`):
            The recipe's key that holds `sources`, for messages.

    Returns:
        The rows, pictures decoded and resized when a row is read, and the report.

    Raises:
        `RecipeError`: a source that can't be read or has other columns, no rows left, or too many dropped.
    """
    check_share("max_dropped_share", max_dropped_share)
    parts = check_rows(sources, kind, processor, system_prompt, max_length, num_proc, name)
    rows = concatenate_datasets(parts)
    reasons, details = rows["dropped"][:], rows["detail"][:]
    first = 0
    for i, (part, source) in enumerate(zip(parts, sources, strict=True)):
        if source.get("pass_rates"):
            for row, rate in outside_band(part, source, f"{name}[{i}]").items():
                if not reasons[first + row]:
                    reasons[first + row], details[first + row] = OUTSIDE, f"{part[row]['id']}: {rate:g}"
        first += len(part)
    report = DataReport(len(rows), reasons.count(""), dict(Counter(filter(None, reasons))))
    for reason, detail in zip(reasons, details, strict=True):
        if reason and len(report.examples.setdefault(reason, [])) < 20:
            report.examples[reason].append(detail)
    share = (report.read - report.kept - report.dropped.get(OUTSIDE, 0)) / max(report.read, 1)
    if share > max_dropped_share:
        raise RecipeError(
            f"{share:.1%} of the rows had to be dropped, `max_dropped_share` allows {max_dropped_share:.1%}. Mend the "
            f"data, or raise it.\n{report}"
        )
    if not report.kept:
        raise RecipeError(f"`{name}`: no row is left.\n{report}")
    keep = [i for i, reason in enumerate(reasons) if not reason]
    rows = rows.select(keep).remove_columns(["dropped", "detail"])
    return rows.with_transform(partial(_decode, bounds=image_bounds(processor))), report


def check_rows(
    sources: Sequence[Mapping[str, Any]],
    kind: Literal["rl", "sft"],
    processor: ProcessorMixin,
    system_prompt: str | None = None,
    max_length: int | None = None,
    num_proc: int | None = None,
    name: str = "datasets",
) -> list[Dataset]:
    """
    The converted rows of each source, all of them: those that can't be used have a reason in `dropped` and what to
    look at in `detail`. Pictures stay undecoded. See [`load_rows`] for the arguments and errors.
    """
    check_some(sources, name)
    parts = []
    for i, source in enumerate(sources):
        rows, convert, folder = read_source(source, kind, f"{name}[{i}]")
        if source.get("drop_reasoning"):
            if kind == "rl":
                raise RecipeError(f"{name}[{i}]: `drop_reasoning`: an RL row has no reasoning. Remove it.")
            convert = partial(_without_reasoning, convert)
        if source.get("pass_rates") and kind != "rl":
            raise RecipeError(f"{name}[{i}]: `pass_rates` are of RL rows. Remove it.")
        bounds = image_bounds(processor)
        parts.append(
            rows.map(
                partial(
                    _convert_row,
                    convert=convert,
                    folder=folder,
                    kind=kind,
                    processor=processor,
                    bounds=bounds,
                    system_prompt=system_prompt,
                    max_length=max_length,
                    stamp=_stamp(rows, folder),
                ),
                with_indices=True,
                remove_columns=rows.column_names,
                features=Features({**_FEATURES, **_TARGET[kind]}),
                num_proc=num_proc,
                desc=f"Checking {source['path']}",
            )
        )
    return parts


def check_some(sources: Any, name: str = "datasets") -> None:
    """Raise [`RecipeError`] when `sources` is empty or no list."""
    example = "for example [{path: runs/toy/data/rl}]"
    if not sources:
        raise RecipeError(f"`{name}` is empty: name at least one source, {example}.")
    if not isinstance(sources, list | tuple):
        raise RecipeError(f"`{name}`: {sources!r}, needs a list of sources, {example}.")


def check_source(source: Mapping[str, Any], where: str) -> None:
    """Raise [`RecipeError`] when `source` has no path, an unknown key, or a limit that is no number of rows."""
    if not isinstance(source, Mapping):
        raise RecipeError(f"{where}: {source!r}: write {{path: {source}}}.")
    check_keys(dict(source), SOURCE_KEYS, f"{where}.")
    if not isinstance(source.get("path"), str):
        raise RecipeError(f"{where} has no `path`: {dict(source)}.")
    for key in ("name", "split", "image_folder", "pass_rates"):
        if not isinstance(source.get(key, ""), str if key == "split" else str | None):
            raise RecipeError(f"{where}: `{key}`: {source[key]!r}, needs a text.")
    files = source.get("data_files") or []
    if not isinstance(files, str | Mapping | list) or not all(isinstance(file, str) for file in files):
        raise RecipeError(f"{where}: `data_files`: {files!r}, needs the name of a file, or a list of names.")
    if not isinstance(source.get("drop_reasoning", False), bool):
        raise RecipeError(f"{where}: `drop_reasoning`: {source['drop_reasoning']!r}, needs true or false.")
    band = source.get("pass_rate_band")
    if (band is None) != (source.get("pass_rates") is None):
        raise RecipeError(f"{where}: `pass_rates` (a file) and `pass_rate_band` ([low, high]) go together.")
    if band is not None:
        numbers = isinstance(band, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in band)
        if not numbers or len(band) != 2 or not 0 <= band[0] <= band[1] <= 1:
            raise RecipeError(f"{where}: `pass_rate_band`: {band!r}, needs [low, high], between 0 and 1.")
        if not Path(source["pass_rates"]).is_file():
            raise RecipeError(
                f"{where}: `pass_rates`: there is no file {source['pass_rates']}; python -m vision_r1_recipes.data "
                "difficulty makes it."
            )
    limit = source.get("limit")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise RecipeError(f"{where}: `limit`: {limit!r}, needs a whole number of at least 1.")


def question_of(prompt: Sequence[Mapping[str, Any]]) -> str:
    """The last turn of a prompt as text, with markers for its pictures."""
    return "".join(part["text"] or MARKER for part in prompt[-1]["content"])


def digest_of(question: str, solution: str) -> str:
    """By which a file of pass rates knows that a row is still the same."""
    return hashlib.blake2b(json.dumps([question, solution]).encode(), digest_size=8).hexdigest()


def outside_band(rows: Dataset, source: Mapping[str, Any], where: str) -> dict[int, float]:
    """The pass rates of those converted rows of a source that are outside of its band."""
    low, high = source["pass_rate_band"]
    try:
        table = pq.read_table(source["pass_rates"], columns=["id", "digest", "pass_rate"]).to_pylist()
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: `pass_rates`: can't read {source['pass_rates']}: {error}") from error
    rates = {(row["id"], row["digest"]): row["pass_rate"] for row in table}
    outside = {}
    for i, row in enumerate(rows.remove_columns("images")):
        if row["dropped"]:
            continue
        rate = rates.get((row["id"], digest_of(question_of(row["prompt"]), row["solution"])))
        if rate is None:
            raise RecipeError(
                f"{where}: `pass_rates`: {source['pass_rates']} has none for {row['id']}: it was made of other rows. "
                "Make it anew with python -m vision_r1_recipes.data difficulty."
            )
        if not low <= rate <= high:
            outside[i] = rate
    return outside


def _stamp(rows: Dataset, folder: str) -> str:
    """
    Changes with the picture files and with this code: `datasets` keeps the checked rows, and would go on to drop a
    picture that has been mended, or to keep one that is gone.
    """
    digest = hashlib.sha256()
    for code in (Path(__file__), *sorted(Path(grading.__file__).parent.glob("*.py"))):
        digest.update(code.read_bytes())
    for column in sorted({"image", "images"} & set(rows.column_names)):
        feature = rows.features[column]
        if getattr(feature.feature if isinstance(feature, List) else feature, "dtype", None) != "string":
            continue  # embedded
        for value in rows[column][:]:
            for name in [value] if isinstance(value, str) else filter(None, value or []):
                try:
                    stat = os.stat(os.path.join(folder, name))
                    digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns};".encode())
                except OSError:
                    digest.update(f"{name};".encode())
    return digest.hexdigest()


def fingerprint(rows: Dataset) -> str:
    """Digest of what a run learns from: texts and pictures (of those in files, name and size)."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        images = row.pop("images")
        digest.update(json.dumps(row, sort_keys=True).encode())
        for image in images:
            path = Path(image["path"] or "")
            digest.update(
                image["bytes"] if image["bytes"] is not None else f"{path.name} {path.stat().st_size}".encode()
            )
    return digest.hexdigest()


def local_files(source: Mapping[str, Any]) -> list[str]:
    """The files here that a source names; none when it is a folder or a Hub id, in which `datasets` finds them."""
    path, files = Path(source["path"]), source.get("data_files") or []
    files = [files] if isinstance(files, str) else files
    paths = [str(path)] if path.is_file() else [str(path / name) for name in files] if path.is_dir() else []
    if absent := [name for name in paths if not Path(name).is_file()]:
        raise FileNotFoundError(f"no file {', '.join(absent)}")
    if paths and Path(paths[0]).suffix not in BUILDERS:
        raise ValueError(f"{paths[0]} is not a .parquet, .json or .jsonl file")
    return paths


def open_source(source: Mapping[str, Any], where: str) -> Dataset:
    """The rows of one source (see [`load_rows`]) as they are; `where` names it in messages."""
    check_source(source, where)
    path, split = Path(source["path"]), source.get("split", "train")
    files = source.get("data_files")
    files = [files] if isinstance(files, str) else files
    try:
        if paths := local_files(source):
            builder = BUILDERS[Path(paths[0]).suffix]
            rows = load_dataset(builder, data_files={split.partition("[")[0]: paths}, split=split)
        else:
            cache = str(Path(HF_DATASETS_CACHE, _content(path))) if path.is_dir() else None
            rows = load_dataset(source["path"], source.get("name"), data_files=files, split=split, cache_dir=cache)
    except Exception as error:
        kinds = "a folder, a .parquet, .json or .jsonl file, or a Hub id that this machine can reach"
        hint = "" if path.exists() else f" There is no such path here; `path` must be {kinds}."
        found = [path / name for name in files] if path.is_dir() and files else sorted(path.rglob("*"))
        bad = next(filter(None, map(_damage, found)), None) or _cause(error)
        raise RecipeError(f"{where}: can't read {dict(source)}: {bad}.{hint}") from error
    if source.get("limit") is not None:
        rows = rows.select(range(min(source["limit"], len(rows))))
    return rows


def _damage(file: Path) -> str | None:
    """What is wrong with one of several files: `datasets` says that something is, in one of them."""
    if file.suffix not in BUILDERS or not file.is_file():
        return None
    try:
        rows = load_dataset(BUILDERS[file.suffix], data_files=str(file), split="train", streaming=True)
        for _ in rows.with_format("arrow").iter(1000):
            pass
    except Exception as error:
        return f"{file}: {_cause(error)}"
    return None


def _cause(error: BaseException) -> str:
    """Kind and message of the first error of those that made `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split()).rstrip(".") or "the file is empty or cut off"
    return f"{type(error).__name__}: {said}"


def _content(folder: Path) -> str:
    """
    Changes with the data files of a folder and its place: with a dataset card in it, `datasets` goes by the name of
    the folder alone, and would take the rows of another one, or of what was there before.
    """
    digest = hashlib.sha256(str(folder.absolute()).encode())
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (*BUILDERS, ".csv", ".arrow", ".md")):
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns};".encode())
    return digest.hexdigest()[:16]


def read_source(source: Mapping[str, Any], kind: str, where: str) -> tuple[Dataset, Callable, str]:
    """
    `(rows, converter, image folder)` of one source: pictures undecoded, and a function from a row to `(turns before
    the answer, answer, pictures)` that raises [`Drop`]. `kind` is `"rl"`, `"sft"`, or `"bridge"` for any of their
    layouts.
    """
    rows = open_source(source, where)
    columns = set(rows.column_names)
    targets = {"rl": ("solution",), "sft": ("completion",), "bridge": ("solution", "completion")}[kind]
    if kind != "sft" and {"images", "problem", "answer"} <= columns:
        convert = _from_geometry3k
    elif kind != "rl" and "conversations" in columns and columns & {"image", "images"}:
        convert = _from_conversations
    elif {"prompt", "images"} <= columns and columns & set(targets):
        convert = _from_ready
    else:
        layouts = {
            "rl": "images, problem, answer",
            "sft": "conversations with image or images",
            "bridge": "images, problem, answer, or conversations with image or images",
        }
        raise RecipeError(
            f"{where}: {source['path']} has the columns {', '.join(sorted(columns))}; a run of kind {kind} needs "
            f"{layouts[kind]}, or prompt, images, {' or '.join(targets)}."
        )
    for column in columns & {"image", "images"}:
        feature = rows.features[column]
        if isinstance(feature, List) and isinstance(feature.feature, Image):
            rows = rows.cast_column(column, List(Image(decode=False)))
        elif isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
    return rows, convert, image_folder(source, where)


def image_folder(source: Mapping[str, Any], where: str) -> str:
    """The folder in which the pictures of a source's rows are looked for."""
    path, named = Path(source["path"]), source.get("image_folder")
    if named and not Path(named).is_dir():
        raise RecipeError(f"{where}: `image_folder`: {named} is not a folder.")
    return str(named or (path if path.is_dir() else path.parent))


class Drop(Exception):
    """Why a row can't be used: a reason to count by, and what to look at."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail


def _from_geometry3k(row):
    answer = "" if row["answer"] is None else str(row["answer"])
    if not answer.strip():
        raise Drop("empty answer")
    return [("user", row["problem"] or "")], answer, pictures(row["images"])


def pictures(images) -> list[dict[str, Any]]:
    """One picture or a list, each a path or `{bytes, path}`, as a list of the latter."""
    images = [] if images is None else [images] if isinstance(images, (str, dict)) else images
    return [image if isinstance(image, dict) else {"path": image, "bytes": None} for image in images]


def _from_conversations(row):
    turns = []
    for turn in row["conversations"] or []:
        if turn["from"] not in ROLES:
            raise Drop("unknown role", f"from: {turn['from']!r}")
        turns.append((ROLES[turn["from"]], turn["value"] or ""))
    roles = [role for role, _ in turns if role != "system"]
    if roles != ["user", "assistant"]:
        raise Drop("not one question and one answer", f"turns: {', '.join(roles)}")
    if not turns[-1][1].strip():
        raise Drop("empty answer")
    return turns[:-1], turns[-1][1], pictures(row["images"] if row.get("images") is not None else row.get("image"))


def _without_reasoning(convert, row):
    turns, target, images = convert(row)
    target, count = re.subn(r"<think>.*?</think>", "<think> </think>", target, flags=re.DOTALL)
    if count != 1:
        raise Drop("no reasoning to leave out", f"{count} x <think> ... </think>")
    return turns, target, images


def _from_ready(row):
    """TRL's own columns; a string prompt or completion is one turn, content may be text with markers or parts."""

    def turns(messages, role):
        if isinstance(messages, str):
            return [(role, messages)]
        flat = []
        for message in messages or []:
            content = message["content"] or ""
            if not isinstance(content, str):
                content = "".join(MARKER if part["type"] == "image" else part["text"] for part in content)
            flat.append((message["role"], content))
        return flat

    prompt = turns(row["prompt"], "user")
    if "solution" in row:
        target = "" if row["solution"] is None else str(row["solution"])
    else:
        completion = turns(row["completion"], "assistant")
        if len(completion) != 1:
            raise Drop("not one question and one answer", f"completion: {', '.join(role for role, _ in completion)}")
        target = completion[0][1]
    if not target.strip():
        raise Drop("empty answer")
    return prompt, target, pictures(row["images"])


def _convert_row(row, index, convert, folder, kind, processor, bounds, system_prompt, max_length, stamp):
    name = str(row.get("id") or f"row {index}")
    empty = {"solution": ""} if kind == "rl" else {"completion": []}
    try:
        turns, target, images = convert(row)
        if kind == "rl" and (reason := check_gold(target)):
            raise Drop("answer can't be graded", f"{target!r}: {reason}")
        if system_prompt is not None:
            turns = [("system", system_prompt), *(turn for turn in turns if turn[0] != "system")]
        markers = sum(text.count(MARKER) for _, text in turns)
        if not images:
            raise Drop("no image")
        if markers != len(images):
            raise Drop("image markers don't match the images", f"{markers} x {MARKER}, {len(images)} images")
        images = [_check_image(image, folder, bounds) for image in images]
        prompt = [{"role": role, "content": _parts(text)} for role, text in turns]
        completion = [{"role": "assistant", "content": [{"type": "text", "text": target}]}]
        tokens = _count_tokens(prompt + (completion if kind == "sft" else []), images, kind, processor, bounds)
        if drop := too_long(tokens, max_length):
            raise drop
    except Drop as drop:
        detail = f"{name}: {drop.detail}" if drop.detail else name
        return {"prompt": [], "images": [], "id": name, "tokens": 0, "dropped": drop.reason, "detail": detail, **empty}
    stored = [{"bytes": image["bytes"], "path": image["path"]} for image in images]
    made = {"prompt": prompt, "images": stored, "id": name, "tokens": tokens, "dropped": "", "detail": ""}
    return {**made, "solution": target} if kind == "rl" else {**made, "completion": completion}


def too_long(tokens: int, limit: int | None) -> Drop | None:
    """Why a row of so many tokens can't be used, if that is so."""
    if limit is None or tokens <= limit:
        return None
    return Drop("too many tokens", f"{tokens} tokens, the limit is {limit}")


def _parts(text: str) -> list[dict[str, str | None]]:
    parts: list[dict[str, str | None]] = []
    for i, piece in enumerate(text.split(MARKER)):
        if i:
            parts.append({"type": "image", "text": None})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def open_image(image: Mapping[str, Any], folder: str) -> tuple[str | None, tuple[int, int]]:
    """Absolute path (of a picture in a file) and `(width, height)`; decodes it: a run must not die on it later."""
    path = image["path"]
    if image["bytes"] is None:
        path = str(Path(folder, path or "").absolute())
        if not Path(path).is_file():
            raise Drop("missing image", path)
    try:
        with PILImage.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else path) as picture:
            picture.load()
            return path, picture.size
    except UnidentifiedImageError as error:  # its message names an object in memory
        raise Drop("broken image", f"{path or 'embedded'}: in no format of pictures, or empty") from error
    except Exception as error:
        raise Drop("broken image", f"{path or 'embedded'}: {error}") from error


def open_picture(image: Mapping[str, Any]) -> PILImage.Image:
    """A stored picture, `{bytes, path}`, as it is."""
    return PILImage.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])


def _check_image(image: Mapping[str, Any], folder: str, bounds: Mapping[str, int]) -> dict[str, Any]:
    """The stored picture with its size after resizing."""
    path, (width, height) = open_image(image, folder)
    try:
        for _ in range(2):  # once when the row is read, once in the processor
            height, width = smart_resize(height, width, **bounds)
            if not height * width:  # the rule rounds the short side of a thin picture down to nothing
                raise ValueError(f"too thin for {bounds['max_pixels']} pixels")
    except ValueError as error:
        raise Drop("impossible image size", f"{path or 'embedded'}: {error}") from error
    return {"bytes": image["bytes"], "path": path, "height": height, "width": width}


def _without_nulls(messages: list[dict]) -> list[dict]:
    """Arrow fills `text: None` into image parts; chat templates want the key absent."""
    return [
        {**message, "content": [{k: v for k, v in part.items() if v is not None} for part in message["content"]]}
        for message in messages
    ]


def generation_prefix(processor: ProcessorMixin, **template_kwargs) -> str:
    """
    `<think>` where the chat template's generation prompt opens the reasoning itself (Qwen3-VL-Thinking's does), so
    that no completion holds the tag; else empty. Rewards and evaluation put it before a completion.
    """
    question = [{"role": "user", "content": "?"}]  # text: a language model's template may know no parts
    text = processor.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **template_kwargs)
    return "<think>" if text.rstrip().endswith("<think>") else ""


def _count_tokens(messages, images, kind, processor, bounds) -> int:
    text = processor.apply_chat_template(_without_nulls(messages), tokenize=False, add_generation_prompt=kind == "rl")
    if text.count(processor.image_token) != len(images):
        raise Drop("image markers don't match the images", f"the text holds the model's own {processor.image_token}")
    in_pictures = sum(image["height"] * image["width"] // bounds["factor"] ** 2 - 1 for image in images)
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) + in_pictures


def _decode(batch: dict[str, list], bounds: Mapping[str, int]) -> dict[str, list]:
    """The dataset's transform: messages as chat templates want them, pictures decoded and resized."""

    def picture(image):
        opened = open_picture(image)
        limits = {"min_pixels": bounds["min_pixels"], "max_pixels": bounds["max_pixels"]}
        return fetch_image({"image": opened, **limits}, image_patch_size=bounds["factor"] // 2)

    for column in ("prompt", "completion"):
        if column in batch:
            batch[column] = [_without_nulls(messages) for messages in batch[column]]
    if "images" in batch:
        batch["images"] = [[picture(image) for image in images] for images in batch["images"]]
    return batch


def main(argv: Sequence[str] | None = None) -> int | None:
    from . import evaluate

    parser = argparse.ArgumentParser(prog="python -m vision_r1_recipes.data")
    commands = parser.add_subparsers(dest="command", required=True)
    audit = commands.add_parser(
        "audit",
        allow_abbrev=False,
        help="what is wrong with a recipe's data; exit code 1 for too much of it",
        description="What is wrong with a recipe's data. Other options, --key value, are the recipe's.",
    )
    audit.add_argument("recipe")
    audit.add_argument("--against", nargs="+", default=(), metavar="PATH[:SPLIT]", help="sets that must not be in it")
    audit.add_argument("--processor", help="folder or Hub id; defaults to the recipe's model")
    audit.add_argument("--shortest_reasoning", type=int, help="tokens that a completion must have at least to think")
    audit.add_argument("--allow", nargs="+", default=(), metavar="FINDING=SHARE", help="of a set's rows, from 0 to 1")
    audit.add_argument("--num_proc", type=int, help="processes that look at the pictures")
    audit.add_argument("--output_dir", help="defaults to runs/audit/RECIPE")
    difficulty = commands.add_parser(
        "difficulty",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        help="how often a model is right on every RL prompt; takes the options of evaluate, too",
        description="How often a model is right on every prompt of an RL recipe. What has no --help text here is "
        "explained by python -m vision_r1_recipes.evaluate --help; other options, --key value, are the recipe's.",
    )
    difficulty.add_argument("recipe")
    difficulty.add_argument("model", help="folder or Hub id; with a server, the name that it knows")
    for action in evaluate.argument_parser()._actions:
        if action.dest not in ("help", "model", "data", "split", "limit"):  # the recipe's sources say which rows
            difficulty._add_action(action)
    args, rest = parser.parse_known_args(argv)
    values = merge(load(args.recipe), parse_overrides(rest))
    options = {k: v for k, v in vars(args).items() if k not in ("command", "recipe") and v is not None}
    if args.command == "audit":
        try:
            from .audit import report
        except ImportError as error:
            raise RecipeError(f"{error}: pip install 'vision-r1-recipes[audit]'.") from error
        return report(values, args.recipe, **options)
    from .difficulty import measure
    from .progress import stops_kindly

    with stops_kindly():
        measure(values, **options)


if __name__ == "__main__":
    from vision_r1_recipes import data, preflight  # this module is `__main__`: its classes are others than theirs

    with preflight.kind_errors():
        sys.exit(data.main())
