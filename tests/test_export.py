"""Exports of real small runs, and the cards made of them."""

import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from driver import length_is_even
from vision_r1_recipes import backends, export, grpo, recipe, sft
from vision_r1_recipes import evaluate as ev
from vision_r1_recipes import toy as toy_world
from vision_r1_recipes.data import load_processor, load_rows
from vision_r1_recipes.recipe import RecipeError


SYSTEM = 'Say "why" in {braces}.'
STAGES = [
    {"max_completion_length": 8, "num_generations": 4, "steps": 1},
    {"max_completion_length": 12, "num_generations": 2, "steps": 1},
]


@pytest.fixture(scope="module")
def runs(recipes, toy, tmp_path_factory):
    """A cold start, a GRPO run from it (evaluated) and the same stopped at its half, and a LoRA run."""
    folder = tmp_path_factory.mktemp("runs")
    short = ["--max_steps", "2", "--warmup_steps", "0"]
    sft.main([str(recipes / "sft.yaml"), "--output_dir", str(folder / "cold_start"), *short])
    lora = ["--use_peft", "--lora_r", "4", "--learning_rate", "0.02"]
    sft.main([str(recipes / "sft.yaml"), "--output_dir", str(folder / "lora"), *short, *lora])
    run = [str(recipes / "grpo.yaml"), "--model_name_or_path", str(folder / "cold_start")]
    run += [
        "--output_dir",
        str(folder / "grpo"),
        "--system_prompt",
        json.dumps(SYSTEM),
        "--stages",
        json.dumps(STAGES),
    ]
    run += ["--save_every_rollouts", "1", "--gradient_checkpointing", "true"]
    patch = pytest.MonkeyPatch()
    patch.setitem(grpo.REWARDS, "hfrrf", [length_is_even])  # an untrained model never scores
    grpo.main([*run, "--stop_after_rollouts", "1"])
    shutil.copytree(folder / "grpo", folder / "stopped")
    grpo.main([*run, "--resume_from_checkpoint", "auto"])
    patch.undo()
    ev.evaluate(str(folder / "grpo"), str(toy / "rl"), limit=6, max_new_tokens=6, batch_size=3, n=2, retries=1)
    return folder


@pytest.fixture
def finished(toy, tmp_path):
    """What a finished run leaves, around an untrained model: seconds less than a run."""
    folder = tmp_path / "runs/mine"
    shutil.copytree(toy / "model", folder)
    values = {
        "model_name_or_path": str(toy / "model"),
        "output_dir": "runs/mine",
        "datasets": [],
        "learning_rate": 1.0,
    }
    recipe.save({**values, "hub_token": "hf_secret"}, folder, num_processes=8, distributed_type="DEEPSPEED ZeRO-3")
    (folder / "trainer_state.json").write_text('{"global_step": 4, "max_steps": 4}')
    return folder


