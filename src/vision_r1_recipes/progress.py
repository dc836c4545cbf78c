"""JSON lines of what a long job has finished, so that the same command goes on after a kill and repeats nothing."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .recipe import RecipeError


@contextlib.contextmanager
def stops_kindly() -> Iterator[None]:
    """Ctrl-C inside ends the process with a sentence and exit code 130, whatever exception a library makes of it."""
    pressed = False

    def press(*_):
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # a shell's background jobs
        signal.signal(signal.SIGINT, press)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if not pressed and not isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, before)
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second one, until the interpreter has ended
        print("stopped; what was answered is kept. Run the same command again to go on.", file=sys.stderr)
        sys.exit(130)
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def progress(
    path: Path, settings: Mapping[str, Any], doing: str = "evaluating into", keys: Sequence[str] = ()
) -> Iterator[tuple[list[dict[str, Any]], Callable[[Mapping[str, Any]], None]]]:
    """
    Keep `path` for this process: the lines that are in it, and a function that adds one.

    Args:
        path (`Path`): The file; the first of its lines is `settings`.
        settings (`dict`): What the lines depend on, as JSON.
        doing (`str`, *optional*): What the process does with the folder, for the message.
        keys (`list[str]`, *optional*): What each line but the first has.

    Raises:
        `RecipeError`: another process has the file, its lines are of other settings, or one is none.
    """
    check_folder(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+b")
    except OSError as error:
        raise RecipeError(f"`output_dir`: can't write {path}: {error.strerror}. Name another one.") from error
    with opened as file:
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
        lines = [_read(line, i, path, keys if i > 1 else ()) for i, line in enumerate(whole.split(b"\n")[:-1], 1)]
        if lines:
            check_same(lines.pop(0), settings, path.parent)
        else:
            add(settings)
        yield lines, add


def _read(line: bytes, number: int, path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if isinstance(found, dict) and found.keys() >= set(keys):
            return found
    except ValueError:
        pass
    # What was answered after a line that is lost was drawn after it.
    fix = "Delete the file,"
    if number > 1:
        fix = f"Delete it and those after it, `sed -i '{number},$d' {shlex.quote(str(path))}`,"
    raise RecipeError(f"{path} is damaged in line {number}. {fix} and run the same command again.")


def check_folder(folder: Path) -> None:
    """Raise [`RecipeError`] when `folder`, or one that it would be in, is a file or can't be written."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RecipeError(f"`output_dir`: {folder} can't be a folder, {there} is a file. Name another one.")
    if not os.access(there, os.W_OK):
        raise RecipeError(f"`output_dir`: {folder} can't be written, {there} is read-only. Name another one.")


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise [`RecipeError`] naming the settings in `now` that were others in `before`, which is what `folder` has."""
    now = json.loads(json.dumps(now))
    differ = [key for key in now if before.get(key) != now[key]]
    if differ:
        said = "; ".join(f"`{key}` was {before.get(key)}, is {now[key]}"[:200] for key in differ)
        fix = "Delete it, or give this one, by itself, another `--output_dir`."
        raise RecipeError(f"{folder} holds another evaluation: {said}. {fix}")
