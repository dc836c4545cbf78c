"""
A finished run as a model that plain transformers and vLLM load, with a card made of what the run has left.

```shell
python -m vision_r1_recipes.export runs/ptst exports/vision-r1 [--dtype bfloat16] [--push_to_hub OWNER/NAME --private]
python -m vision_r1_recipes.export runs/ptst/checkpoint-400 exports/at-400    # an unfinished run's, only by its name
```

Writes the weights (those of a LoRA adapter merged into its base), processor and chat template, and:

- `generation_config.json`: the evaluation's sampling, temperature 0.6 and top_p 0.95 `[repo]`, without a penalty.
  Qwen2.5-VL's own holds a repetition penalty of 1.05 and a temperature of 1e-6, which `generate` and `vllm serve`
  take for every request that says nothing else.
- `README.md`: the model card. It says what recipes, reports and evaluations in the folders of the run and of those
  that made its start model say; what is not known is left out.
- `recipe.yaml` and `environment.json` of the run, without access tokens, command line and cluster job.

All of it is loaded again, and must give the logits of the run's model, before `OUTPUT_DIR` appears.
"""

import sys
from pathlib import Path


# A script's folder comes first on the path, where `evaluate.py` would shadow Hugging Face's `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import argparse  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import shutil  # noqa: E402
from collections.abc import Mapping, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from vision_r1_recipes import checkpoints, preflight, recipe  # noqa: E402
from vision_r1_recipes.backends import load_model, set_sampling  # noqa: E402
from vision_r1_recipes.data import load_processor  # noqa: E402
from vision_r1_recipes.evaluate import interval, percent, weights_of  # noqa: E402
from vision_r1_recipes.progress import check_folder  # noqa: E402
from vision_r1_recipes.ptst import parse_stages  # noqa: E402
from vision_r1_recipes.recipe import RecipeError  # noqa: E402
from vision_r1_recipes.report import table  # noqa: E402
from vision_r1_recipes.results import read_json  # noqa: E402


TEMPERATURE, TOP_P, MAX_NEW_TOKENS = 0.6, 0.95, 16000  # [repo]
PAPER = "2503.06749"
DATA_LICENSE = "cc-by-nc-sa-4.0"  # of both released sets [repo]
RELEASED = {name: f"Osilly/{name}" for name in ("Vision-R1-cold", "Vision-R1-rl")}  # by folder, as in data/README.md
SECRET = ("hub_token", "push_to_hub_token")  # of a recipe
PRIVATE = ("command", "slurm")  # of environment.json: paths and hosts
# Keys of a recipe that the card shows, where the recipe has them.
SHOWN = (
    *("dtype", "freeze_vision", "use_peft", "lora_r", "lora_alpha", "lora_target_modules"),
    *("min_pixels", "max_pixels", "max_prompt_length", "max_length"),
    *("prompts_per_rollout", "prompts_per_update", "global_batch_size", "num_train_epochs", "max_steps"),
    *("temperature", "top_p", "top_k", "repetition_penalty", "mask_truncated_completions"),
    *("reward_weights", "beta", "epsilon", "scale_rewards", "num_iterations", "loss_type", "entropy_coef"),
    *("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2", "max_grad_norm"),
    "seed",
)
REWARDS = {
    "hfrrf": "1 if a completion is `<think>...</think><answer>...</answer>` and its answer is right, else 0",
    "soft": "the format `<think>...</think><answer>...</answer>` and a right answer count each by itself",
}
CARD = """\
# {title}

{partial}{what} with `vision-r1-recipes`, an independent reconstruction
of [Vision-R1](https://arxiv.org/abs/{paper}) on [TRL](https://github.com/huggingface/trl). It is not the model of the
paper's authors.

## How to use it

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model_id = "{name}"
processor = AutoProcessor.from_pretrained(model_id)
model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto", device_map="auto")

picture = {{"type": "image", "image": Image.open("picture.png")}}
question = {{"type": "text", "text": "What is the angle at A?"}}
{system}messages = [{first}{{"role": "user", "content": [picture, question]}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens={cap})
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Or `vllm serve {name}`. Both sample as `generation_config.json` says: temperature {temperature}, top_p {top_p}, no
repetition penalty. The processor brings pictures to the sizes seen in training.

## Training

{training}

## Results

{results}

## Limits

{limits}
"""


