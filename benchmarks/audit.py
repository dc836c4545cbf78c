"""
How long the data audit takes: 10,000 rows with pictures of 400 to 900 pixels a side, and 1,000 held-out ones.

```shell
python benchmarks/audit.py [--rows 10000] [--files]
```

`--files` writes the pictures as files beside the parquet file; otherwise they are in it.
"""

import argparse
import io
import json
import os
import random
import resource
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


def row(k: int, folder: Path | None) -> dict:
    """A row whose picture is in it, or in `folder`."""
    rng = random.Random(k)
    image = Image.new("RGB", (rng.randrange(400, 900), rng.randrange(400, 900)), (k % 256, 200, 220))
    draw = ImageDraw.Draw(image)
    for _ in range(20):
        x, y = rng.randrange(image.width), rng.randrange(image.height)
        draw.ellipse((x, y, x + rng.randrange(20, 200), y + rng.randrange(20, 200)), fill=(k % 256, y % 256, x % 256))
    file = io.BytesIO()
    image.save(file, "jpeg", quality=85)
    stored: dict | str = {"bytes": file.getvalue(), "path": None}
    if folder:
        stored = f"pictures/{k}.jpg"
        (folder / stored).write_bytes(file.getvalue())
    text = " ".join(rng.choices(WORDS, k=25))
    return {"images": [stored], "problem": f"<image>{text} {k}?", "answer": str(k)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--files", action="store_true")
    args = parser.parse_args()
    rows = args.rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toy.build(folder, num_base=40, num_cold=4, num_train=4, num_test=4)  # for its processor
        (folder / "set/pictures").mkdir(parents=True)
        beside = folder / "set" if args.files else None
        for split, ks in (("train", range(rows)), ("test", range(rows, rows + rows // 10))):
            pd.DataFrame(row(k, beside) for k in ks).to_parquet(folder / f"set/{split}.parquet")
        values = {
            "base": str(ROOT / "recipes/toy/ptst.yaml"),
            "model_name_or_path": str(folder / "model"),
            "datasets": [{"path": str(folder / "set"), "data_files": "train.parquet"}],
            "eval_datasets": [{"path": str(folder / "set"), "data_files": "test.parquet"}],
            **{"min_pixels": 3136, "max_pixels": 4194304, "max_prompt_length": 4096, "num_proc": 2},
        }
        (folder / "grpo.yaml").write_text(recipe.dump(values))
        megabytes = sum(path.stat().st_size for path in (folder / "set").rglob("*")) / 1e6
        command = [sys.executable, "-W", "ignore", "-m", "vision_r1_recipes.data", "audit", str(folder / "grpo.yaml")]
        begun = time.perf_counter()
        subprocess.run(
            [*command, "--output_dir", str(folder / "audit")], check=True, env={**os.environ, "HF_HOME": name}
        )
        seconds = time.perf_counter() - begun
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        counts = json.loads((folder / "audit/audit.json").read_text())["rows"]
    print(
        f"| {sum(counts.values()):,} rows, {megabytes:,.0f} MB, pictures {'as files' if args.files else 'embedded'} "
        f"| {seconds:.0f} | {used.ru_utime + used.ru_stime:.0f} | {used.ru_maxrss / 1024:.0f} |"
    )


if __name__ == "__main__":
    main()
