"""
Is a download of Vision-R1-cold or Vision-R1-rl whole?

```shell
python data/prepare.py data/Vision-R1-cold data/Vision-R1-rl
```

Looks at files, row counts and whether the pictures are there, and says what to do; exit code 1 when something is
missing or damaged, 2 when a folder is none of these. What is in the rows is the audit's:
`python -m vision_r1_recipes.data audit RECIPE`.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from vision_r1_recipes.data import pictures, read_source
from vision_r1_recipes.recipe import RecipeError


# File -> rows, by a third party's count; pictures' folder -> who has them [repo].
COLD = {"vision_r1_llava_cot_full.json": 63_019, "vision_r1_mulberry_sft_full.json": 197_975}
PICTURES = {"llava_cot_images": "Xkev/LLaVA-CoT-100k", "mulberry_images": "HuanjinYao/Mulberry-SFT"}
RL = {"train": (9_000, 11_000), "test": (1, 2_000)}  # "about 10K" [repo]
AGAIN = "run `hf download Osilly/{} --repo-type dataset --local-dir {}` (again), it goes on where it was"


def check(folder: Path) -> tuple[str, int]:
    """What there is in `folder`, line by line, and the number of problems."""
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {folder}. data/README.md says how to download the sets.")
    if any((folder / name).is_file() for name in COLD) or folder.name == "Vision-R1-cold":
        found = [line for name, count in COLD.items() for line in _cold(folder, name, count)]
    elif list(folder.rglob("*.parquet")):
        found = [line for split, bounds in RL.items() for line in _rl(folder, split, *bounds)]
    else:
        known = f"Vision-R1-cold ({', '.join(COLD)}) nor Vision-R1-rl (train.parquet, test.parquet)"
        raise RecipeError(f"{folder} holds neither {known}. data/README.md says how to download them.")
    lines = [f"PROBLEM {said}: {fix}" if fix else f"ok      {said}" for said, fix in found]
    return "\n".join([str(folder), *lines]), sum(bool(fix) for _, fix in found)


def _cold(folder: Path, name: str, expected: int) -> Iterator[tuple[str, str]]:
    """What is so, and what to do about it (nothing: empty)."""
    again = AGAIN.format("Vision-R1-cold", folder)
    if not (folder / name).is_file():
        yield f"{name} is missing", again
        return
    try:
        rows, _, _ = read_source({"path": str(folder), "data_files": name}, "sft", name)
    except RecipeError as error:
        yield str(error), f"remove it and {again}"
        return
    wrong = len(rows) != expected
    yield f"{name}: {len(rows):,} rows, {expected:,} expected", f"{again}; or it is another release" if wrong else ""
    column = "images" if "images" in rows.column_names else "image"
    paths = {image["path"] for value in rows[column] for image in pictures(value)}
    absent = sorted(path for path in paths if not (folder / path).is_file() or not (folder / path).stat().st_size)
    fix = ""
    if absent:
        start = absent[0].partition("/")[0]
        fix = f"for example {absent[0]}; put the pictures of {PICTURES.get(start, 'its source')} into {folder / start}"
    yield f"{name}: {len(absent):,} of {len(paths):,} pictures are missing or empty", fix


def _rl(folder: Path, split: str, least: int, most: int) -> Iterator[tuple[str, str]]:
    again = AGAIN.format("Vision-R1-rl", folder)
    files = [str(path.relative_to(folder)) for path in sorted(folder.rglob(f"*{split}*.parquet"))]
    if not files:
        yield f"{split}: no parquet file", again
        return
    try:
        rows, _, _ = read_source({"path": str(folder), "data_files": files}, "rl", split)
    except RecipeError as error:
        yield str(error), f"remove it and {again}"
        return
    expected = "about 10,000 expected" if split == "train" else "the validation split"
    wrong = not least <= len(rows) <= most
    yield f"{split}: {len(rows):,} rows, {expected}", f"{again}; or it is another release" if wrong else ""
    images = rows.select_columns("images")
    found = ([image["bytes"] for image in pictures(row["images"])] for row in images)
    bare = [i for i, embedded in enumerate(found) if not embedded or not all(embedded)]
    fix = f"for example row {bare[0]}; {again}" if bare else ""
    yield f"{split}: {len(bare):,} of {len(rows):,} rows lack a picture", fix


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="+", type=Path, help="of Vision-R1-cold, with the pictures, or of Vision-R1-rl"
    )
    codes = []
    for folder in parser.parse_args().folder:
        try:
            text, problems = check(folder)
            print(text)
            codes.append(int(problems > 0))
        except RecipeError as error:
            print(f"error: {error}", file=sys.stderr)
            codes.append(2)
    sys.exit(max(codes))
