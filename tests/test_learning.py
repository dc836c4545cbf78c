"""The tiny model really learns: cold start from scratch, then PTST; and, in `make test-full`, the whole demo."""

import json
import subprocess
from pathlib import Path
from statistics import mean

import pandas as pd
import pytest

from vision_r1_recipes import grpo, sft, toy
from vision_r1_recipes.evaluate import paired_difference


ROOT = Path(__file__).parents[1]


def history(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"][:-1]


@pytest.mark.slow
def test_cold_start_then_ptst(tmp_path, monkeypatch):
    """One family of questions is enough to see a loss fall, a reward rise, truncation vanish and length fall."""
    monkeypatch.setattr(toy, "FAMILIES", (toy.rectangle,))
    toy.build(tmp_path, seed=3, num_base=8, num_cold=1200, num_train=200, num_test=8)
    sources = [
        {"path": str(tmp_path / "cold"), "data_files": f"vision_r1_{name}_full.json"}
        for name in ("llava_cot", "mulberry_sft")
    ]
    sft.main(
        [
            *(str(ROOT / "recipes/toy/cold_start.yaml"), "--model_name_or_path", str(tmp_path / "model")),
            *("--datasets", json.dumps(sources), "--max_steps", "200", "--learning_rate", "3e-3"),
            *("--output_dir", str(tmp_path / "cold_start")),
        ]
    )
    losses = [row["loss"] for row in history(tmp_path / "cold_start")]
    assert losses[-1] < 0.5 < 2 < losses[0]
    stages = [
        {"max_completion_length": 96, "num_generations": 16, "steps": 15},
        {"max_completion_length": 192, "num_generations": 8, "steps": 10},
    ]
    grpo.main(
        [
            *(str(ROOT / "recipes/toy/ptst.yaml"), "--model_name_or_path", str(tmp_path / "cold_start")),
            *("--datasets", json.dumps([{"path": str(tmp_path / "rl")}]), "--stages", json.dumps(stages)),
            *("--output_dir", str(tmp_path / "ptst"), "--eval_datasets", "null", "--eval_every_rollouts", "null"),
        ]
    )
    rows = history(tmp_path / "ptst")
    first, last = rows[:5], rows[-5:]
    assert mean(row["reward"] for row in last) > mean(row["reward"] for row in first) + 0.05
    assert mean(row["completions/clipped_ratio"] for row in last) < mean(r["completions/clipped_ratio"] for r in first)
    assert mean(row["completions/mean_length"] for row in last) < mean(r["completions/mean_length"] for r in first)
    assert all(row["kl"] > 0 for row in rows[1:])


@pytest.mark.full
def test_the_demo(tmp_path):
    """`make demo` in a clone: overthinking is in the cold-started model, and PTST ends it."""
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)
    subprocess.run(["make", "demo"], check=True, cwd=tmp_path / "clone", timeout=3000)
    summaries, samples = {}, {}
    for name in ("base", "cold_start", "zero", "ptst"):
        folder = tmp_path / "clone/runs/tables/seed-0" / name / "eval"
        summaries[name] = json.loads((folder / "summary.json").read_text())
        samples[name] = pd.read_parquet(folder / "samples.parquet")
    assert summaries["ptst"]["questions"] >= 400
    assert summaries["ptst"]["mean_tokens"] < summaries["cold_start"]["mean_tokens"]
    assert paired_difference(samples["ptst"], samples["cold_start"])[1] > 0
    buckets = [bucket["accuracy"] for bucket in summaries["cold_start"]["by_length"]]
    assert buckets[0] > buckets[1] and buckets[0] > buckets[2]
    assert (tmp_path / "clone/runs/tables/table_main/report.html").stat().st_size > 100_000
