"""What others install: the built wheel, used from a script of their own."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


SCRIPT = """
import sys
from datasets import Dataset
from PIL import Image
from vision_r1_recipes import PTSTCallback, VisionGRPOConfig, VisionGRPOTrainer, hfrrf
import vision_r1_recipes
assert vision_r1_recipes.__file__.startswith(sys.argv[1]), vision_r1_recipes.__file__
question = [{"role": "user", "content": "How many dots are there?"}]
rows = Dataset.from_list([{"prompt": question, "image": Image.new("RGB", (84, 84)), "solution": "3"}] * 4)
stages = [{"max_completion_length": 8, "num_generations": 4, "steps": 1}] * 2
args = VisionGRPOConfig(
    output_dir="run", stages=stages, prompts_per_rollout=2, use_cpu=True, bf16=False, report_to="none"
)
trainer = VisionGRPOTrainer(sys.argv[2], reward_funcs=hfrrf, args=args, train_dataset=rows)
assert any(isinstance(callback, PTSTCallback) for callback in trainer.callback_handler.callbacks)
trainer.train()
"""


@pytest.mark.slow
def test_the_wheel_in_a_script_of_ones_own(toy, tmp_path):
    root = Path(__file__).parents[1]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, root]
    subprocess.run(list(map(str, build)), check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    script = [sys.executable, "script.py", str(tmp_path / "site"), str(toy / "model")]
    subprocess.run(script, check=True, cwd=tmp_path, env=environment, timeout=300)
