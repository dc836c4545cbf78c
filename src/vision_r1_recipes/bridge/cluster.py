"""
The steps of a bridge recipe as jobs, each after the other, by datatrove's executors (local processes, SLURM arrays).

```yaml
cluster:
  tasks: 16                  # ranks; each takes every 16th row, in one process with a server of its own (`serve`)
  workers: 4                 # of them at a time (-1: all)
  slurm: {partition: gpu, time: "12:00:00", gpus_per_task: 8}   # SlurmPipelineExecutor's arguments; without: local
```

Only the executors are datatrove's. A rank runs the same code as a local run and has its own journal, so a job that is
cancelled goes on where it was. (Its `EndpointServer` loses the reasoning of a server on another host, and one refused
request stops its rank.)
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import recipe
from ..recipe import RecipeError
from .report import write_all
from .rows import Sources
from .run import Run, remaining, work_rank


WRITE = "write"  # the job after the steps
OWN = {"pipeline", "tasks", "workers", "logging_dir", "depends", "job_name"}  # arguments of an executor


@dataclass
class ClusterConfig:
    """The keys of `cluster`; see above."""

    tasks: int
    workers: int = -1
    slurm: dict[str, Any] | None = None


@dataclass
class Job:
    """One step on one rank, as datatrove calls it; or the writing of what all ranks have made."""

    folder: str
    step: str

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        run = Run.load(self.folder)  # with the prompts and rules of the submission
        sources = Sources(run.config.datasets)
        if self.step == WRITE:
            write_all(run, sources)
            return
        with run.journal(rank) as journal:
            work_rank(run, sources, journal, rank, world_size, only=self.step)


def submit(run: Run) -> None:
    """Submit what is left of the jobs; run locally, they have ended on return."""
    if find_spec("datatrove") is None:
        raise RecipeError("datatrove is missing: pip install 'vision-r1-recipes[bridge]'.")
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    config = recipe.fill(ClusterConfig, run.config.cluster, "cluster.")
    if config.tasks < 1 or config.workers == 0:
        raise RecipeError(f"`cluster`: tasks {config.tasks}, workers {config.workers}: at least 1 of each.")
    if config.slurm is not None:
        recipe.check_keys(config.slurm, inspect.signature(SlurmPipelineExecutor).parameters, "cluster.slurm.")
        if own := sorted(config.slurm.keys() & OWN):
            raise RecipeError(f"`cluster.slurm.{own[0]}` is set by the bridge. Remove it.")
    sources = Sources(run.config.datasets)
    run.begin()
    executor = None
    for step in (*run.prompts.templates, WRITE):
        folder = (run.folder / "cluster" / step).absolute()
        ranks = 1 if step == WRITE else config.tasks
        for rank in range(ranks):
            if step == WRITE or _left(run, sources, step, rank, ranks):
                (folder / "completions" / f"{rank:05d}").unlink(missing_ok=True)
        common = {
            "pipeline": [Job(str(run.folder), step)],
            "tasks": ranks,
            "workers": min(config.workers, ranks),
            "logging_dir": str(folder),
            "depends": executor,
        }
        if config.slurm is None:
            executor = LocalPipelineExecutor(**common)
            continue
        activate = Path(sys.prefix, "bin", "activate")
        site = {"venv_path": str(activate) if activate.is_file() else None, "qos": None, **config.slurm}
        # without it, what depends on a job that failed would wait for ever
        site["sbatch_args"] = {"kill-on-invalid-dep": "yes", **site.get("sbatch_args", {})}
        if step == WRITE:
            site["gpus_per_task"] = 0
        executor = SlurmPipelineExecutor(**common, **site, job_name=f"bridge-{step}")
    try:
        executor.run()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise RecipeError(f"the jobs could not be submitted, sbatch's own words are above: {error}.") from error


def _left(run: Run, sources: Sources, step: str, rank: int, world_size: int) -> int:
    with run.journal(rank) as journal:
        return remaining(journal, len(range(rank, len(sources), world_size)), step)
