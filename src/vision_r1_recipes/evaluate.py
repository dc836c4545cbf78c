"""
Accuracy, length and habits of a checkpoint on held-out questions, one sample each.

```shell
python -m vision_r1_recipes.evaluate MODEL DATA [--split test] [--max_new_tokens 16000] [--temperature 0.6] ...
```

Writes `summary.json` and `samples.parquet`. Per completion:

- `truncated`: no end-of-turn token within `max_new_tokens`. A truncated completion has no answer: it is wrong, and its
  format too, whatever it says.
- `format`: `rewards.parse_format` accepts it.
- `correct`: `rewards.grade` accepts `answer`, which `rewards.extract_answer` finds whatever the format, so that a
  model that answers directly ("12", "The answer is 12.") is measured fairly. `accuracy` is its mean; `hfrrf` is the
  mean of `correct` and `format` together, the reward of the training.
- `tokens`: length with the end-of-turn token, as TRL logs it in training.
"""

import sys
from pathlib import Path


# A script's folder comes first on the path, where `evaluate.py` would shadow Hugging Face's `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import argparse  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
from collections.abc import Mapping, Sequence  # noqa: E402
from itertools import pairwise  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import PeftConfig, PeftModel  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)
from transformers.utils import find_adapter_config_file  # noqa: E402

from vision_r1_recipes import preflight, recipe  # noqa: E402
from vision_r1_recipes.data import MARKER, generation_prefix, load_processor, load_rows  # noqa: E402
from vision_r1_recipes.recipe import RecipeError  # noqa: E402
from vision_r1_recipes.rewards import extract_answer, grade, parse_format  # noqa: E402


# Self-reflection words of the paper's data table, in the forms that are counted.
REFLECTION = {
    "wait": r"\bwait\b",
    "hmm": r"\bhmm+\b",
    "alternatively": r"\balternatively\b",
    "mistake": r"\bmistakes?\b",
    "check": r"\bcheck(?:s|ed|ing)?\b",
}


def judge(completion: str, solution: str, truncated: bool) -> dict[str, Any]:
    """`{answer, format, correct}` of one completion; see the module's docstring."""
    strict = None if truncated else parse_format(completion)
    answer = None if truncated else strict or extract_answer(completion)
    return {
        "answer": answer,
        "format": strict is not None,
        "correct": answer is not None and grade(solution, answer),
    }


def load_model(path: str, dtype: str = "auto") -> PreTrainedModel:
    """
    A checkpoint or, over its base and merged, a LoRA adapter: a folder or a Hub id.

    Raises:
        `RecipeError`: it can't be read, or does not hold all weights (transformers would draw the others at random).
    """
    try:
        adapter = find_adapter_config_file(path)
        base = PeftConfig.from_pretrained(path).base_model_name_or_path if adapter else path
        model, info = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, output_loading_info=True)
        wrong = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
        if wrong:
            raise ValueError(f"{len(wrong)} weights are missing or have another shape, for example {wrong[0]}")
        if adapter:
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    except Exception as error:
        raise RecipeError(f"can't load the model {path}: {type(error).__name__}: {error}") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def set_sampling(
    model: PreTrainedModel, processor: ProcessorMixin, max_new_tokens: int, temperature: float, top_p: float
) -> dict[str, Any]:
    """
    Make this the whole of `model.generation_config`, and return it.

    The config saved with the model is replaced, not updated: Qwen2.5-VL's carries a repetition penalty of 1.05 and a
    temperature of 1e-6, and `generate` fills every field that is not given from it. Only its end-of-turn tokens stay.
    """
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    tokenizer = processor.tokenizer
    sampling = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "temperature": temperature or 1.0,
        "top_p": top_p if temperature > 0 else 1.0,
        "top_k": 0,  # off; `None` would mean 50
        "repetition_penalty": 1.0,
        "suppress_tokens": [model.config.image_token_id],  # as in training
        "eos_token_id": list(dict.fromkeys([tokenizer.eos_token_id, *ends])),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "use_cache": True,
    }
    model.generation_config = GenerationConfig(**sampling, disable_compile=True)
    return sampling


@torch.no_grad()
def complete(model: PreTrainedModel, processor: ProcessorMixin, rows: Dataset, batch_size: int) -> list[dict]:
    """One completion per row, in the order of `rows`: `{completion, tokens, truncated}`. Prompts of similar length
    share a batch, which is padded on the left."""
    lengths = rows.with_format(None)["tokens"][:]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    ends = set(model.generation_config.eos_token_id)
    prefix = generation_prefix(processor)
    made: dict[int, dict] = {}
    with tqdm(total=len(rows), desc="Evaluating", unit="question") as bar:
        for first in range(0, len(order), batch_size):
            indices = order[first : first + batch_size]
            batch = [rows[i] for i in indices]
            text = processor.apply_chat_template(
                [row["prompt"] for row in batch], tokenize=False, add_generation_prompt=True
            )
            images = [row["images"] for row in batch]
            inputs = processor(text=text, images=images, padding=True, padding_side="left", return_tensors="pt")
            inputs = inputs.to(model.device)
            generated = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            for i, ids in zip(indices, generated.tolist(), strict=True):
                tokens = next((k for k, token in enumerate(ids, 1) if token in ends), None)
                ids = ids[:tokens]
                made[i] = {
                    "completion": prefix + processor.tokenizer.decode(ids, skip_special_tokens=True),
                    "tokens": len(ids),
                    "truncated": tokens is None,
                }
            bar.update(len(batch))
    return [made[i] for i in range(len(rows))]


