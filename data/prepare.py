"""
Is a download of Vision-R1-cold or Vision-R1-rl whole?

```shell
python data/prepare.py data/Vision-R1-cold data/Vision-R1-rl
```

Looks at files, row counts and whether the pictures are there; exit code 1 when something is missing. What is in the
rows is the audit's: `python -m vision_r1_recipes.data audit RECIPE`.
"""

import sys
from pathlib import Path

from vision_r1_recipes import preflight
from vision_r1_recipes.data import open_source, pictures


# File -> split and rows to expect: of Vision-R1-cold a third party's count, of Vision-R1-rl "about 10K" [repo].
COLD = {"vision_r1_llava_cot_full.json": 63_019, "vision_r1_mulberry_sft_full.json": 197_975}
RL = {"train": (9_000, 11_000), "test": (1, 2_000)}


def check(folder: Path) -> tuple[str, int]:
    """What there is in `folder`, and the number of problems."""
    if any((folder / name).is_file() for name in COLD) or folder.name == "Vision-R1-cold":
        lines = [line for name, count in COLD.items() for line in _cold(folder, name, count)]
    elif list(folder.rglob("*train*.parquet")):
        lines = [line for split, bounds in RL.items() for line in _rl(folder, split, *bounds)]
    else:
        known = f"Vision-R1-cold ({', '.join(COLD)}) nor Vision-R1-rl (train.parquet, test.parquet)"
        raise SystemExit(f"error: {folder} holds neither {known}; data/README.md says how to get them.")
    text = "\n".join(f"{'PROBLEM ' if bad else 'ok      '}{line}" for bad, line in lines)
    return f"{folder}\n{text}", sum(bad for bad, _ in lines)


def _cold(folder: Path, name: str, expected: int):
    if not (folder / name).is_file():
        return [(True, f"{name} is missing")]
    rows = open_source({"path": str(folder / name)}, name)
    column = "images" if "images" in rows.column_names else "image"
    paths = {image["path"] for value in rows[column] for image in pictures(value)}
    absent = sorted(path for path in paths if not (folder / path).is_file())
    for_example = f", for example {absent[0]}" if absent else ""
    return [
        (len(rows) != expected, f"{name}: {len(rows):,} rows, {expected:,} expected"),
        (bool(absent), f"{name}: {len(absent):,} of {len(paths):,} pictures are missing{for_example}"),
    ]


def _rl(folder: Path, split: str, least: int, most: int):
    files = [str(path.relative_to(folder)) for path in sorted(folder.rglob(f"*{split}*.parquet"))]
    if not files:
        return [(True, f"{split}: no parquet file")]
    rows = open_source({"path": str(folder), "data_files": files}, split)
    said = "about 10,000 expected" if split == "train" else "the validation split"
    return [(not least <= len(rows) <= most, f"{split}: {len(rows):,} rows, {said}")]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    with preflight.kind_errors():
        results = [check(Path(name)) for name in sys.argv[1:]]
    print("\n".join(text for text, _ in results))
    sys.exit(any(problems for _, problems in results))
