"""JSON lines of what a long job has finished, so that the same command goes on after a kill and repeats nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .recipe import RecipeError


@contextlib.contextmanager
def progress(
    path: Path, settings: Mapping[str, Any], doing: str = "evaluating into"
) -> Iterator[tuple[list[dict[str, Any]], Callable[[Mapping[str, Any]], None]]]:
    """
    Keep `path` for this process: the lines that are in it, and a function that adds one.

    Args:
        path (`Path`): The file; the first of its lines is `settings`.
        settings (`dict`): What the lines depend on, as JSON.
        doing (`str`, *optional*): What the process does with the folder, for the message.

    Raises:
        `RecipeError`: another process has the file, or its lines are of other settings.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RecipeError(f"another process is {doing} {path.parent}: wait for it, or end it.") from error

        def add(line: Mapping[str, Any]) -> None:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()

        file.seek(0)
        whole = file.read()
        whole = whole[: whole.rfind(b"\n") + 1]  # a killed run may have left the beginning of a line
        file.truncate(len(whole))
        first, *lines = map(json.loads, whole.splitlines() or [b"null"])
        if first is None:
            add(settings)
        else:
            check_same(first, settings, path.parent)
        yield lines, add


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise [`RecipeError`] naming the settings in `now` that were others in `before`, which is what `folder` has."""
    now = json.loads(json.dumps(now))
    differ = [key for key in now if before.get(key) != now[key]]
    if differ:
        said = "; ".join(f"`{key}` was {before.get(key)}, is {now[key]}"[:200] for key in differ)
        raise RecipeError(f"{folder} holds another evaluation: {said}. Delete it, or name another `--output_dir`.")