@dataclass
class Run:
    """What a run has left in its folder, apart from the weights."""

    folder: Path
    values: dict[str, Any]  # the resolved recipe
    environment: dict[str, Any]
    report: dict[str, Any]  # on its data

    @property
    def method(self) -> str:
        return recipe.script(self.values).removesuffix(".py").upper()

    def name(self, path: str) -> tuple[str, bool]:
        """
        A Hub id and `True`, or the last part of a path. A path may be of another machine: one that begins as the
        recipes' folders or as the run's own is no Hub id.
        """
        folders = ("data", "runs", Path(self.values.get("output_dir") or "runs").parts[0])
        hub = (
            re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and path.split("/")[0] not in folders and not Path(path).exists()
        )
        known = path if hub else RELEASED.get(Path(path).name)
        return known or Path(path).name, known is not None

    def link(self, path: str, kind: str = "") -> str:
        name, on_hub = self.name(path)
        return f"[{name}](https://huggingface.co/{kind}{name})" if on_hub else f"`{name}` (local)"

    def data(self) -> list[str]:
        """Paths of its training data."""
        return list(dict.fromkeys(source["path"] for source in self.values.get("datasets", [])))


def load_runs(folder: Path) -> list[Run]:
    """The run in `folder`, last, after those that made its start model, as far back as their folders are there."""
    runs: list[Run] = []
    while (folder / "recipe.yaml").is_file() and all(run.folder != folder.resolve() for run in runs):
        said = (read_json(folder / f"{name}.json") or {} for name in ("environment", "data_report"))
        runs.insert(0, Run(folder.resolve(), recipe.load(folder / "recipe.yaml"), *said))
        folder = Path(runs[0].values.get("model_name_or_path") or "")
        if folder.name.startswith(checkpoints.PREFIX):
            folder = folder.parent
    return runs


def find_run(path: Path) -> tuple[Path, str | None]:
    """
    The folder of the run that `path` belongs to, and how far it was at `path` if not at its end.

    Raises:
        `RecipeError`: there is no run, it is not finished, or the checkpoint is not complete.
    """
    named = path.name.startswith(checkpoints.PREFIX)
    home = path.parent if named else path
    if not path.is_dir() or not (home / "recipe.yaml").is_file():
        raise RecipeError(
            f"{path} is not a run: give its output folder (it holds recipe.yaml), or a checkpoint in it."
        )
    if named:
        state = read_json(path / "trainer_state.json")
        if state is None or checkpoints.read(path) is None:
            raise RecipeError(f"{path} is not complete: a run was killed while it wrote it. Name another checkpoint.")
        far = f"step {state['global_step']} of {state['max_steps']}"
        return home, far if state["global_step"] < state["max_steps"] else None
    if not checkpoints.finished(home):
        newest, _ = checkpoints.wanted("auto", home)
        hint = f"Or name the checkpoint to export: {newest}." if newest else "It has no complete checkpoint yet."
        raise RecipeError(
            f"{home} is not finished, so it is not exported: `--resume_from_checkpoint auto` goes on with it. {hint}"
        )
    return home, None


