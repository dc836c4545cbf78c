import pytest

from vision_r1_recipes.toy import build


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small toy world, built once: the folder with `model/`, `base/`, `cold/` and `rl/`."""
    folder = tmp_path_factory.mktemp("toy")
    build(folder, num_base=64, num_cold=64, num_train=64, num_test=32)
    return folder
