"""
Run a bridge recipe: here, or its steps one after another as jobs (`cluster.py`).

```yaml
datasets: [{path: runs/toy/data/rl}]      # sources, as in every recipe
mllm: {model: ..., base_url: ...}         # looks at the pictures; see `EndpointConfig`
reasoner: {model: ..., base_url: ...}     # reads and thinks
prompts: {pseudo_cot: ..., description: ..., reasoning: ...}
rules: data/rules/vision_r1.yaml
```
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from tqdm import tqdm

from .. import preflight, recipe
from ..recipe import RecipeError
from .endpoint import AllRefused, Endpoint, EndpointConfig, served
from .journal import Journal
from .rows import Sources, check_pictures
from .rules import Rules
from .steps import (
    DUPLICATE,
    REFUSED,
    STEPS,
    UNANSWERED,
    Generation,
    Messages,
    Prompts,
    Rejected,
    Row,
    bridge,
    check,
)


# Not the row's fault, or mended without a request: another run is another chance.
AGAIN = (UNANSWERED, "missing image", "broken image")
FORMATS = ("llava_cot", "mulberry")


@dataclass
class BridgeConfig:
    """
    The keys of a bridge recipe.

    Args:
        output_dir (`str`): Folder for the journal, the dataset and the report.
        datasets (`list[dict]`): Sources; see `Sources`.
        mllm (`dict`), reasoner (`dict`): Keys of `EndpointConfig`.
        prompts (`dict`): Template files of the steps; `pseudo_cot: null` leaves the first step out.
        rules (`str`): A file of `Rules`.
        show_answer (`bool`, *optional*, defaults to `True`): Whether the reasoner is told the answer `[author]`.
        formats (`list[str]`, *optional*): Released JSON schemas to write beside the parquet
            shards: `llava_cot`, `mulberry`.
        cluster (`dict`, *optional*): Run the steps as jobs; see `cluster.py`.
    """

    output_dir: str
    datasets: list[dict]
    mllm: dict
    reasoner: dict
    prompts: dict
    rules: str
    show_answer: bool = True
    formats: list[str] = field(default_factory=list)
    cluster: dict | None = None


class Run:
    """A recipe, read and checked: everything that needs no server. Raises [`RecipeError`] with all that is wrong."""

    def __init__(self, values: dict[str, Any]):
        recipe.refuse_other_kind(values, get_type_hints(BridgeConfig))
        self.values = values
        self.config = config = recipe.fill(BridgeConfig, values)
        problems = recipe.unknown_keys(config.prompts, STEPS, "prompts.")
        self.endpoints = {}
        for name in ("mllm", "reasoner"):
            try:
                self.endpoints[name] = recipe.fill(EndpointConfig, getattr(config, name), f"{name}.")
                problems += self.endpoints[name].problems(name)
            except RecipeError as error:
                problems.append(str(error))
        for make in (self._prompts, self._rules):
            try:
                make()
            except RecipeError as error:
                problems.append(str(error))
        problems += [
            f"`formats`: {name!r} is none of {', '.join(FORMATS)}." for name in set(config.formats) - {*FORMATS}
        ]
        preflight.check(problems)
        self.folder = Path(config.output_dir)

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """The run in `folder`."""
        path = Path(folder, "recipe.yaml")
        if not path.is_file():
            raise RecipeError(f"there is no bridge run in {folder}: no recipe.yaml.")
        values = recipe.load(path)
        prompts = {step: str(Path(folder, f"{step}.jinja")) for step, name in values["prompts"].items() if name}
        own = {"output_dir": str(folder), "rules": str(Path(folder, "rules.yaml")), "prompts": prompts}
        return cls({**values, **own})

    def begin(self) -> None:
        """
        Keep the recipe with the run, and the prompts and rules that it names.

        Raises:
            `RecipeError`: the run was begun with other settings that its responses depend on.
        """
        path = self.folder / "identity.json"
        before = self.identity
        if path.is_file():
            try:
                before = json.loads(path.read_text())
            except ValueError:
                raise RecipeError(f"{path} can't be read: name a new output_dir, or restore it.") from None
        if changed := recipe.differences(before, self.identity):
            listed = "\n".join(f"`{key}`: was {old!r}, is {new!r}" for key, (old, new) in changed.items())
            raise RecipeError(f"{self.folder} was begun with other settings: name a new output_dir.\n{listed}")
        recipe.save(self.values, self.folder)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(self.identity, indent=2) + "\n")
        os.replace(draft, path)
        (self.folder / "rules.yaml").write_text(recipe.dump(recipe.load(self.config.rules)), encoding="utf-8")
        for step, source in self.prompts.sources.items():
            (self.folder / f"{step}.jinja").write_text(source, encoding="utf-8")

    def _prompts(self) -> None:
        self.prompts = Prompts(self.config.prompts, self.config.show_answer)

    def _rules(self) -> None:
        self.rules = Rules.load(self.config.rules)

    def endpoint(self, step: str) -> str:
        return "reasoner" if step == STEPS[-1] else "mllm"

    @property
    def identity(self) -> dict[str, Any]:
        """What the responses depend on: models, sampling, the prompts' hashes."""
        found = {f"{name}.{key}": v for name, e in self.endpoints.items() for key, v in e.identity.items()}
        found |= {f"prompts.{step}": self.prompts.hashes.get(step) for step in STEPS}
        return {**found, "show_answer": self.config.show_answer, "tasks": (self.config.cluster or {}).get("tasks", 1)}

    def journal(self, rank: int = 0) -> Journal:
        """The journal of a rank, to write to."""
        path = self.folder / "journal" / f"{rank:05d}.sqlite"
        return Journal(path, shared=self.config.cluster is not None)

    @contextlib.contextmanager
    def journals(self) -> Iterator[list[Journal]]:
        """Those of all ranks that have begun, for reading."""
        with contextlib.ExitStack() as stack:
            paths = sorted(self.folder.glob("journal/*.sqlite"))
            if not paths:
                raise RecipeError(f"there is no journal in {self.folder}: nothing has been asked yet.")
            yield [stack.enter_context(Journal(path, write=False)) for path in paths]


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP do what Ctrl-C does: end the requests and the servers that were started."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    if before[signal.SIGHUP] != signal.SIG_IGN:  # no nohup
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ask(run: Run) -> Sources:
    """Take all rows through all steps here, with the servers that the recipe starts."""
    sources = Sources(run.config.datasets)
    with run.journal() as journal:
        run.begin()
        work_rank(run, sources, journal)
    return sources


