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

import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import recipe
from ..recipe import RecipeError
from .endpoint import served
from .report import finish
from .rows import Sources
from .run import Run, check_conserved, run_rank


WRITE = "write"  # the job after the steps


@dataclass
class ClusterConfig:
    """The keys of `cluster`; see above."""

    tasks: int
    workers: int = -1
    slurm: dict[str, Any] | None = None


@dataclass
class Job:
    """One step on one rank, as datatrove calls it; or the writing of what all ranks have made."""

    values: dict[str, Any]
    step: str

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        run = Run(self.values)
        sources = Sources(run.config.datasets)
        if self.step == WRITE:
            check_conserved(run, sources)
            finish(run, sources)
            return
        name = run.endpoint(self.step)
        with served(run.endpoints[name], run.folder / "logs" / f"{self.step}-{rank:05d}.log") as run.endpoints[name]:
            run_rank(run, sources, rank, world_size, only=self.step)


def submit(run: Run) -> None:
    """Submit what is left of the jobs; run locally, they have ended on return."""
    if find_spec("datatrove") is None:
        raise RecipeError("datatrove is missing: pip install 'vision-r1-recipes[bridge]'.")
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    config = recipe.fill(ClusterConfig, run.config.cluster, "cluster.")
    if config.tasks < 1 or config.workers == 0:
        raise RecipeError(f"`cluster`: tasks {config.tasks}, workers {config.workers}: at least 1 of each.")
    Sources(run.config.datasets)  # what is wrong with them is told here
    run.save()
    executor = None
    for step in (*run.prompts.templates, WRITE):
        common = {
            "pipeline": [Job(run.values, step)],
            "tasks": 1 if step == WRITE else config.tasks,
            "logging_dir": str((run.folder / "cluster" / step).absolute()),
            "depends": executor,
            "skip_completed": step != WRITE,
        }
        if config.slurm is None:
            executor = LocalPipelineExecutor(**common, workers=1 if step == WRITE else config.workers)
            continue
        activate = Path(sys.prefix, "bin", "activate")
        site = {"venv_path": str(activate) if activate.is_file() else None, "qos": None, **config.slurm}
        site["sbatch_args"] = {"kill-on-invalid-dep": "yes", **site.get("sbatch_args", {})}
        if step == WRITE:
            site |= {"gpus_per_task": 0}
        name = f"bridge-{step}"
        executor = SlurmPipelineExecutor(**common, **site, workers=config.workers, job_name=name)
    try:
        executor.run()
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise RecipeError(f"the jobs could not be submitted, sbatch's own words are above: {error}.") from error
