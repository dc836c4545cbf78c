"""
Accuracy, length and habits of checkpoints on held-out questions.

```shell
python -m vision_r1_recipes.evaluate MODEL [MODEL ...] --data DATA [DATA ...] [--split test] [--n 8] [--retries 4] ...
python -m vision_r1_recipes.evaluate compare A B   # two folders that it has written, on the same questions
```

Writes `summary.json` and `samples.parquet`, and until then `progress.jsonl`: when it was killed, the same command goes
on with what is missing and ends with the same samples. Per completion:

- `truncated`: no end-of-turn token within `max_new_tokens`. A truncated completion has no answer: it is wrong, and its
  format too, whatever it says.
- `format`: `rewards.parse_format` accepts it.
- `correct`: `rewards.grade` accepts `answer`, which `rewards.extract_answer` finds whatever the format, so that a
  model that answers directly ("12", "The answer is 12.") is measured fairly. `accuracy` is its mean; `hfrrf` is the
  mean of `correct` and `format` together, the reward of the training.
- `tokens`: length with the end-of-turn token, as TRL logs it in training.

With `--n`, `accuracy` is the mean over questions of the share of their samples that are right (pass@1) and
`accuracy_majority` that of the answer that most samples of a question give. With `--retries`, a completion without
`</answer>` is drawn again up to so many times, as the official harness does with 4 `[repo]`; `accuracy_with_retries`
counts the last draw. It lifts models that overrun, and is never `accuracy`.
"""

import sys
from pathlib import Path


# A script's folder comes first on the path, where `evaluate.py` would shadow Hugging Face's `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import argparse  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import textwrap  # noqa: E402
from collections.abc import Mapping, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from itertools import pairwise, product  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from datasets import Dataset  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import ProcessorMixin, set_seed  # noqa: E402
from transformers.utils import cached_file, find_adapter_config_file  # noqa: E402
from transformers.utils.hub import extract_commit_hash  # noqa: E402

from vision_r1_recipes import preflight, recipe  # noqa: E402
from vision_r1_recipes.backends import BACKENDS, Backend, Keep, Request  # noqa: E402
from vision_r1_recipes.data import BUILDERS, fingerprint, image_bounds, load_processor, load_rows, question_of  # noqa: E402
from vision_r1_recipes.grading import agree  # noqa: E402
from vision_r1_recipes.progress import check_folder, check_same, progress, stops_kindly  # noqa: E402
from vision_r1_recipes.recipe import RecipeError  # noqa: E402
from vision_r1_recipes.rewards import extract_answer, grade, parse_format  # noqa: E402


SUMMARY, SAMPLES, PROGRESS = "summary.json", "samples.parquet", "progress.jsonl"
LINE = ("made", "state")  # of PROGRESS
PROMPTS = "prompts"  # a fingerprint of texts, pictures and numbers of tokens
SUMMARIZED = ("name", "accuracy", "accuracy_se", "questions", "samples_per_question", "sampling")  # among others
KEYS = ("id", "problem", "solution")  # of a question

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


def per_question(samples: Mapping[str, Sequence], columns: Sequence[str] = ("correct",)) -> pd.DataFrame:
    """One row per question, in their order: `id`, `problem` and `solution` if there, and its means of `columns`."""
    n = max(samples["sample"], default=0) + 1 if "sample" in samples else 1
    frame = pd.DataFrame({key: list(samples[key])[::n] for key in KEYS if key in samples})
    means = {key: np.asarray(samples[key], float).reshape(-1, n).mean(axis=1) for key in columns}
    return frame.assign(**means)


