"""
How often a model is right on every prompt of an RL recipe: with rewards of 0 and 1, groups of one kind teach nothing.

```shell
python -m vision_r1_recipes.data difficulty RECIPE MODEL [--n 8] [--backend vllm] [options of evaluate] [--key value]
```

Samples as the first stage does and writes a parquet file per source beside its data, which the source names to keep
a band:

```yaml
datasets:
- path: data/Vision-R1-rl
  pass_rates: data/Vision-R1-rl.pass_rates.parquet
  pass_rate_band: [0.125, 0.875]
```
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from .data import check_recipe, check_some, check_source, digest_of
from .evaluate import SAMPLES, evaluate, per_question
from .recipe import RecipeError


# What `evaluate` has no keys for, and how it samples.
FIXED = {"top_k": (None, 0, -1), "min_p": (None, 0), "repetition_penalty": (None, 1), "generation_kwargs": (None, {})}
EDGES = (0, 0.125, 0.375, 0.625, 0.875, 1)


def beside(source: Mapping[str, Any]) -> Path:
    """Where the pass rates of a source are written: beside its folder or that of its file, for a Hub id in `data/`."""
    path, files, split = Path(source["path"]), source.get("data_files") or [], source.get("split", "train")
    files = [files] if isinstance(files, str) else files
    if path.name in ("", ".."):
        path = path.resolve()
    if path.is_file():  # in the folder itself they would be taken for rows of the set
        path, files = path.parent if path.parent.name else path.absolute().parent, [path.name]
    parts = [path.name, source.get("name"), *(Path(file).stem for file in files), None if split == "train" else split]
    home = path if path.exists() else Path("data") / path.name
    return home.with_name(".".join([*filter(None, parts), "pass_rates.parquet"]))


def measure(values: Mapping[str, Any], model: str, n: int = 8, **options) -> list[Path]:
    """
    Sample `n` completions for every prompt of a recipe's `datasets`, and write how many were rewarded.

    Args:
        values (`dict`): The recipe of a GRPO run, resolved.
        model (`str`): Whose pass rates: as a rule the model that the run starts from.
        n (`int`, *optional*, defaults to `8`): Completions per prompt.
        **options:
            Others of [`~evaluate.evaluate`]; length and sampling are the recipe's first stage's unless given.
            `output_dir` is a folder for the samples of all sources.

    Returns:
        One file per source: `id`, `digest` (of question and answer), `pass_rate` (share with HFRRF's reward),
        `accuracy` (whatever the format), `samples`, `mean_tokens`, `truncated`, `model`. Killed, the same call goes
        on. Another model's file is replaced.

    Raises:
        `RecipeError`: no stages, an unknown key, two sources with one file, or what [`~evaluate.evaluate`] raises.
    """
    stages = values.get("stages")
    if not stages:
        raise RecipeError("`stages` is missing: pass rates are of the prompts of a GRPO recipe.")
    if wrong := {**values, **options}.keys() & {"data", "split", "limit"}:
        raise RecipeError(f"`--{sorted(wrong)[0]}`: the recipe's sources say which rows: change its `datasets`.")
    check_recipe(values, "rl")
    home = Path(
        options.pop("output_dir", None) or Path("runs/difficulty", str(Path(model)).strip("/").replace("/", "_"))
    )
    options = {
        "max_new_tokens": stages[0]["max_completion_length"],
        **{key: values.get(key, 1.0) for key in ("temperature", "top_p")},
        "system_prompt": values.get("system_prompt") or "",
        **{key: values.get(key) for key in ("min_pixels", "max_pixels")},
        "max_dropped_share": values.get("max_dropped_share", 0.05),
        **options,
    }
    if ignored := [key for key, same in FIXED.items() if values.get(key) not in same]:
        print(f"note: completions are drawn without the recipe's {', '.join(ignored)}")
    check_some(values.get("datasets"))
    sources = []
    for i, source in enumerate(values["datasets"]):
        if isinstance(source, Mapping):  # all its rows are asked
            source = {"split": "train", **source, "pass_rates": None, "pass_rate_band": None}
        check_source(source, f"datasets[{i}]")
        sources.append({key: value for key, value in source.items() if not key.startswith("pass_rate")})
    file, times = Counter(map(beside, sources)).most_common(1)[0]
    if times > 1:
        raise RecipeError(f"two sources would write {file}: measure them by recipes of their own.")
    written, loaded = [], {}
    for check in (True, False) if len(sources) > 1 else (False,):
        for source in sources:
            file = beside(source)
            folder = home / file.name.removesuffix(".pass_rates.parquet")
            evaluate(model, source, n=n, output_dir=str(folder), loaded=loaded, check=check, **options)
            if not check:
                rates = pass_rates(pd.read_parquet(folder / SAMPLES))
                file.parent.mkdir(parents=True, exist_ok=True)
                if (before := _model_of(file)) not in (None, model):
                    print(f"note: {file} had the pass rates of {before}")
                rates.assign(model=model).to_parquet(file)
                written.append(file)
                print(describe(rates["pass_rate"]), f"written to {file}", sep="\n")
    return written


def _model_of(file: Path) -> str | None:
    try:
        return pd.read_parquet(file, columns=["model"])["model"][0]
    except (OSError, ValueError, KeyError):  # none, or no file of ours
        return None


def pass_rates(samples: pd.DataFrame) -> pd.DataFrame:
    """One row per question of the samples of an evaluation."""
    named = samples.assign(pass_rate=samples["correct"] & samples["format"]).rename(
        columns={"correct": "accuracy", "tokens": "mean_tokens"}
    )
    rates = per_question(named, ("pass_rate", "accuracy", "mean_tokens", "truncated"))
    digests = [digest_of(*pair) for pair in zip(rates.pop("problem"), rates.pop("solution"), strict=True)]
    return rates.assign(digest=digests, samples=samples["sample"].max() + 1)


def describe(rates: pd.Series) -> str:
    """How many prompts have which pass rate."""
    middle = rates[(rates > 0) & (rates < 1)]
    lines = [
        f"{len(rates)} prompts, mean pass rate {rates.mean():.1%}",
        *(f"  {int((rates == end).sum())} with a pass rate of {end}: no spread, nothing to learn" for end in (0, 1)),
        *(f"  {count} in {interval}" for interval, count in pd.cut(middle, EDGES).value_counts(sort=False).items()),
    ]
    return "\n".join(lines)
