"""Rows for the bridge from the sources of a recipe."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data import MARKER, Drop, check_some, open_image, read_source
from ..recipe import RecipeError
from ..rewards import check_gold
from .rules import final_answer
from .steps import Rejected, Row


# How LLaVA-CoT-100K and Mulberry-260K end their answers.
_CONCLUSIONS = (r"<CONCLUSION>(.*?)</CONCLUSION>", r"###\s*The final answer is:\s*(.*)")


class Sources:
    """
    The rows of all sources, read lazily in a fixed order, in every layout that `data.py` knows.

    The answer of a conversation is taken from `<CONCLUSION>`, "### The final answer is:", or what
    `rules.final_answer` finds in it. A row without an id is named after its number; with several sources the source's
    name stands before every id.
    """

    def __init__(self, sources: Sequence[Mapping[str, Any]]):
        check_some(sources)
        self.parts: list[tuple[str, Dataset, Callable, str]] = []
        for i, source in enumerate(sources):
            if "drop_reasoning" in source:
                raise RecipeError(f"datasets[{i}]: `drop_reasoning` is for the cold start. Remove it.")
            rows, convert, folder = read_source(source, "bridge", f"datasets[{i}]")
            files = source.get("data_files")
            stem = "-".join(Path(f).stem for f in ([files] if isinstance(files, str) else files or []))
            stem = stem or Path(source["path"]).stem
            name = stem if all(stem != taken for taken, *_ in self.parts) else f"{stem}-{i}"
            self.parts.append((name, rows, convert, folder))

    def __len__(self) -> int:
        return sum(len(rows) for _, rows, *_ in self.parts)

    def read(self, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Row, Rejected | None]]:
        """The rows of one rank, every `world_size`-th, each with what is wrong with it, pictures apart."""
        start = 0
        for part in self.parts:
            for index in range((rank - start) % world_size, len(part[1]), world_size):
                yield self._row(*part, index, start + index)
            start += len(part[1])

    def __getitem__(self, position: int) -> Row:
        index = position
        for part in self.parts:
            if index < len(part[1]):
                return self._row(*part, index, position)[0]
            index -= len(part[1])
        raise IndexError(position)

    def _row(
        self, name: str, rows: Dataset, convert: Callable, folder: str, index: int, position: int
    ) -> tuple[Row, Rejected | None]:
        raw = rows[index]
        key = f"row-{index}" if raw.get("id") in (None, "") else str(raw["id"])
        key = f"{name}/{key}" if len(self.parts) > 1 else key
        try:
            turns, answer, images = convert(raw)
        except Drop as drop:
            return Row(position, key, name, "", "", digest=_digest(key)), Rejected(drop.reason, drop.detail)
        except (KeyError, TypeError, AttributeError) as error:
            malformed = Rejected("malformed row", f"{type(error).__name__}: {error}")
            return Row(position, key, name, "", "", digest=_digest(key)), malformed
        text = "\n".join(text for role, text in turns if role == "user")
        if "conversations" in raw or "completion" in raw:
            stated = [found for pattern in _CONCLUSIONS for found in re.findall(pattern, answer, re.DOTALL)]
            answer = final_answer(stated[-1].strip() if stated else answer) or ""
        digest = _digest(key, text, answer, [(i["path"], len(i["bytes"] or b"")) for i in images])
        images = [i if i["bytes"] is not None else {**i, "path": str(Path(folder, i["path"] or ""))} for i in images]
        row = Row(position, key, name, text.replace(MARKER, "").strip(), answer.strip(), images, digest)
        return row, _problem(row, text.count(MARKER))


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def _problem(row: Row, markers: int) -> Rejected | None:
    if not row.images:
        return Rejected("no image")
    if markers not in (0, len(row.images)):
        return Rejected("image markers don't match the images", f"{markers} x {MARKER}, {len(row.images)} images")
    if not row.question:
        return Rejected("empty question")
    if not row.answer:
        return Rejected("empty answer")
    reason = check_gold(row.answer)
    return Rejected("answer can't be graded", f"{row.answer!r}: {reason}") if reason else None


def check_pictures(row: Row) -> None:
    """Decode every picture once; raises [`Rejected`] for the first that is missing or broken."""
    for image in row.images:
        try:
            open_image(image, "")
        except Drop as drop:
            raise Rejected(drop.reason, drop.detail) from drop