def summarize(samples: pd.DataFrame, buckets: Sequence[int] = (4096, 8192)) -> dict[str, Any]:
    """
    All numbers of a table of samples. Shares and accuracies are between 0 and 1.

    `buckets` are boundaries in tokens, inclusive: 4096 and 8192 give up to 4096, 4097 to 8192, and more. The accuracy
    of an empty bucket is `None`.
    """
    correct, tokens = samples["correct"].astype(float), samples["tokens"]
    edges = [0, *sorted(set(buckets)), None]
    by_length = []
    for low, high in pairwise(edges):
        inside = (tokens > low) & (tokens <= (high or np.inf))
        accuracy = float(correct[inside].mean()) if inside.any() else None
        by_length.append({"over": low, "up_to": high, "questions": int(inside.sum()), "accuracy": accuracy})
    counts = {word: samples["completion"].str.count(form, re.IGNORECASE) for word, form in REFLECTION.items()}
    counts["any"] = sum(counts.values())
    return {
        "questions": len(samples),
        "accuracy": float(correct.mean()),
        "accuracy_se": float(np.sqrt(correct.mean() * (1 - correct.mean()) / len(samples))),
        "hfrrf": float((samples["correct"] & samples["format"]).mean()),
        "format_rate": float(samples["format"].mean()),
        "mean_tokens": float(tokens.mean()),
        "median_tokens": float(tokens.median()),
        "truncated": float(samples["truncated"].mean()),
        "by_length": by_length,
        "reflection": {
            word: {"per_1000_tokens": float(1000 * count.sum() / tokens.sum()), "share": float((count > 0).mean())}
            for word, count in counts.items()
        },
    }