def load_evaluations(model: Path, folders: Sequence[str]) -> list[dict[str, Any]]:
    """
    The summaries below `MODEL/eval` and in `folders`.

    Raises:
        `RecipeError`: one can't be read, or is of other weights.
    """
    found = {path.parent.resolve(): path.parent for path in sorted((model / "eval").rglob("summary.json"))}
    found |= {Path(folder).resolve(): Path(folder) for folder in folders}
    weights = weights_of(str(model))
    summaries = []
    for folder in found.values():
        summary = read_json(folder / "summary.json")
        if not isinstance(summary, dict) or not summary.keys() >= {"accuracy_se", "model"}:
            raise RecipeError(f"{folder} is not the folder of a finished evaluation.")
        other = Path(summary["model"]).is_dir() and Path(summary["model"]).resolve() != model.resolve()
        noted = summary.get("settings", {}).get("weights")
        if noted != weights if noted else other:  # a copy's are the same
            whose = summary["model"] if other else "weights that have been written again since"
            raise RecipeError(
                f"the evaluation in {folder} is of {whose}, not of {model}: evaluate again, or move it away. (The "
                "files of a copied run must keep their times: `cp -a`.)"
            )
        summaries.append(summary)
    return summaries


def _training(run: Run) -> str:
    values, report, environment = run.values, run.report, run.environment
    lines = [f"### {run.method}, from {run.link(values.get('model_name_or_path') or 'unknown')}", ""]
    if data := run.data():
        lines += [f"- Data: {', '.join(run.link(path, 'datasets/') for path in data)}"]
    if report:
        dropped = "".join(f"; {count:,} dropped: {reason}" for reason, count in report["dropped"].items())
        lines += [f"- Rows: {report['kept']:,} of {report['read']:,} kept{dropped}"]
    if run.method == "GRPO":
        lines += [f"- Reward: {REWARDS[values.get('reward', 'hfrrf')]}"]
    if values.get("system_prompt"):
        lines += [f"- System prompt: {values['system_prompt'].strip()}"]
    if values.get("use_peft"):
        lines += ["- A LoRA adapter was trained; its weights are merged into the model's"]
    if packages := environment.get("packages"):
        versions = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
        lines += [f"- Versions: Python {environment['python']}, {versions}"]
    if commit := environment.get("git_commit"):
        lines += [f"- Commit: `{commit}`{' with uncommitted changes' * bool(environment.get('git_dirty'))}"]
    if number := environment.get("num_processes"):
        kind = environment.get("distributed_type", "NO")
        lines += [f"- Processes: {number}{'' if kind == 'NO' else f' ({kind})'}"]
    if values.get("stages"):
        stages = enumerate(parse_stages(values["stages"]), 1)
        prompts = values.get("prompts_per_rollout", "unknown")
        rows = [(i, s.steps, prompts, s.num_generations, s.max_completion_length) for i, s in stages]
        header = ("Stage", "Rollouts", "Prompts per rollout", "Completions per prompt", "Cap on a completion, tokens")
        lines += ["", table(header, rows)]
    shown = {key: values[key] for key in SHOWN if values.get(key) is not None}
    return "\n".join([*lines, "", "```yaml", recipe.dump(shown).rstrip(), "```"])


