"""
What has been asked and answered: one SQLite file per run (per rank of a cluster's run).

A response is committed when it arrives, so that a killed run repeats no finished request; a half-written transaction
is undone by SQLite when the file is opened again. One process writes at a time, others may read meanwhile.
"""

from __future__ import annotations

import fcntl
import heapq
import sqlite3
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from ..recipe import RecipeError
from .steps import Generation, Row


_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    position INTEGER PRIMARY KEY, id TEXT NOT NULL, source TEXT NOT NULL, digest TEXT NOT NULL, rule TEXT, detail TEXT
);
CREATE INDEX IF NOT EXISTS ids ON rows (id);
CREATE TABLE IF NOT EXISTS responses (
    position INTEGER NOT NULL, step TEXT NOT NULL, text TEXT NOT NULL, reasoning TEXT NOT NULL,
    finish_reason TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    seconds REAL NOT NULL, arrived REAL NOT NULL, PRIMARY KEY (position, step)
) WITHOUT ROWID;
"""
_GENERATION = "text, reasoning, finish_reason, prompt_tokens, completion_tokens"


class Journal:
    """
    The journal at `path`, made if absent; a context manager.

    `rows` holds every row of the sources that has been looked at, with the `rule` that rejected it *before or during*
    the requests; what the rules say about finished rows is not kept here, they may change. `shared`: hosts may share
    the file system.
    """

    def __init__(self, path: Path, write: bool = True, shared: bool = False):
        self.path, self._lock = path, None
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115 - held as long as the journal
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RecipeError(f"another process is working on {path.parent}: wait for it or stop it.") from error
        elif not path.is_file():
            raise RecipeError(f"{path} is missing: there is no bridge run in {path.parent}.")
        self.db = sqlite3.connect(path, isolation_level=None)
        try:
            if write:
                # WAL is fast, and not for a file that several hosts have open. In either mode a killed process loses
                # nothing, a power cut the last rows.
                self.db.execute(f"PRAGMA journal_mode={'TRUNCATE' if shared else 'WAL'}")
                self.db.execute("PRAGMA synchronous=NORMAL")
                self.db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise RecipeError(f"{path} can't be used: {error}.") from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: Any) -> None:
        self.db.close()
        if self._lock:
            self._lock.close()

    def add(self, row: Row) -> str | None:
        """
        Enter a row, at most once; returns the rule that has rejected it before, if one has.

        Raises:
            `RecipeError`: another row stands at its position.
        """
        found = self.db.execute("SELECT rule, id, digest FROM rows WHERE position = ?", (row.position,)).fetchone()
        if found is None:
            self.db.execute(
                "INSERT INTO rows VALUES (?, ?, ?, ?, NULL, '')", (row.position, row.id, row.source, row.digest)
            )
            return None
        check_same(row, *found[1:])
        return found[0]

    def reject(self, position: int, rule: str | None, detail: str = "") -> None:
        """Note why a row goes no further; `None` takes it back."""
        self.db.execute("UPDATE rows SET rule = ?, detail = ? WHERE position = ?", (rule, detail, position))

    def forgive(self, rule: str) -> None:
        """Take back all rejections by a rule."""
        self.db.execute("UPDATE rows SET rule = NULL, detail = '' WHERE rule = ?", (rule,))

    def put(self, position: int, step: str, generation: Generation, seconds: float, arrived: float) -> None:
        values = (generation.text, generation.reasoning, generation.finish_reason)
        tokens = (generation.prompt_tokens, generation.completion_tokens)
        self.db.execute(
            "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (position, step, *values, *tokens, seconds, arrived),
        )

    def get(self, position: int, step: str) -> Generation | None:
        query = f"SELECT {_GENERATION} FROM responses WHERE position = ? AND step = ?"
        found = self.db.execute(query, (position, step)).fetchone()
        return Generation(*found) if found else None

    def taken(self, row: Row) -> bool:
        """Whether a row before this one has its id."""
        query = "SELECT 1 FROM rows WHERE id = ? AND position < ?"
        return self.db.execute(query, (row.id, row.position)).fetchone() is not None

    def entries(self) -> Iterator[dict[str, Any]]:
        """All rows in order."""
        names = ("position", "id", "source", "digest", "rule", "detail")
        for found in self.db.execute(f"SELECT {', '.join(names)} FROM rows ORDER BY position"):
            yield dict(zip(names, found, strict=True))

    def left(self, step: str, again: Sequence[str] = ()) -> int:
        """Rows that are not rejected, or by one of the rules `again`, and have no answer to `step`."""
        answered = "SELECT position FROM responses WHERE step = ?"
        pending = f"(rule IS NULL OR rule IN ({', '.join('?' * len(again))}))"
        query = f"SELECT COUNT(*) FROM rows WHERE {pending} AND position NOT IN ({answered})"
        return self.db.execute(query, (*again, step)).fetchone()[0]

    def __len__(self) -> int:
        return self.db.execute("SELECT COUNT(*) FROM rows").fetchone()[0]

    def requests(self) -> dict[str, dict[str, float]]:
        """Per step: responses, prompt and completion tokens, seconds of requests added up."""
        query = "SELECT step, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens), SUM(seconds) FROM responses"
        names = ("responses", "prompt_tokens", "completion_tokens", "seconds")
        return {step: dict(zip(names, v, strict=True)) for step, *v in self.db.execute(query + " GROUP BY step")}


def check_same(row: Row, key: str, digest: str) -> None:
    """Raise [`RecipeError`] when another row stood at this position when the run was begun."""
    if (key, digest) != (row.id, row.digest):
        raise RecipeError(
            f"row {row.position} of the sources is {row.id}, and was {key} with other content when the run was begun: "
            "the sources have changed. Name a new output_dir."
        )


def merged(journals: Sequence[Journal]) -> Iterator[tuple[dict[str, Any], Journal]]:
    """The rows of all ranks in the order of their positions, each with the journal that holds it."""
    streams = [zip(journal.entries(), repeat(journal)) for journal in journals]
    return heapq.merge(*streams, key=lambda found: found[0]["position"])
