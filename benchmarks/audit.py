"""
How long the data audit takes: 10,000 rows with pictures of 400 to 900 pixels a side, and 1,000 held-out ones.

```shell
python benchmarks/audit.py [--rows 10000]
```
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from PIL import Image, ImageDraw

from vision_r1_recipes import recipe, toy


ROOT = Path(__file__).parents[1]
WORDS = ["angle", "side", "area", "volume", "radius", "height", "width", "median", "perimeter", "diagonal"]


def row(k: int) -> dict:
    rng = random.Random(k)
    image = Image.new("RGB", (rng.randrange(400, 900), rng.randrange(400, 900)), (k % 256, 200, 220))
    draw = ImageDraw.Draw(image)
    for _ in range(20):
        x, y = rng.randrange(image.width), rng.randrange(image.height)
        draw.ellipse((x, y, x + rng.randrange(20, 200), y + rng.randrange(20, 200)), fill=(k % 256, y % 256, x % 256))
    file = io.BytesIO()
    image.save(file, "jpeg", quality=85)
    text = " ".join(rng.choices(WORDS, k=25))
    return {"images": [{"bytes": file.getvalue(), "path": None}], "problem": f"<image>{text} {k}?", "answer": str(k)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toy.build(folder, num_base=40, num_cold=4, num_train=4, num_test=4)  # for its processor
        (folder / "set").mkdir()
        pd.DataFrame(map(row, range(rows))).to_parquet(folder / "set/train.parquet")
        pd.DataFrame(map(row, range(rows, rows + rows // 10))).to_parquet(folder / "set/test.parquet")
        values = {
            "base": str(ROOT / "recipes/toy/ptst.yaml"),
            "model_name_or_path": str(folder / "model"),
            "datasets": [{"path": str(folder / "set")}],
            "eval_datasets": [{"path": str(folder / "set"), "split": "test"}],
            **{"min_pixels": 3136, "max_pixels": 4194304, "max_prompt_length": 4096, "num_proc": 2},
        }
        (folder / "grpo.yaml").write_text(recipe.dump(values))
        megabytes = sum(path.stat().st_size for path in (folder / "set").iterdir()) / 1e6
        begun = time.perf_counter()
        command = [sys.executable, "-W", "ignore", "-m", "vision_r1_recipes.data", "audit", str(folder / "grpo.yaml")]
        subprocess.run(
            [*command, "--output_dir", str(folder / "audit")], check=True, env={**os.environ, "HF_HOME": name}
        )
        seconds = time.perf_counter() - begun
        counts = json.loads((folder / "audit/audit.json").read_text())["rows"]
    print(f"| {sum(counts.values()):,} rows, {megabytes:,.0f} MB of JPEGs | {seconds:.0f} s |")


if __name__ == "__main__":
    main()