def paired_difference(
    a: Mapping[str, Sequence], b: Mapping[str, Sequence], n: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """
    Accuracy of `a` minus accuracy of `b` on the same questions, with its 95 % interval (paired bootstrap).

    Args:
        a (`DataFrame` or `dict` of columns): Samples of one model: `id`, `correct`; `problem` and `solution` if there.
        b (`DataFrame` or `dict` of columns): Samples of the other.
        n (`int`, *optional*, defaults to `10000`): Resamples.

    Returns:
        `(mean, low, high)`, between -1 and 1.

    Raises:
        `ValueError`: no samples, or not the same questions in the same order.
    """
    for column in ("id", "problem", "solution"):
        if column in a and column in b and list(a[column]) != list(b[column]):
            raise ValueError(f"the samples are not of the same questions in the same order: `{column}` differs.")
    difference = np.asarray(a["correct"], float) - np.asarray(b["correct"], float)
    if not len(difference):
        raise ValueError("no samples to compare.")
    # Drawing questions with replacement is drawing how often each of the few values occurs.
    values, counts = np.unique(difference, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(difference), counts / len(difference), size=n)
    low, high = np.percentile(draws @ values / len(difference), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def evaluate(
    model: str,
    data: str,
    split: str = "test",
    limit: int | None = None,
    output_dir: str | None = None,
    max_new_tokens: int = 16000,
    temperature: float = 0.6,
    top_p: float = 0.95,
    batch_size: int = 16,
    seed: int = 0,
    system_prompt: str | None = None,
    dtype: str = "auto",
    name: str | None = None,
    buckets: Sequence[int] = (4096, 8192),
    max_dropped_share: float = 0.05,
) -> dict[str, Any]:
    """
    Evaluate a checkpoint and write `summary.json` and `samples.parquet`.

    Args:
        model (`str`): Checkpoint or LoRA adapter: a folder or a Hub id.
        data (`str`): Questions in an RL layout of `data.py`: a folder, a file or a Hub id.
        split (`str`, *optional*, defaults to `"test"`): Split of a folder or Hub id.
        limit (`int`, *optional*): The first rows only.
        output_dir (`str`, *optional*): Defaults to `MODEL/eval/DATA`, for a Hub id to `runs/eval/MODEL/DATA`.
        max_new_tokens (`int`, *optional*, defaults to `16000`): Cap on the completion `[repo]`.
        temperature (`float`, *optional*, defaults to `0.6`): 0 is greedy `[repo]`.
        top_p (`float`, *optional*, defaults to `0.95`): Nucleus `[repo]`.
        batch_size (`int`, *optional*, defaults to `16`): Questions at once. Other sizes draw other samples.
        seed (`int`, *optional*, defaults to `0`): Seed of the sampling.
        system_prompt (`str`, *optional*): Defaults to the one in the recipe beside the checkpoint, `""` is none.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights; auto is as they were saved.
        name (`str`, *optional*): Label in tables. Defaults to the model's folder.
        buckets (`list[int]`, *optional*, defaults to `(4096, 8192)`): Boundaries of the length buckets in tokens.
        max_dropped_share (`float`, *optional*, defaults to `0.05`): Greatest share of questions that may be unusable.

    Returns:
        The content of `summary.json`. The same arguments give the same samples on the same machine.

    Raises:
        `RecipeError`: model or data can't be read, or a value is out of its range.
    """
    if temperature < 0 or not 0 < top_p <= 1 or min(max_new_tokens, batch_size, *buckets) < 1:
        raise RecipeError("needed: temperature >= 0, 0 < top_p <= 1, and the other numbers at least 1.")
    try:
        processor = load_processor(model)
    except (OSError, ValueError) as error:
        known = "a folder with a processor beside the weights, or a Hub id that this machine can reach"
        raise RecipeError(f"can't read the model {model}; it must be {known}. {error}") from error
    if system_prompt is None:
        recipes = [folder / "recipe.yaml" for folder in (Path(model), Path(model).parent)]
        system_prompt = next((recipe.load(path).get("system_prompt") for path in recipes if path.is_file()), None)
    system_prompt = system_prompt or None
    rows, report = load_rows(
        [{"path": data, "split": split, "limit": limit}], "rl", processor, system_prompt, None, max_dropped_share
    )
    print(report)
    loaded = load_model(model, dtype)
    sampling = set_sampling(loaded, processor, max_new_tokens, temperature, top_p)
    set_seed(seed)
    questions = rows.with_format(None).remove_columns("images")
    samples = pd.DataFrame(
        {
            "id": row["id"],
            "problem": "".join(part["text"] or MARKER for part in row["prompt"][-1]["content"]),
            "solution": row["solution"],
            **made,
            **judge(made["completion"], row["solution"], made["truncated"]),
        }
        for row, made in zip(questions, complete(loaded, processor, rows, batch_size), strict=True)
    ).astype({"answer": "string"})
    summary = {
        "name": name or Path(model).resolve().name,
        "model": model,
        "data": {"path": data, "split": split, "limit": limit, "dropped": report.dropped},
        **summarize(samples, buckets),
        "sampling": {**sampling, "system_prompt": system_prompt, "seed": seed, "batch_size": batch_size},
        "dtype": str(loaded.dtype),
        "environment": recipe.environment(),
    }
    home = Path(model, "eval") if Path(model).is_dir() else Path("runs", "eval", Path(model).name)
    folder = Path(output_dir or home / Path(data).resolve().stem)
    folder.mkdir(parents=True, exist_ok=True)
    samples.to_parquet(folder / "samples.parquet")
    draft = folder / "summary.json.draft"
    draft.write_text(json.dumps(summary, indent=2) + "\n")
    draft.replace(folder / "summary.json")  # in one stroke: with it the evaluation counts as finished
    print(describe(summary), f"written to {folder}", sep="\n")
    return summary


def bucket_name(bucket: Mapping[str, Any]) -> str:
    return f"over {bucket['over']}" if bucket["up_to"] is None else f"{bucket['over'] + 1}-{bucket['up_to']}"


def describe(summary: Mapping[str, Any]) -> str:
    """A summary in five lines."""
    s = summary
    buckets = (f"{percent(b['accuracy'])} of {b['questions']} with {bucket_name(b)}" for b in s["by_length"])
    words = (f"{word} {r['per_1000_tokens']:.1f} ({r['share']:.0%})" for word, r in s["reflection"].items())
    return (
        f"{s['name']}: {s['questions']} questions of {s['data']['path']}, split {s['data']['split']}\n"
        f"  accuracy {percent(s['accuracy'])} % ± {percent(1.96 * s['accuracy_se'])} (95 % interval), "
        f"hfrrf {percent(s['hfrrf'])} %, format {percent(s['format_rate'])} %\n"
        f"  tokens {s['mean_tokens']:.1f} (median {s['median_tokens']:g}), truncated {percent(s['truncated'])} %\n"
        f"  accuracy in % by tokens: {', '.join(buckets)}\n"
        f"  reflection words per 1,000 tokens (share of completions): {', '.join(words)}"
    )


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vision_r1_recipes.evaluate",
        description=evaluate.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are those of `evaluate`
    )
    for name in ("model", "data"):
        parser.add_argument(name)
    for name in ("split", "output_dir", "system_prompt", "dtype", "name"):
        parser.add_argument(f"--{name}")
    for name in ("limit", "max_new_tokens", "batch_size", "seed"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("temperature", "top_p", "max_dropped_share"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--buckets", type=int, nargs="+")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    evaluate(**vars(argument_parser().parse_args(argv)))


if __name__ == "__main__":
    with preflight.kind_errors():
        main()