def _results(run: Run, summaries: Sequence[Mapping[str, Any]]) -> str:
    if not summaries:
        return "This model has not been evaluated."
    optional = (("accuracy_majority", "Majority vote, %"), ("accuracy_with_retries", "With retries, %"))
    extra = [(key, title) for key, title in optional if any(key in s for s in summaries)]
    header = ("Data", "Questions", "Accuracy, % (95 %)", *(title for _, title in extra), "Format, %", "Mean tokens")
    rows, notes = [], []
    for i, s in enumerate(summaries, 1):
        data, sampling, n = s["data"], s["sampling"], s.get("samples_per_question", 1)
        first = f", first {data['limit']}" if data["limit"] else ""
        accuracy = f"{percent(s['accuracy'])} ± {percent(interval(s['accuracy_se'], s['questions']))}"
        more = [percent(s.get(key)) for key, _ in extra]
        rest = (percent(s["format_rate"]), f"{s['mean_tokens']:.1f}", percent(s["truncated"]))
        questions = f"{i}. {run.name(data['path'])[0]}, {data['split']}{first}"
        rows.append((questions, s["questions"], accuracy, *more, *rest))
        prompt = sampling.get("system_prompt")
        whose = "the training's" if prompt == run.values.get("system_prompt") else "another"
        said = [
            f"temperature {sampling['temperature']:g}",
            f"top_p {sampling['top_p']:g}",
            f"at most {sampling['max_new_tokens']:,} new tokens",
            f"{n} sample{'s' * (n > 1)} per question",
            f"seed {sampling['seed']}",
            f"{whose} system prompt" if prompt else "no system prompt",
            f"by {sampling.get('backend', 'transformers')}",
        ]
        if sampling.get("retries"):
            said.append(f"the retries: up to {sampling['retries']} for a completion without `</answer>`")
        if data["dropped"]:
            said.append(f"{sum(data['dropped'].values())} unusable questions left out")
        if s.get("refused"):
            said.append(f"{s['refused']} requests that the server refused count as wrong")
        notes.append(f"{i}. {', '.join(said)}")
    meaning = (
        "± is 1.96 standard errors over the questions, or 3 / questions where all or none are right. A completion "
        "that was cut off (truncated) is wrong. Answers are graded by rules, not by a model."
    )
    return "\n".join([table((*header, "Truncated, %"), rows), "", meaning, "", *notes])


def _limits(runs: Sequence[Run], summaries: Sequence[Mapping[str, Any]]) -> str:
    run, seeds = runs[-1], [str(each.values["seed"]) for each in runs if "seed" in each.values]
    lines = ["One training run" + f", seed {', '.join(dict.fromkeys(seeds))}" * bool(seeds)]
    lines[0] += (
        ". The intervals are over questions, and don't tell how far another seed would land." if summaries else "."
    )
    if run.method == "GRPO":
        lines.append(
            "The reward looks at format and final answer. Nothing checked that the reasoning is sound, leads to the "
            "answer, or says what is in the picture."
        )
    else:
        lines.append("It was trained to imitate its data, mistakes and habits included.")
    trained = {(source["path"], source.get("split", "train")) for r in runs for source in r.values.get("datasets", [])}
    for i, s in enumerate(summaries, 1):
        if s["truncated"]:
            cap = s["sampling"]["max_new_tokens"]
            lines.append(
                f"In evaluation {i}, {percent(s['truncated'])} % of the completions had no end in {cap:,} tokens."
            )
        if (s["data"]["path"], s["data"]["split"]) in trained:
            lines.append(f"Evaluation {i} asks questions of the training data.")
    used = [each.name(path)[0] for each in runs for path in each.data()]
    if RELEASED["Vision-R1-rl"] in used:
        lines.append(
            "Vision-R1-rl was made from We-Math, MathVision, PolyMath, SceMQA and Geometry3K. Four of them are public "
            "benchmarks: results on those are contaminated."
        )
    if set(RELEASED.values()) & set(used):
        lines.append(f"Its training data are under {DATA_LICENSE}, which excludes commercial use.")
    if others := [name for name in dict.fromkeys(used) if name not in RELEASED.values()]:
        lines.append(f"The licence of {', '.join(others)} (training data) is not known to this card.")
    if runs[0].name(runs[0].values.get("model_name_or_path") or "")[1]:
        lines.append("The licence of the base model applies as well.")
    lines.append("Nothing was measured but what stands under Results: no safety, no bias, no other tasks.")
    return "\n".join(f"- {line}" for line in lines)