def work_rank(
    run: Run, sources: Sources, journal: Journal, rank: int = 0, world_size: int = 1, only: str | None = None
) -> None:
    """
    Take the rows of one rank through the steps, asking nothing again that has been answered; no server is started
    when nothing is left to ask. Afterwards each of them has its answer or is rejected.

    Args:
        only (`str`, *optional*): The one step to ask for; those before it are taken from the journal.

    Raises:
        `RecipeError`: what would happen to all rows: a wrong recipe or source, no permission, a server that is gone.
    """
    total = len(range(rank, len(sources), world_size))
    if len(journal) > total:
        raise RecipeError(
            f"`datasets`: {total} rows for {journal.path}, which holds {len(journal)}: the sources are shorter than "
            "when it was begun."
        )
    if remaining(journal, total, only):
        names = [run.endpoint(only)] if only else list(run.endpoints)
        for name in names:
            run.endpoints[name].key()  # missed before a server starts
        with contextlib.ExitStack() as stack:
            stack.enter_context(sigterm_interrupts())
            endpoints = {}
            for name in names:
                log = run.folder / "logs" / f"{only or name}-{rank:05d}.log"
                config = stack.enter_context(served(run.endpoints[name], log))
                endpoints[name] = Endpoint(config, world_size)
            try:
                asyncio.run(_Worker(run, journal, endpoints, only).work(sources, rank, world_size))
            except sqlite3.Error as error:
                raise RecipeError(
                    f"can't write to {journal.path}: {error}. What was answered before is kept: make room, then run "
                    "the same command again."
                ) from error
    if left := journal.left(only or STEPS[-1]) + total - len(journal):
        raise RecipeError(f"{left} of {total} rows have not come to their end: this is a bug, please report it.")


def remaining(journal: Journal, total: int, only: str | None = None) -> int:
    """How many of a rank's `total` rows have something left to be asked, or looked at once more."""
    return total - len(journal) + journal.left(only or STEPS[-1], AGAIN)


class _Worker:
    def __init__(self, run: Run, journal: Journal, endpoints: dict[str, Endpoint], only: str | None):
        self.run, self.journal, self.endpoints, self.only = run, journal, endpoints, only
        self.last = only or STEPS[-1]
        self.rejected = 0

    async def work(self, sources: Sources, rank: int, world_size: int) -> None:
        total = len(range(rank, len(sources), world_size))
        rows = sources.read(rank, world_size)
        bar = tqdm(total=total, unit="row", desc=self.only or "bridge", smoothing=0.05)
        begun = time.monotonic()

        async def worker() -> None:
            for row, problem in rows:
                await self._row(row, problem)
                used, retries = (sum(getattr(e, key) for e in self.endpoints.values()) for key in ("used", "retries"))
                rate = f"{used / (time.monotonic() - begun):.0f}"
                bar.set_postfix({"rejected": self.rejected, "retries": retries, "tokens/s": rate}, refresh=False)
                bar.update()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(total, sum(e.config.concurrency for e in self.endpoints.values()))):
                    group.create_task(worker())
        except ExceptionGroup as errors:
            if any(isinstance(error, AllRefused) for error in errors.exceptions):
                self.journal.forgive(REFUSED)
            raise errors.exceptions[0] from None
        finally:
            bar.close()
            for endpoint in self.endpoints.values():
                await endpoint.client.close()

    async def _row(self, row: Row, problem: Rejected | None) -> None:
        journal = self.journal
        rule = journal.add(row)
        if rule in AGAIN:
            journal.reject(row.position, rule := None)
        if rule is None:
            try:
                if journal.taken(row):
                    raise Rejected(DUPLICATE)
                if problem:
                    raise problem
                if found := journal.get(row.position, self.last):
                    check(self.last, found)
                    await asyncio.sleep(0)  # others' turn
                else:
                    await asyncio.to_thread(check_pictures, row)
                    await bridge(row, partial(self._generate, row), self.run.prompts, self.last)
            except Rejected as rejected:
                journal.reject(row.position, rule := rejected.rule, rejected.detail)
        self.rejected += rule is not None

    async def _generate(self, row: Row, step: str, messages: Messages) -> Generation:
        if found := self.journal.get(row.position, step):
            return found
        if step != (self.only or step):
            raise Rejected(UNANSWERED, f"{step}: its job left it out")
        endpoint = self.endpoints[self.run.endpoint(step)]
        generation, seconds = await endpoint.generate(f"{row.id}/{step}", messages)
        self.journal.put(row.position, step, generation, seconds, time.time())
        return generation
