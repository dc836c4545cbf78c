"""What all tests share: no network, a cache of their own, and one small toy world."""

import os
import shutil
import tempfile

import pytest
import torch


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
