"""Tiny runs through the entry points, and what they have left."""

import json
import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
# 4Kx16 / 6Kx12 / 8Kx8 in small: rows per micro-batch 4, 3, 2.
STAGES = [
    {"max_completion_length": 8, "num_generations": 8, "steps": 2},
    {"max_completion_length": 12, "num_generations": 6, "steps": 1},
    {"max_completion_length": 16, "num_generations": 4, "steps": 2},
]
SAVES = {"grpo": ["--save_every_rollouts", "1"], "sft": ["--save_strategy", "steps", "--save_steps", "1"]}


def history(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def trace(run: Path) -> list[dict]:
    """The log without what a clock decides."""
    timed = ("step_time", "tokens_per_second", "train_loss", "_runtime", "_per_second", "grader_timeouts")
    rows = history(run)
    return [{k: v for k, v in row.items() if not k.startswith("time/") and not k.endswith(timed)} for row in rows]


def launch(backend: str, kind: str, *argv, **environment) -> str:
    """`accelerate launch` with two processes; what it printed."""
    run = ["-m", "accelerate.commands.launch", "--config_file", RECIPES / f"accelerate/{backend}.yaml"]
    run += ["--num_processes", "2", ROOT / "tests/driver.py", kind, *argv]
    done = subprocess.run(
        [sys.executable, *map(str, run)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