def model_card(
    name: str,
    runs: Sequence[Run],
    summaries: Sequence[Mapping[str, Any]],
    partial: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    The model card of the last of `runs`.

    Args:
        name (`str`): Hub id, or name of the folder that holds the model.
        runs (`list[Run]`): From [`load_runs`].
        summaries (`list[dict]`): Its evaluations, from [`load_evaluations`].
        partial (`str`, *optional*): How far the run was, if not at its end.
        license (`str`, *optional*): Defaults to that of Vision-R1's data for a model trained on them, else to none.
    """
    run, title = runs[-1], name.rpartition("/")[-1]
    datasets = dict.fromkeys(each.name(path) for each in runs for path in each.data())
    datasets = [source for source, on_hub in datasets if on_hub]
    start, on_hub = runs[0].name(runs[0].values.get("model_name_or_path") or "unknown")
    methods = list(dict.fromkeys(each.method for each in runs))
    metadata = ModelCardData(
        base_model=start if on_hub else None,
        base_model_relation="finetune" if on_hub else None,
        datasets=datasets or None,
        library_name="transformers",
        license=license or (DATA_LICENSE if set(RELEASED.values()) & set(datasets) else None),
        pipeline_tag="image-text-to-text",
        tags=["trl", *map(str.lower, methods), "vision-r1", f"arxiv:{PAPER}"],
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="image-text-to-text",
                dataset_type=run.name(s["data"]["path"])[0],
                dataset_name=run.name(s["data"]["path"])[0],
                dataset_split=s["data"]["split"],
                metric_type="accuracy",
                metric_name=f"Accuracy, % (± {percent(interval(s['accuracy_se'], s['questions']))}: 95 % interval "
                f"over {s['questions']} questions)",
                metric_value=round(100 * s["accuracy"], 2),
            )
            for s in summaries
        ]
        or None,
    )
    named = next((Path(part) for part in run.environment.get("command", [])[1:] if part.endswith(".yaml")), None)
    by = f" (recipe `{named.name if named.is_absolute() else named}`)" if named else ""
    system = json.dumps(run.values.get("system_prompt"), ensure_ascii=False)
    text = CARD.format(
        **{"title": title, "name": name, "paper": PAPER, "temperature": TEMPERATURE, "top_p": TOP_P},
        partial=f"**An intermediate checkpoint, {partial}: its run was not finished.**\n\n" if partial else "",
        what=f"{f'`{start}`' if on_hub else 'A vision-language model'}, trained by {' and then '.join(methods)}{by}",
        system=f'system = {{"type": "text", "text": {system}}}\n' if run.values.get("system_prompt") else "",
        first='{"role": "system", "content": [system]}, ' if run.values.get("system_prompt") else "",
        cap=max((s["sampling"]["max_new_tokens"] for s in summaries), default=MAX_NEW_TOKENS),
        training="\n\n".join(map(_training, runs)),
        results=_results(run, summaries),
        limits=_limits(runs, summaries),
    )
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


@torch.no_grad()
def _logits(model: PreTrainedModel, processor: ProcessorMixin) -> torch.Tensor:
    """Of one prompt with a picture."""
    content = [
        {"type": "image", "image": Image.linear_gradient("L").convert("RGB")},
        {"type": "text", "text": "What?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model(**inputs.to(model.device)).logits.float()


def verify(folder: Path, expected: torch.Tensor) -> None:
    """
    Load the model in `folder` as anybody would, and hold its logits against `expected`.

    Raises:
        `RecipeError`: weights are missing or left over, or the logits differ.
    """
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise RecipeError(f"what was written does not load: {len(wrong)} weights missing or left over: {wrong[0]}.")
    got = _logits(model.eval(), AutoProcessor.from_pretrained(folder))
    # As far as rounding in 16 bits may go.
    if got.shape != expected.shape or not (got - expected).abs().max() <= 0.02 * expected.abs().max():
        raise RecipeError("what was written has other logits than the run's model.")


def export(
    run: str,
    output_dir: str,
    evaluations: Sequence[str] = (),
    dtype: str = "auto",
    license: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """
    Write the model of a run, with its card, into a new folder.

    Args:
        run (`str`): A finished run's output folder, or a checkpoint in the folder of any run.
        output_dir (`str`): Folder that is not there yet, or is empty. It appears when everything is in it.
        evaluations (`list[str]`, *optional*): Their folders, for the card, beside those below `RUN/eval`.
        dtype (`str`, *optional*, defaults to `"auto"`): Of the weights; auto is as they were saved (LoRA: the base's).
        license (`str`, *optional*):
            For the card; defaults to cc-by-nc-sa-4.0 for a model trained on Vision-R1's data `[repo]`, else to none.
        push_to_hub (`str`, *optional*): Hub id to upload it to.
        private (`bool`, *optional*, defaults to `False`): Whether that is to be private.

    Raises:
        `RecipeError`: the run is not finished, something can't be read, or what was written does not load.
    """
    model, output = Path(run), Path(output_dir).resolve()
    if private and not push_to_hub:
        raise RecipeError("`private` says how to push: name `--push_to_hub OWNER/NAME` too, or leave it out.")
    check_folder(output)
    if output.exists() and any(output.iterdir()):
        raise RecipeError(f"{output_dir} is not empty: name another folder, or remove it.")
    home, partial = find_run(model)
    summaries = load_evaluations(model, evaluations)
    runs = load_runs(home)
    card = model_card(push_to_hub or output.name, runs, summaries, partial, license)
    processor = load_processor(str(model))
    api = HfApi()
    if push_to_hub:  # now: a missing token would be told after the work otherwise
        try:
            api.create_repo(push_to_hub, private=private or None, exist_ok=True)
            public = private and not api.model_info(push_to_hub).private
        except Exception as error:
            raise RecipeError(f"`push_to_hub`: {push_to_hub}: {error}") from error
        if public:
            raise RecipeError(f"`push_to_hub`: {push_to_hub} is there and public, `--private` does not change that.")
    draft = output.parent / f".{output.name}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        loaded = load_model(str(model), dtype, device_map="cpu")
        sampling = set_sampling(loaded, processor, MAX_NEW_TOKENS, TEMPERATURE, TOP_P)
        del sampling["max_new_tokens"]  # `vllm serve` would make a ceiling of it
        loaded.generation_config = GenerationConfig(**sampling)
        loaded.config.use_cache = True  # gradient checkpointing has left it off
        expected = _logits(loaded, processor)
        loaded.save_pretrained(draft)
        processor.save_pretrained(draft)
        del loaded
        gc.collect()  # a large model fits into memory once
        verify(draft, expected)
        values, environment = runs[-1].values, runs[-1].environment
        (draft / "recipe.yaml").write_text(recipe.dump({k: v for k, v in values.items() if k not in SECRET}))
        environment = {key: value for key, value in environment.items() if key not in PRIVATE}
        (draft / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
        card.save(draft / "README.md")
        draft.rename(output)
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        said = f"can't export {run}: {type(error).__name__}: {error}"
        raise RecipeError(f"{said}. Is a file of the tokenizer or the chat template missing?") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"written to {output_dir}, and read back: the same logits as the run's model")
    if push_to_hub:
        try:
            # What an earlier upload left would be loaded with it.
            stale = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json"]
            api.upload_folder(
                repo_id=push_to_hub, folder_path=output, delete_patterns=stale, commit_message="Export of the run"
            )
        except Exception as error:
            again = f"hf upload {push_to_hub} {output_dir} ."
            raise RecipeError(f"`push_to_hub`: {error}. The export is whole; `{again}` uploads it.") from error
        print(f"pushed to https://huggingface.co/{push_to_hub}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vision_r1_recipes.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", help="a finished run's output folder, or a checkpoint in a run's")
    parser.add_argument("output_dir", help="a new folder")
    parser.add_argument(
        "--eval", dest="evaluations", nargs="+", default=(), metavar="FOLDER", help="beside those below RUN/eval"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--license", help="for the card, as the Hub writes it")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload it, too")
    parser.add_argument("--private", action="store_true", help="with --push_to_hub")
    export(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    with preflight.kind_errors():
        main()
