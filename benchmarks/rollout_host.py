"""
What pictures cost on the host: our GRPO trainer against stock TRL's, one after the other in one process.

```shell
python benchmarks/rollout_host.py [--repeats 5] [--sizes 800x600 112x112] [--groups 1 4 16]
```

Same tiny model, pictures, seed and settings: groups of 16 completions of up to 96 tokens, one update per rollout. A
repeat is one run of each trainer, in turns; a run's first step is left out. Prints a Markdown table and how a step's
time divides.
"""

import argparse
import platform
import tempfile
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from vision_r1_recipes import VisionGRPOConfig, VisionGRPOTrainer, data, toy


PROMPTS, GROUP, LENGTH, STEPS = 64, 16, 96, 3


def picture(width: int, height: int, rng: np.random.Generator) -> PILImage.Image:
    """As costly to decode as a photograph: smooth shades with noise on them."""
    shade = np.add.outer(np.linspace(0, 120, height), np.linspace(0, 120, width))[..., None]
    return PILImage.fromarray((shade + rng.integers(0, 12, (height, width, 3))).astype("uint8"))


def write(folder: Path, width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(PROMPTS):
        picture(width, height, rng).save(path := folder / f"{width}x{height}-{i}.png")
        rows.append({"images": [str(path)], "problem": "<image>How many dots are there?", "answer": str(i % 10)})
    features = Features({"images": List(Image()), "problem": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(folder / f"{width}x{height}.parquet")


def reward(completions, **kwargs) -> list[float]:
    return [len(completion[0]["content"]) % 7 / 7 for completion in completions]


class Clock(TrainerCallback):
    def __init__(self):
        self.ends = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(perf_counter())


def run(ours: bool, folder: Path, size: str, groups: int, counts: Counter) -> tuple[list[float], list[dict]]:
    """Seconds of each step but the first, and the log."""
    bounds = {"min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28}
    processor = data.load_processor(str(folder / "world/model"), **bounds)
    rows, _ = data.load_rows([{"path": str(folder / f"{size}.parquet")}], "rl", processor)
    common = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": groups * GROUP,
        "learning_rate": 1e-5,
        "beta": 0.01,
        "seed": 0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    if ours:
        stage = {"max_completion_length": LENGTH, "num_generations": GROUP, "steps": STEPS}
        args = VisionGRPOConfig(stages=[stage], prompts_per_rollout=groups, **common)
    else:
        args = GRPOConfig(
            num_generations=GROUP,
            max_completion_length=LENGTH,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            **common,
        )
    clock = Clock()
    trainer = (VisionGRPOTrainer if ours else GRPOTrainer)(
        str(folder / "world/model"),
        reward_funcs=reward,
        args=args,
        train_dataset=rows,
        processing_class=processor,
        callbacks=[clock],
    )
    counts.clear()
    trainer.train()
    return list(np.diff(clock.ends)), trainer.state.log_history[1:-1]


def count(owner, name: str, counts: Counter, what) -> None:
    inner = getattr(owner, name)

    def counting(*args, **kwargs):
        made = inner(*args, **kwargs)
        counts[name] += what(made)
        return made

    setattr(owner, name, counting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["800x600", "112x112"])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 16])
    args = parser.parse_args()
    counts: Counter = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        toy.build(folder / "world", num_base=4, num_cold=4, num_train=4, num_test=4)
        count(data, "fetch_image", counts, lambda made: 1)
        images = type(data.load_processor(str(folder / "world/model")).image_processor)
        count(images, "preprocess", counts, lambda made: len(made["image_grid_thw"]))
        lines, divided = [], []
        for size in args.sizes:
            write(folder, *map(int, size.split("x")))
            for groups in args.groups:
                steps = {True: [], False: []}
                per_prompt, logs = {}, []
                for repeat in range(args.repeats):
                    for ours in (True, False) if repeat % 2 == 0 else (False, True):
                        seconds, log = run(ours, folder, size, groups, counts)
                        steps[ours].append(median(seconds))
                        prompts = groups * STEPS
                        per_prompt[ours] = (counts["fetch_image"] / prompts, counts["preprocess"] / prompts)
                        logs += log if ours else []
                ratios = [theirs / mine for mine, theirs in zip(steps[True], steps[False], strict=True)]
                lines.append(
                    f"| {size} | {groups} x {GROUP} | {median(steps[True]):.2f} | {median(steps[False]):.2f} | "
                    f"**{median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) | "
                    f"{per_prompt[True][0]:g} / {per_prompt[False][0]:g} | "
                    f"{per_prompt[True][1]:g} / {per_prompt[False][1]:g} |"
                )
                print(lines[-1], flush=True)
                names = ("rollout", "generation", "pictures", "rewards")
                spent = {k: median(row[f"time/{k}"] for row in logs) for k in names}
                divided.append(
                    f"| {size} | {groups} x {GROUP} | {median(steps[True]):.2f} | {spent['rollout']:.2f} | "
                    f"{spent['generation']:.2f} | {spent['pictures']:.3f} | {spent['rewards']:.3f} |"
                )
    packages = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
    print(f"\n{date.today()}, {packages}, Python {platform.python_version()}, {torch.get_num_threads()} threads\n")
    print(
        "| picture | completions | ours, s/step | TRL, s/step | TRL / ours | decodes a prompt | processed a prompt |"
    )
    print("|---|---|---|---|---|---|---|", *lines, sep="\n")
    print("\nOurs, seconds of a step:\n")
    print("| picture | completions | step | rollout | of it generation | decoding and processor | rewards |")
    print("|---|---|---|---|---|---|---|", *divided, sep="\n")


if __name__ == "__main__":
    main()
