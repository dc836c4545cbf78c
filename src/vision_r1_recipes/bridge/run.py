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
import signal
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from tqdm import tqdm

from .. import recipe
from ..recipe import RecipeError
from .endpoint import Endpoint, EndpointConfig, served
from .journal import Journal
from .rows import Sources, check_pictures
from .rules import Rules
from .steps import DUPLICATE, STEPS, UNANSWERED, Generation, Messages, Prompts, Rejected, Row, bridge


FORMATS = ("parquet", "llava_cot", "mulberry")


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
        formats (`list[str]`, *optional*): `parquet`, and the released JSON schemas `llava_cot` and `mulberry`.
        cluster (`dict`, *optional*): Run the steps as jobs; see `cluster.py`.
    """

    output_dir: str
    datasets: list[dict]
    mllm: dict
    reasoner: dict
    prompts: dict
    rules: str
    show_answer: bool = True
    formats: list[str] = field(default_factory=lambda: ["parquet"])
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
        if problems:
            raise RecipeError("\n".join(problems))
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

    def save(self) -> None:
        """Keep the recipe with the run, and the prompts and rules that it names."""
        recipe.save(self.values, self.folder)
        copies = {f"{step}.jinja": path for step, path in self.config.prompts.items() if path}
        (self.folder / "rules.yaml").write_text(recipe.dump(recipe.load(self.config.rules)), encoding="utf-8")
        for name, path in copies.items():
            (self.folder / name).write_bytes(Path(path).read_bytes())

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
        return {**found, "show_answer": self.config.show_answer, "ranks": (self.config.cluster or {}).get("tasks", 1)}

    def journal_path(self, rank: int = 0) -> Path:
        return self.folder / "journal" / f"{rank:05d}.sqlite"

    @contextlib.contextmanager
    def journals(self) -> Iterator[list[Journal]]:
        """Those of all ranks that have begun, for reading."""
        with contextlib.ExitStack() as stack:
            paths = sorted(self.folder.glob("journal/*.sqlite"))
            if not paths:
                raise RecipeError(f"there is no journal in {self.folder}: nothing has been asked yet.")
            yield [stack.enter_context(Journal(path, write=False)) for path in paths]


def execute(run: Run) -> Sources:
    """Run all steps here, with the servers that the recipe starts, and check that no row is lost."""
    sources = Sources(run.config.datasets)
    run.save()
    with contextlib.ExitStack() as stack:
        for name in run.endpoints:
            log = run.folder / "logs" / f"{name}.log"
            run.endpoints[name] = stack.enter_context(served(run.endpoints[name], log))
        run_rank(run, sources)
    check_conserved(run, sources)
    return sources


def check_conserved(run: Run, sources: Sources) -> None:
    """Raise [`RecipeError`] unless every row of the sources stands once in the journals and has come to its end."""
    with run.journals() as journals:
        rows, left = sum(map(len, journals)), sum(journal.left(STEPS[-1]) for journal in journals)
    if rows != len(sources) or left:
        raise RecipeError(
            f"{len(sources)} rows in the sources, {rows} in {run.folder}/journal, {left} of them without an end: run "
            "the same command again."
        )


def run_rank(run: Run, sources: Sources, rank: int = 0, world_size: int = 1, only: str | None = None) -> None:
    """
    Take the rows of one rank through the steps, asking nothing again that has been answered.

    Args:
        only (`str`, *optional*): The one step to ask for; those before it are taken from the journal.

    Raises:
        `RecipeError`: what would happen to all rows: a wrong recipe or source, no permission, a server that is gone.
    """
    with Journal(run.journal_path(rank)) as journal:
        journal.identify(run.identity)
        try:
            asyncio.run(_Worker(run, journal, only).work(sources, rank, world_size))
        except sqlite3.Error as error:
            raise RecipeError(
                f"can't write to {journal.path}: {error}. What was answered before is kept: make room, then run the "
                "same command again."
            ) from error


class _Worker:
    def __init__(self, run: Run, journal: Journal, only: str | None):
        self.run, self.journal, self.only = run, journal, only
        self.last = only or STEPS[-1]
        self.rejected = 0

    async def work(self, sources: Sources, rank: int, world_size: int) -> None:
        names = [self.run.endpoint(self.only)] if self.only else list(self.run.endpoints)
        self.endpoints = {name: Endpoint(self.run.endpoints[name]) for name in names}
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
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
            raise errors.exceptions[0] from None
        finally:
            bar.close()
            for endpoint in self.endpoints.values():
                await endpoint.client.close()

    async def _row(self, row: Row, problem: Rejected | None) -> None:
        journal = self.journal
        rule = journal.add(row)
        if rule == UNANSWERED:  # the server's fault, not the row's: another run is another chance
            journal.reject(row.position, rule := None)
        if rule is None and journal.get(row.position, self.last) is None:
            try:
                if problem:
                    raise problem
                if journal.taken(row):
                    raise Rejected(DUPLICATE)
                await asyncio.to_thread(check_pictures, row)
                await bridge(row, partial(self._generate, row), self.run.prompts, self.last)
            except Rejected as rejected:
                journal.reject(row.position, rule := rejected.rule, rejected.detail)
        else:
            await asyncio.sleep(0)
        self.rejected += rule is not None

    async def _generate(self, row: Row, step: str, messages: Messages) -> Generation:
        if found := self.journal.get(row.position, step):
            return found
        if step != (self.only or step):
            raise Rejected(UNANSWERED, f"{step}: its job left it out")
        name = f"{row.id}/{step}".encode("ascii", "backslashreplace").decode()
        generation, seconds = await self.endpoints[self.run.endpoint(step)].generate(name, messages)
        self.journal.put(row.position, step, generation, seconds, time.time())
        return generation