def majority(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """
    Whether the answer that most of a question's samples give is right. Answers are one if the grader says so; of
    several with as many votes the first counts, and a sample without an answer has none.
    """
    votes: dict[int, int] = {}
    for i, answer in enumerate(answers):
        if not pd.isna(answer):
            same = next((k for k in votes if agree(answers[k], answer)), i)
            votes[same] = votes.get(same, 0) + 1
    return bool(votes) and bool(correct[max(votes, key=votes.__getitem__)])


def summarize(samples: pd.DataFrame, buckets: Sequence[int] = (4096, 8192)) -> dict[str, Any]:
    """
    All numbers of a table of samples. Shares and accuracies are between 0 and 1.

    `buckets` are boundaries in tokens, inclusive: 4096 and 8192 give up to 4096, 4097 to 8192, and more. The accuracy
    of an empty bucket is `None`. With several samples per question a bucket counts samples, and the standard error is
    that of the questions' means.
    """
    correct, tokens = samples["correct"].astype(float), samples["tokens"]
    questions = per_question(samples)["correct"]
    error = float(questions.std(ddof=0) / np.sqrt(len(questions)))
    n = len(samples) // len(questions)
    edges = [0, *sorted(set(buckets)), None]
    by_length = []
    for low, high in pairwise(edges):
        inside = (tokens > (low or -1)) & (tokens <= (high or np.inf))
        accuracy = float(correct[inside].mean()) if inside.any() else None
        by_length.append({"over": low, "up_to": high, "questions": int(inside.sum()), "accuracy": accuracy})
    counts = {word: samples["completion"].str.count(form, re.IGNORECASE) for word, form in REFLECTION.items()}
    counts["any"] = sum(counts.values())
    summary = {
        "questions": len(questions),
        "samples_per_question": n,
        "accuracy": float(correct.mean()),
        "accuracy_se": error,
        "accuracy_interval": interval(error, len(questions)),
        "hfrrf": float((samples["correct"] & samples["format"]).mean()),
        "format_rate": float(samples["format"].mean()),
        "mean_tokens": float(tokens.mean()),
        "median_tokens": float(tokens.median()),
        "truncated": float(samples["truncated"].mean()),
        "by_length": by_length,
        "reflection": {
            word: {
                "per_1000_tokens": float(1000 * count.sum() / max(tokens.sum(), 1)),
                "share": float((count > 0).mean()),
            }
            for word, count in counts.items()
        },
    }
    if n > 1:
        groups = (samples.iloc[i : i + n] for i in range(0, len(samples), n))
        summary["accuracy_majority"] = float(np.mean([majority([*g["answer"]], [*g["correct"]]) for g in groups]))
    if "correct_with_retries" in samples:
        summary["accuracy_with_retries"] = float(samples["correct_with_retries"].mean())
        summary["retried"] = float((samples["attempts"] > 1).mean())
    if "refused" in samples:
        summary["refused"] = int(samples["refused"].notna().sum())
    return summary


def paired_difference(
    a: Mapping[str, Sequence], b: Mapping[str, Sequence], n: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """
    Accuracy of `a` minus accuracy of `b` on the same questions, with its 95 % interval (paired bootstrap over
    questions, of whose samples the mean counts; where all questions differ alike, the rule of three).

    Args:
        a (`DataFrame` or `dict` of columns):
            Samples of one model: `id`, `correct`; `problem`, `solution` and `sample` if there.
        b (`DataFrame` or `dict` of columns): Samples of the other.
        n (`int`, *optional*, defaults to `10000`): Resamples.

    Returns:
        `(mean, low, high)`, between -1 and 1.

    Raises:
        `ValueError`: no samples, or not the same questions in the same order.
    """
    ours, theirs = per_question(a), per_question(b)
    for column in KEYS:
        if column in ours and column in theirs and list(ours[column]) != list(theirs[column]):
            raise ValueError(f"the samples are not of the same questions in the same order: `{column}` differs.")
    if not len(ours):
        raise ValueError("no samples to compare.")
    difference = (ours["correct"] - theirs["correct"]).to_numpy()
    # Drawing questions with replacement is drawing how often each of the few values occurs.
    values, counts = np.unique(difference, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(difference), counts / len(difference), size=n)
    low, high = np.percentile(draws @ values / len(difference), [2.5, 97.5])
    mean = float(difference.mean())
    if len(values) == 1:  # no draw differs from another, which tells nothing
        half = interval(0.0, len(difference))
        return mean, max(-1.0, mean - half), min(1.0, mean + half)
    return mean, float(low), float(high)


def compare(a: str, b: str) -> str:
    """
    What [`paired_difference`] says of two folders that [`evaluate`] has written.

    Raises:
        `RecipeError`: one of them is none, or they are not of the same questions.
    """
    for folder in (a, b):
        if not Path(folder, SUMMARY).is_file():
            raise RecipeError(f"{folder} is not the folder of a finished evaluation: it has no {SUMMARY}.")
    (ours, samples), (theirs, others) = read_finished(Path(a)), read_finished(Path(b))
    try:
        mean, low, high = paired_difference(samples, others)
    except ValueError as error:
        raise RecipeError(f"{a} and {b}: {error}") from error
    mine, yours = per_question(samples)["correct"], per_question(others)["correct"]
    lines = [
        *(
            f"{s['name']}: {percent(s['accuracy'])} % ± {percent(interval(s['accuracy_se'], len(mine)))}"
            for s in (ours, theirs)
        ),
        f"difference: {100 * mean:+.1f} points, 95 % interval [{100 * low:+.1f}, {100 * high:+.1f}] "
        f"(paired bootstrap over {len(mine)} questions; {int((mine > yours).sum())} better, "
        f"{int((mine < yours).sum())} worse)",
    ]
    differ = differing_settings(ours, theirs)
    return "\n".join([*lines, *([f"their settings differ: {', '.join(differ.values())}"] if differ else [])])


def differing_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, str]:
    """By its name, each setting that two summaries' numbers depend on and that is not the same, with both values."""

    def settings(summary: Mapping[str, Any]) -> dict[str, Any]:
        noted = summary.get("settings", {})
        more = {"dtype": summary.get("dtype"), "backend_args": noted.get("backend_args"), **noted.get("pixels", {})}
        return {**summary.get("data", {}), **summary["sampling"], **more}

    def short(value: Any) -> str:
        return textwrap.shorten(repr(value), 60, placeholder=" ...")

    ours, theirs = settings(a), settings(b)
    if ours.get("system_prompt") == theirs.get("system_prompt"):  # else they differ anyway
        for mine, summary in ((ours, a), (theirs, b)):
            mine[PROMPTS] = summary.get("settings", {}).get("questions")
    return {
        key: f"{key} {short(ours.get(key))} against {short(theirs.get(key))}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    }


def read_finished(folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """The summary and the samples in the folder of a finished evaluation; [`RecipeError`] when one is damaged."""
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text())
        _need(summary, SUMMARIZED)
        for key in ("data", "settings", "sampling"):
            if not isinstance(summary.get(key, {}), dict):
                raise ValueError(f"`{key}` is {summary[key]!r}")
        path = folder / SAMPLES
        samples = pd.read_parquet(path)
        _need(samples, ("id", "completion", "tokens", "truncated", "format", "correct"))
        if len(samples) != summary["questions"] * summary["samples_per_question"]:
            raise ValueError(f"it has {len(samples)} samples, and {SUMMARY} tells of others")
    except (OSError, ValueError, TypeError) as error:
        said = str(error).splitlines()[0]
        raise RecipeError(f"{path} is damaged: {said}. Delete {folder}, and evaluate again.") from error
    return summary, samples


def _need(found: Mapping[str, Any], keys: Sequence[str]) -> None:
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"it has no `{missing[0]}`")


@dataclass
class _Task:
    """One model on one set of questions, checked and ready."""

    processor: ProcessorMixin
    rows: Dataset
    settings: dict[str, Any]  # what the samples depend on
    folder: Path
    dropped: dict[str, int]
    finished: tuple[dict[str, Any], pd.DataFrame] | None  # with the same settings


def _prepare(
    model,
    data,
    split,
    limit,
    output_dir,
    system_prompt,
    max_dropped_share,
    processor,
    min_pixels,
    max_pixels,
    backend,
    identity,
    sampling,
) -> _Task:
    try:
        loaded = load_processor(processor or model, min_pixels, max_pixels)
        commit = None if backend == "openai" or Path(model).is_dir() else commit_of(model)
    except (RecipeError, OSError) as error:
        known = "a folder with a processor beside the weights, or a Hub id that this machine can reach"
        known += "; with a server, `--processor` names one" if backend == "openai" else ""
        raise RecipeError(f"can't read the model {processor or model}; it must be {known}. {error}") from error
    if system_prompt is None:
        system_prompt = recipe.saved_system_prompt(model)
    system_prompt = system_prompt or None
    source = {"split": split, "limit": limit, **(data if isinstance(data, Mapping) else {"path": data})}
    source["path"] = str(Path(source["path"]))  # with or without a slash at its end
    rows, report = load_rows([source], "rl", loaded, system_prompt, None, max_dropped_share)
    print(report)
    settings = {
        **{
            "model": str(Path(model)),
            "weights": weights_of(model),
            "commit": commit,
            "data": source,
            "questions": fingerprint(rows.with_format(None)),
        },
        **{"backend": backend, **identity, **sampling, "system_prompt": system_prompt},
        "pixels": image_bounds(loaded),
    }
    home = Path(model, "eval") if Path(model).is_dir() else Path("runs", "eval", Path(model).name)
    place = Path(source["path"]).resolve()
    folder = Path(output_dir or home / (place.stem if place.suffix in BUILDERS else place.name))
    check_folder(folder)
    finished = None
    if (folder / SUMMARY).is_file():
        finished = read_finished(folder)
        check_same(finished[0].get("settings", {}), settings, folder)
    elif (folder / PROGRESS).is_file():
        with progress(folder / PROGRESS, settings, keys=LINE):
            pass  # can be gone on with
    return _Task(loaded, rows, settings, folder, report.dropped, finished)


def weights_of(model: str) -> list[list[Any]]:
    """Name, size and time of the weights in a folder, those of an adapter's base included; empty for a Hub id."""
    files = sorted(Path(model).glob("*.safetensors"))
    adapter = Path(model, "adapter_config.json")
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text()).get("base_model_name_or_path")
        except (ValueError, AttributeError) as error:
            raise RecipeError(f"{adapter} is damaged: {error}. Save the adapter again.") from error
        files += sorted(Path(base).glob("*.safetensors")) if base else []
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def commit_of(model: str) -> str | None:
    """The commit that a Hub id stands for now."""
    return extract_commit_hash(find_adapter_config_file(model) or cached_file(model, "config.json"), None)