def greedy(model, processor, picture, text, system=None) -> list[int]:
    """As a stranger would do it, with transformers alone."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    inputs = processor.apply_chat_template(
        [*messages, {"role": "user", "content": content}],
        **{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"},
    )
    with torch.no_grad():
        made = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    return made[0, inputs["input_ids"].shape[1] :].tolist()


def loaded(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto"), AutoProcessor.from_pretrained(folder)


@pytest.mark.slow
def test_a_run_becomes_a_plain_model(runs, toy, tmp_path, monkeypatch, capsys):
    export.main([str(runs / "grpo"), str(tmp_path / "out/vision-r1")])
    out = tmp_path / "out/vision-r1"
    assert os.listdir(tmp_path / "out") == ["vision-r1"]  # the draft is gone
    assert {path.name for path in out.iterdir()} == {
        *("README.md", "chat_template.jinja", "config.json", "environment.json", "generation_config.json"),
        *("model.safetensors", "processor_config.json", "recipe.yaml", "tokenizer.json", "tokenizer_config.json"),
    }
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, runs / "grpo"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    saved = GenerationConfig.from_pretrained(out)
    assert (saved.temperature, saved.top_p, saved.top_k, saved.repetition_penalty) == (0.6, 0.95, 0, 1.0)
    assert saved.do_sample and saved.max_new_tokens is None and len(saved.eos_token_id) == 2
    assert json.loads((out / "config.json").read_text())["use_cache"] is True

    # Text and picture, on both ways: our evaluation's of the run, a stranger's of the export.
    rows, _ = load_rows([{"path": str(toy / "rl"), "split": "test"}], "rl", load_processor(str(runs / "grpo")), SYSTEM)
    run, processor = backends.load_model(str(runs / "grpo")), load_processor(str(runs / "grpo"))
    backends.set_sampling(run, processor, 12, temperature=0, top_p=1.0)
    model, plain = loaded(out)
    for row in rows.select(range(3)):
        (expected,) = backends.complete(run, processor, [row])
        text = row["prompt"][-1]["content"][-1]["text"]
        tokens = greedy(model, plain, row["images"][0], text, SYSTEM)
        assert plain.decode(tokens, skip_special_tokens=True) == expected["completion"]

    # The card's own code, as it stands there.
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    Image.new("RGB", (100, 100), "red").save(out.parent / "picture.png")
    monkeypatch.chdir(out.parent)
    found = {}
    capsys.readouterr()
    exec(code, found)
    assert found["messages"][0] == {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    assert 1 <= found["output"].shape[1] - found["inputs"]["input_ids"].shape[1] <= 6 and capsys.readouterr().out
    assert found["inputs"]["pixel_values"].shape[0] == 36  # 7056 pixels of the recipe, in patches of 14 x 14


@pytest.mark.slow
def test_the_card_of_a_run(runs, toy, tmp_path):
    export.export(str(runs / "grpo"), str(tmp_path / "vision-r1"))
    card = ModelCard.load(tmp_path / "vision-r1/README.md")
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "image-text-to-text"
    assert metadata["tags"] == ["trl", "sft", "grpo", "vision-r1", "arxiv:2503.06749"]
    assert not metadata.keys() & {"base_model", "datasets", "license"}  # a toy's are nowhere
    (result,) = card.data.eval_results
    summary = json.loads((runs / "grpo/eval/rl/summary.json").read_text())
    assert result.metric_value == round(100 * summary["accuracy"], 2) and result.dataset_split == "test"
    text = card.content
    assert text.index("### SFT, from `model`") < text.index("### GRPO, from `cold_start`")
    assert "32 of 32 kept" in text and "10 of 10 kept" in text and "Processes: 1" in text
    assert re.search(r"\| 1 +\| +1 \| +4 \| +4 \| +8 \|\n\| 2 +\| +1 \| +4 \| +2 \| +12 \|", text)
    assert "prompts_per_rollout: 4\n" in text and f"System prompt: {SYSTEM}" in text
    assert "| 1. rl, test, first 6 |" in text and "Majority vote, %" in text and "With retries, %" in text
    assert "at most 6 new tokens, 2 samples per question, seed 0, the training's system prompt" in text
    assert "One training run, seed 42." in text and "not known to this card" in text
    for name in ("README.md", "environment.json"):
        assert str(runs) not in (tmp_path / "vision-r1" / name).read_text()
    assert str(toy) not in text and "contaminated" not in text and "None" not in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_lora_is_merged(runs, toy, tmp_path, dtype):
    export.main([str(runs / "lora"), str(tmp_path / "merged"), "--dtype", dtype])
    names = load_file(tmp_path / "merged/model.safetensors")
    assert names.keys() == load_file(toy / "model/model.safetensors").keys()
    model, processor = loaded(tmp_path / "merged")
    assert model.dtype is (torch.float32 if dtype == "auto" else torch.bfloat16)
    base = AutoModelForImageTextToText.from_pretrained(toy / "model")
    base.generation_config = model.generation_config
    picture = Image.radial_gradient("L").convert("RGB")
    untrained = greedy(base, processor, picture, "How many?")
    adapted = PeftModel.from_pretrained(base, runs / "lora").eval()
    if dtype == "auto":
        assert greedy(model, processor, picture, "How many?") == greedy(adapted, processor, picture, "How many?")
        assert greedy(model, processor, picture, "How many?") != untrained
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected, got = adapted(input_ids=ids).logits, model(input_ids=ids).logits.float()
        with adapted.disable_adapter():
            before = adapted(input_ids=ids).logits
    off = (got - expected).abs().max()
    assert off < (1e-3 if dtype == "auto" else 0.1 * (before - expected).abs().max())
    assert "LoRA adapter was trained" in (tmp_path / "merged/README.md").read_text()


@pytest.mark.slow
def test_an_unfinished_run_only_by_its_checkpoint_s_name(runs, tmp_path):
    with pytest.raises(RecipeError, match=r"stopped is not finished.*name the checkpoint.*stopped/checkpoint-2\."):
        export.export(str(runs / "stopped"), str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())
    export.export(str(runs / "stopped/checkpoint-2"), str(tmp_path / "out"))
    assert "**An intermediate checkpoint, step 2 of 4" in (tmp_path / "out/README.md").read_text()
    ours, theirs = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out", runs / "stopped/checkpoint-2")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shutil.copytree(runs / "stopped", tmp_path / "killed")
    (tmp_path / "killed/checkpoint-2/complete.json").unlink()
    with pytest.raises(RecipeError, match="checkpoint-2 is not complete"):
        export.export(str(tmp_path / "killed/checkpoint-2"), str(tmp_path / "other"))
    with pytest.raises(RecipeError, match="no complete checkpoint yet"):
        export.export(str(tmp_path / "killed"), str(tmp_path / "other"))
    # The last checkpoint of a finished run is its end.
    export.export(str(runs / "grpo/checkpoint-4"), str(tmp_path / "end"))
    assert "intermediate" not in (tmp_path / "end/README.md").read_text()


def test_refused_before_the_model_loads(finished, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(RecipeError, match="full is not empty"):
        export.export(str(finished), str(tmp_path / "full"))
    with pytest.raises(RecipeError, match="model is not a run"):
        export.export(str(toy / "model"), str(tmp_path / "out"))
    with pytest.raises(RecipeError, match=r"full/file can't be a folder, .*full/file is a file"):
        export.export(str(finished), str(tmp_path / "full/file"))
    with pytest.raises(RecipeError, match=r"full/file/out can't be a folder, .*full/file is a file"):
        export.export(str(finished), str(tmp_path / "full/file/out"))
    with pytest.raises(RecipeError, match="`private` says how to push: name `--push_to_hub"):
        export.main([str(finished), str(tmp_path / "out"), "--private"])
    for content, problem in (
        ({}, "not the folder of a finished evaluation"),
        ({"accuracy_se": 0, "model": str(toy / "model")}, "is of .*model, not of .*mine"),
        ({"accuracy_se": 0, "model": "x", "settings": {"weights": [["model.safetensors", 1, 1]]}}, "written again"),
    ):
        (tmp_path / "eval").mkdir(exist_ok=True)
        (tmp_path / "eval/summary.json").write_text(json.dumps(content))
        with pytest.raises(RecipeError, match=problem):
            export.main([str(finished), str(tmp_path / "out"), "--eval", str(tmp_path / "eval")])
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_gone_is_told(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match=r"can't export .*chat template.* missing\?"):
        export.export(str(run), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_copied_run_keeps_its_evaluations(finished, toy, tmp_path):
    """Of a copy that keeps times, while the original is there; not of one that was trained on, nor of another run."""
    ev.evaluate(str(finished), str(toy / "rl"), limit=2, max_new_tokens=2)
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    assert len(export.load_evaluations(copy, [])) == 1
    os.utime(copy / "model.safetensors")
    with pytest.raises(RecipeError, match=r"is of .*mine, not of .*copy: .*must keep their times"):
        export.load_evaluations(copy, [])
    os.utime(finished / "model.safetensors")
    with pytest.raises(RecipeError, match="is of weights that have been written again since"):
        export.load_evaluations(finished, [])


def test_a_lora_run_without_its_base(finished, tmp_path):
    adapted = get_peft_model(loaded(finished)[0], LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(finished)
    (finished / "model.safetensors").unlink()
    config = json.loads((finished / "adapter_config.json").read_text())
    for named, said in ((str(tmp_path / "gone"), "over its base .*/gone: "), (None, "no base_model_name_or_path")):
        (finished / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
        with pytest.raises(RecipeError, match=said):
            export.export(str(finished), str(tmp_path / "out"))


def test_what_does_not_load_is_no_export(finished, tmp_path, monkeypatch):
    model, processor = loaded(finished)
    expected = export._logits(model.eval(), processor)
    export.verify(finished, expected)
    with pytest.raises(RecipeError, match="other logits"):
        export.verify(finished, expected + 1)
    save = type(model).save_pretrained

    def lossy(self, folder):
        save(self, folder)
        weights = load_file(Path(folder, "model.safetensors"))
        weights.pop(next(name for name in weights if "norm" in name))
        save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", lossy)
    with pytest.raises(RecipeError, match="1 weights missing or left over"):
        export.export(str(finished), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # no draft either


def test_tied_weights_and_another_architecture(finished, tmp_path):
    tokenizer = AutoProcessor.from_pretrained(finished).tokenizer
    for i, build in enumerate((partial(toy_world.build_model, tie_word_embeddings=True), toy_world.build_qwen3_vl)):
        for part in build(tokenizer):
            part.save_pretrained(finished)
        export.export(str(finished), str(tmp_path / f"out-{i}"))
        ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / f"out-{i}", finished))
        assert ours.keys() == theirs.keys() and ("lm_head.weight" in ours) == bool(i)


def test_push(finished, tmp_path, monkeypatch, capsys):
    calls, hub = [], SimpleNamespace(private=True)
    for name in ("create_repo", "model_info", "upload_folder"):

        def call(self, *args, _name=name, **kwargs):
            calls.append((_name, args, kwargs))
            return hub

        monkeypatch.setattr(HfApi, name, call)
    export.export(str(finished), str(tmp_path / "here"))
    assert not calls  # only when it is asked for
    export.main([str(finished), str(tmp_path / "out"), "--push_to_hub", "me/vision-r1", "--private"])
    assert [name for name, *_ in calls] == ["create_repo", "model_info", "upload_folder"]
    assert calls[0][1:] == (("me/vision-r1",), {"private": True, "exist_ok": True})
    sent = calls[2][2]
    assert sent["repo_id"] == "me/vision-r1" and sent["folder_path"] == tmp_path / "out"
    assert "pushed to https://huggingface.co/me/vision-r1" in capsys.readouterr().out
    text = (tmp_path / "out/README.md").read_text()
    assert (
        'model_id = "me/vision-r1"' in text and "\n# vision-r1\n" in text and "Processes: 8 (DEEPSPEED ZeRO-3)" in text
    )
    assert "hf_secret" not in (tmp_path / "out/recipe.yaml").read_text()
    assert not json.loads((tmp_path / "out/environment.json").read_text()).keys() & {"command", "slurm"}

    hub.private = False
    with pytest.raises(RecipeError, match="is there and public"):
        export.export(str(finished), str(tmp_path / "other"), push_to_hub="me/vision-r1", private=True)

    def fail(*_, **__):
        raise OSError("no token")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(
        RecipeError, match=r"no token\. The export is whole; `hf upload me/vision-r1 .*other \.` uploads"
    ):
        export.export(str(finished), str(tmp_path / "other"), push_to_hub="me/vision-r1")
    monkeypatch.setattr(HfApi, "create_repo", fail)
    with pytest.raises(RecipeError, match="me/vision-r1: no token"):
        export.export(str(finished), str(tmp_path / "third"), push_to_hub="me/vision-r1")
    assert not (tmp_path / "third").exists()


SUMMARY = {
    "questions": 480,
    "accuracy": 0.4875,
    "accuracy_se": 0.0228,
    "format_rate": 1.0,
    "mean_tokens": 50.8,
    "truncated": 0.0,
    "data": {"path": "AI4Math/MathVista", "split": "test", "limit": None, "dropped": {"no image": 2}},
    "sampling": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 16000, "seed": 0},
}


def test_the_card_of_the_real_recipes(tmp_path, monkeypatch):
    """Cold start and PTST as they would be at 7B, with a summary that has no optional key."""
    monkeypatch.chdir(tmp_path)
    root = Path(export.__file__).parents[2] / "recipes"
    for name in ("cold_start", "ptst"):
        recipe.save(recipe.load(root / f"{name}.yaml"), f"runs/{name}")
    report = {"read": 10000, "kept": 9990, "dropped": {"too many tokens": 10}}
    Path("runs/ptst/data_report.json").write_text(json.dumps(report))
    cold, ptst = export.load_runs(Path("runs/ptst"))
    ptst.environment["command"] = ["grpo.py", "recipes/ptst.yaml", "--seed", "1"]
    card = export.model_card("me/vision-r1", [cold, ptst], [SUMMARY])
    data = ModelCard(str(card)).data
    assert data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct" and data.base_model_relation == "finetune"
    assert data.datasets == ["Osilly/Vision-R1-cold", "Osilly/Vision-R1-rl"] and data.license == "cc-by-nc-sa-4.0"
    (result,) = data.eval_results
    assert result.dataset_type == "AI4Math/MathVista" and result.metric_value == 48.75
    assert "± 4.5: 95 % interval over 480 questions" in result.metric_name
    text = card.content
    assert "`Qwen/Qwen2.5-VL-7B-Instruct`, trained by SFT and then GRPO (recipe `recipes/ptst.yaml`)" in text
    assert "48.8 ± 4.5" in text and "9,990 of 10,000 kept; 10 dropped: too many tokens" in text
    assert "contaminated" in text and "cc-by-nc-sa-4.0, which excludes commercial use" in text
    assert "licence of the base model applies" in text
    assert "2 unusable questions left out" in text and "Majority" not in text and "had no end" not in text
    assert "max_new_tokens=16000" in text and "system" not in re.search(r"```python.*?```", text, re.DOTALL)[0]

    own = {"path": "Osilly/Vision-R1-rl", "split": "train", "limit": None, "dropped": {}}
    trained_on = {**SUMMARY, "data": own, "accuracy": 0.0, "accuracy_se": 0.0, "truncated": 0.25, "questions": 30}
    text = export.model_card("mine", [cold, ptst], [SUMMARY, trained_on], license="other").content
    assert "Evaluation 2 asks questions of the training data." in text and "\nlicense: other\n" in text
    assert "0.0 ± 10.0" in text  # an error of 0 would claim to know
    assert "In evaluation 2, 25.0 % of the completions had no end in 16,000 tokens." in text
    text = export.model_card("mine", [ptst], []).content
    assert "has not been evaluated" in text and "intervals" not in text and "base model applies" not in text
    alone = ModelCard(str(export.model_card("mine", [ptst], []))).data
    assert alone.base_model is None  # the cold start's folder is gone: no Hub id is made of its path
    other = replace(ptst, values={**ptst.values, "datasets": [{"path": "me/own"}], "model_name_or_path": "me/start"})
    data = ModelCard(str(export.model_card("mine", [other], []))).data
    assert data.datasets == ["me/own"] and data.base_model == "me/start" and data.license is None
