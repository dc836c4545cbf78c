"""What all tests share: no network, a cache of their own, and one small toy world."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from runs import RECIPES, ROOT, STAGES


CACHE = tempfile.mkdtemp(prefix="vision-r1-tests-")
os.environ.update(HF_HOME=CACHE, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # before datasets is imported

# One thread, here and in child processes, is enough for the tiny model; two crawl beside any other job.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder of a small toy world: `model/`, `base/`, `cold/`, `rl/`."""
    from vision_r1_recipes.toy import build

    folder = tmp_path_factory.mktemp("toy")
    build(folder, num_base=64, num_cold=64, num_train=64, num_test=32)
    return folder


@pytest.fixture(scope="session")
def recipes(toy, tmp_path_factory):
    """Children of the toy recipes that take a second: an untrained model, a handful of rows, short completions."""
    from vision_r1_recipes import recipe

    folder = tmp_path_factory.mktemp("recipes")
    tiny_grpo = {
        "base": str(RECIPES / "toy/ptst.yaml"),
        "model_name_or_path": str(toy / "model"),
        "datasets": [{"path": str(toy / "rl"), "limit": 10}],
        **{"eval_datasets": None, "eval_every_rollouts": None},
        "stages": STAGES,
        "prompts_per_rollout": 4,
        "prompts_per_update": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "probe_prompts": 0,
    }
    tiny_sft = {
        "base": str(RECIPES / "toy/cold_start.yaml"),
        "model_name_or_path": str(toy / "model"),
        "datasets": [
            {"path": str(toy / "cold"), "data_files": f"vision_r1_{name}_full.json", "limit": 16}
            for name in ("llava_cot", "mulberry_sft")
        ],
        "global_batch_size": 8,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "logging_steps": 1,
        "max_length": 2048,
    }
    for name, values in {"grpo": tiny_grpo, "sft": tiny_sft}.items():
        (folder / f"{name}.yaml").write_text(recipe.dump(values))
    return folder


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """A real SLURM of two nodes on this machine."""
    folder, script = tmp_path_factory.mktemp("slurm"), ROOT / "tests/slurm/cluster.sh"
    started = subprocess.run(["bash", script, "start", folder, "2"], capture_output=True, text=True)
    if started.returncode:
        missing = pytest.fail if "SLURM_REQUIRED" in os.environ else pytest.skip
        missing(f"no SLURM here: {started.stderr.strip()[-200:]}")
    before = dict(os.environ)
    os.environ.update(
        SLURM_CONF=str(folder / "slurm.conf"),
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        VENV=sys.prefix,  # of slurm/site.conf
    )
    yield
    subprocess.run(["bash", script, "stop", folder], check=True)
    os.environ.clear()
    os.environ.update(before)