def _collect(backend: Backend, rows: Dataset, n: int, retries: int, made: dict[Request, dict], keep: Keep) -> None:
    """Complete `made` through `keep`: `n` samples per question, then the tries at those without `</answer>`."""
    lengths = rows.with_format(None)["tokens"][:]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    for attempt in range(retries + 1):
        wanted = [(sample, attempt, i) for sample in range(n) for i in order]
        if attempt:
            wanted = [(s, a, i) for s, a, i in wanted if _is_open(made.get((s, a - 1, i)))]
        left = [request for request in wanted if request not in made]
        title = f"Retry {attempt}" if attempt else "Evaluating"
        with tqdm(total=len(wanted), initial=len(wanted) - len(left), desc=title, unit="completion") as bar:

            def kept(batch, bar=bar):
                keep(batch)
                bar.update(len(batch))

            backend.generate(rows, left, kept)


def _is_open(made: Mapping[str, Any] | None) -> bool:
    return made is not None and "refused" not in made and "</answer>" not in made["completion"]


def _tables(rows: Dataset, made: Mapping[Request, dict], n: int, retries: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The samples, and the tries after the first."""
    samples, more = [], []
    refused = any("refused" in completion for completion in made.values())
    for i, row in enumerate(rows.with_format(None).remove_columns("images")):
        question = {
            "id": row["id"],
            "problem": question_of(row["prompt"]),
            "solution": row["solution"],
        }
        for sample in range(n):
            tries = []
            for attempt in range(retries + 1):
                if (sample, attempt, i) in made:
                    written = {**({"refused": None} if refused else {}), **made[sample, attempt, i]}
                    verdict = judge(written["completion"], row["solution"], written["truncated"])
                    tries.append({**question, "sample": sample, **written, **verdict})
            samples.append(tries[0])
            if retries:
                samples[-1] |= {"attempts": len(tries), "correct_with_retries": tries[-1]["correct"]}
            more += [{**written, "attempt": k} for k, written in enumerate(tries) if k]
    return tuple(pd.DataFrame(table).astype({"answer": "string"}) if table else None for table in (samples, more))


def evaluate(
    model: str,
    data: str | Mapping[str, Any],
    split: str = "test",
    limit: int | None = None,
    output_dir: str | None = None,
    max_new_tokens: int = 16000,
    temperature: float = 0.6,
    top_p: float = 0.95,
    n: int = 1,
    retries: int = 0,
    batch_size: int | None = None,
    seed: int = 0,
    system_prompt: str | None = None,
    dtype: str = "auto",
    name: str | None = None,
    buckets: Sequence[int] = (4096, 8192),
    max_dropped_share: float = 0.05,
    backend: str = "transformers",
    backend_args: dict[str, Any] | None = None,
    processor: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    loaded: dict[str, Backend] | None = None,
    check: bool = False,
) -> dict[str, Any] | Path:
    """
    Evaluate a checkpoint and write `summary.json` and `samples.parquet`; go on with an evaluation that was killed.

    Args:
        model (`str`): Checkpoint or LoRA adapter: a folder or a Hub id; with a server, the name that it knows.
        data (`str` or `dict`):
            Questions in an RL layout of `data.py`: a folder, a file or a Hub id; or a source with more keys.
        split (`str`, *optional*, defaults to `"test"`): Split of a folder or Hub id.
        limit (`int`, *optional*): The first rows only.
        output_dir (`str`, *optional*): Defaults to `MODEL/eval/DATA`, for a Hub id to `runs/eval/MODEL/DATA`.
        max_new_tokens (`int`, *optional*, defaults to `16000`): Cap on the completion `[repo]`.
        temperature (`float`, *optional*, defaults to `0.6`): 0 is greedy `[repo]`.
        top_p (`float`, *optional*, defaults to `0.95`): Nucleus `[repo]`.
        n (`int`, *optional*, defaults to `1`): Samples per question `[repo]`.
        retries (`int`, *optional*, defaults to `0`):
            More tries at a completion without `</answer>`, for a number beside `accuracy`; 4 in the official harness
            `[repo]`.
        batch_size (`int`, *optional*):
            transformers: questions at once (16), other sizes draw other samples; vllm: requests between two notes of
            progress (512); openai: requests at a time (64).
        seed (`int`, *optional*, defaults to `0`): Seed of the sampling.
        system_prompt (`str`, *optional*): Defaults to the one in the recipe beside the checkpoint, `""` is none.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights; auto is as they were saved.
        name (`str`, *optional*): Label in tables. Defaults to the model's folder.
        buckets (`list[int]`, *optional*, defaults to `(4096, 8192)`): Boundaries of the length buckets in tokens.
        max_dropped_share (`float`, *optional*, defaults to `0.05`): Greatest share of questions that may be unusable.
        backend (`str`, *optional*, defaults to `"transformers"`): Or `"vllm"`, or `"openai"`: a server.
        backend_args (`dict`, *optional*):
            Arguments of `from_pretrained`, of vLLM's `LLM`, or `base_url` and other keys of an endpoint of
            `bridge.endpoint`.
        processor (`str`, *optional*): Folder or Hub id of the processor, where `model` is a server's name and no path.
        min_pixels (`int`, *optional*), max_pixels (`int`, *optional*):
            Bounds on a picture's area. Default to the processor's, which for a checkpoint are those of its training.
        loaded (`dict`, *optional*): Keeps the model for the next call that is given the same dict.
        check (`bool`, *optional*, defaults to `False`):
            Return once everything is checked, before the model loads: the folder that would be written.

    Returns:
        The content of `summary.json`. The same arguments give the same samples on the same machine, as far as a
        server keeps to a seed.

    Raises:
        `RecipeError`: model or data can't be read, a value is out of range, or the folder holds another evaluation.
    """
    counts = {"limit": limit, "max_new_tokens": max_new_tokens, "n": n, "batch_size": batch_size}
    counts |= {"min_pixels": min_pixels, "max_pixels": max_pixels, "buckets": min(buckets, default=None)}
    needs = (
        *((key, value, value >= 1, "at least 1") for key, value in counts.items() if value is not None),
        ("retries", retries, retries >= 0, "at least 0"),
        ("temperature", temperature, 0 <= temperature < np.inf, "at least 0; 0 is greedy"),
        ("top_p", top_p, 0 < top_p <= 1, "over 0, up to 1"),
        ("seed", seed, 0 <= seed < 2**32, "0 to 2**32 - 1"),
        ("max_dropped_share", max_dropped_share, 0 <= max_dropped_share <= 1, "0 to 1"),
        (
            "dtype",
            dtype,
            dtype == "auto" or isinstance(getattr(torch, dtype, None), torch.dtype),
            "auto, bfloat16 ...",
        ),
    )
    preflight.check([f"`{key}`: {value}, needs {what}." for key, value, right, what in needs if not right])
    if backend not in BACKENDS:
        raise RecipeError(f"`backend`: {backend!r} is none of {', '.join(BACKENDS)}.")
    kind, args = BACKENDS[backend], {} if backend_args is None else backend_args
    if not isinstance(args, Mapping):
        raise RecipeError(f"`backend_args`: {args!r}, needs a mapping such as {{base_url: http://localhost:8000/v1}}.")
    batch_size = kind.default_batch_size if batch_size is None else batch_size
    kind.check(model, args)
    asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    identity = {**kind.identity(batch_size, args), "dtype": dtype}
    sampling = {**asked, "n": n, "retries": retries}
    task = _prepare(
        *(model, data, split, limit, output_dir, system_prompt, max_dropped_share),
        *(processor, min_pixels, max_pixels, backend, identity, sampling),
    )
    if check:
        return task.folder
    if task.finished is not None:
        print("finished before")
        summary, samples = task.finished
        summary = {**summary, "name": name or summary["name"], **summarize(samples, buckets)}
    else:
        loaded = {} if loaded is None else loaded
        longest = max(task.rows.with_format(None)["tokens"][:]) + max_new_tokens
        longest = -(-longest // 1024) * 1024  # the next set of questions may fit too
        key = repr((model, backend, args, dtype, longest if backend == "vllm" else None, asked, batch_size))
        if key not in loaded:
            loaded.clear()  # before the next one takes the memory
            loaded[key] = kind(
                model, task.processor, max_length=longest, dtype=dtype, batch_size=batch_size, args=args, **asked
            )
        set_seed(seed)
        with progress(task.folder / PROGRESS, task.settings, keys=LINE) as (lines, add):
            try:
                made = {tuple(request): completion for line in lines for request, completion in line["made"]}
                if lines:
                    loaded[key].restore(lines[-1]["state"])
                    print(f"{len(made)} completions were finished before")
            except (TypeError, ValueError, RuntimeError) as error:  # torch's, for a state that is none
                file = task.folder / PROGRESS
                raise RecipeError(f"{file} is damaged: {error}. Delete it, and run the same command again.") from error

            def keep(batch):
                made.update(batch)
                add({"made": batch, "state": loaded[key].state()})

            _collect(loaded[key], task.rows, n, retries, made, keep)
        samples, more = _tables(task.rows, made, n, retries)
        used = {"do_sample": temperature > 0, **sampling, **loaded[key].sampling}
        summary = {
            "name": name or Path(model).resolve().name,
            "model": model,
            "data": {**task.settings["data"], "dropped": task.dropped},
            **summarize(samples, buckets),
            "sampling": {
                **used,
                "system_prompt": task.settings["system_prompt"],
                "backend": backend,
                "batch_size": batch_size,
            },
            "dtype": loaded[key].dtype,
            "environment": recipe.environment(),
            "settings": task.settings,
        }
        samples.to_parquet(task.folder / SAMPLES)
        if more is not None:
            more.to_parquet(task.folder / "retries.parquet")
    draft = task.folder / f"{SUMMARY}.draft"
    draft.write_text(json.dumps(summary, indent=2) + "\n")
    draft.replace(task.folder / SUMMARY)  # in one stroke: with it the evaluation counts as finished
    (task.folder / PROGRESS).unlink(missing_ok=True)
    print(describe(summary), f"written to {task.folder}", sep="\n")
    return summary


def bucket_name(bucket: Mapping[str, Any]) -> str:
    return f"over {bucket['over']}" if bucket["up_to"] is None else f"{bucket['over'] + 1}-{bucket['up_to']}"


def describe(summary: Mapping[str, Any]) -> str:
    """A summary in a few lines."""
    s = summary
    buckets = (f"{percent(b['accuracy'])} of {b['questions']} with {bucket_name(b)}" for b in s["by_length"])
    words = (f"{word} {r['per_1000_tokens']:.1f} ({r['share']:.0%})" for word, r in s["reflection"].items())
    n = s.get("samples_per_question", 1)
    each = f", {n} samples each," if n > 1 else ""
    more = "".join(
        f", {title} {percent(s[key])} %"
        for key, title in (("accuracy_majority", "majority vote"), ("accuracy_with_retries", "with retries"))
        if key in s
    )
    refused = f"  the server refused {s['refused']} requests, which count as wrong\n" if s.get("refused") else ""
    return (
        f"{s['name']}: {s['questions']} questions{each} of {s['data']['path']}, split {s['data']['split']}\n"
        f"  accuracy {percent(s['accuracy'])} % ± {percent(s['accuracy_interval'])} (95 % interval), "
        f"hfrrf {percent(s['hfrrf'])} %, format {percent(s['format_rate'])} %{more}\n{refused}"
        f"  tokens {s['mean_tokens']:.1f} (median {s['median_tokens']:g}), truncated {percent(s['truncated'])} %\n"
        f"  accuracy in % by tokens: {', '.join(buckets)}\n"
        f"  reflection words per 1,000 tokens (share of completions): {', '.join(words)}"
    )


def interval(error: float, questions: int) -> float:
    """
    Half the 95 % interval of an accuracy with the standard error `error`. When all or none is right that is 0 and
    tells nothing: then 3 / questions, the "rule of three".
    """
    return 1.96 * error or min(1.0, 3 / questions)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise argparse.ArgumentTypeError(f"{text!r} is not valid YAML: {said}. Write '{{key: value}}'.") from error


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vision_r1_recipes.evaluate",
        allow_abbrev=False,  # slurm/evaluate.slurm looks for its options
        description=evaluate.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are those of `evaluate`
    )
    parser.add_argument("model", nargs="+")
    parser.add_argument("--data", nargs="+", required=True)
    for name in ("split", "output_dir", "system_prompt", "dtype", "name", "processor"):
        parser.add_argument(f"--{name}")
    for name in ("limit", "max_new_tokens", "n", "retries", "batch_size", "seed", "min_pixels", "max_pixels"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("temperature", "top_p", "max_dropped_share"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--buckets", type=int, nargs="+")
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--backend_args", type=_yaml, help="as YAML: '{base_url: http://localhost:8000/v1}'")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["compare"]:
        parser = argparse.ArgumentParser(
            prog="python -m vision_r1_recipes.evaluate compare", description=compare.__doc__
        )
        for name in ("a", "b"):
            parser.add_argument(name, help="folder with summary.json and samples.parquet")
        print(compare(**vars(parser.parse_args(argv[1:]))))
        return
    options = vars(argument_parser().parse_args(argv))
    pairs = list(product(options.pop("model"), options.pop("data")))
    if len(pairs) > 1 and options.keys() & {"output_dir", "name"}:
        raise RecipeError("`--output_dir` and `--name` are for one model and one set of questions.")
    folders: dict[Path, str] = {}
    for model, data in pairs if len(pairs) > 1 else ():  # one is checked before it is asked anyway
        folder = evaluate(model, data, **options, check=True)
        if folder in folders:
            raise RecipeError(
                f"{data} and {folders[folder]} would both be written to {folder}: evaluate them apart, "
                "each with its own `--output_dir`."
            )
        folders[folder] = data
    loaded: dict[str, Backend] = {}
    for model, data in pairs:
        evaluate(model, data, **options, loaded=loaded)


if __name__ == "__main__":
    with preflight.kind_errors(), stops_kindly():
        main()
