"""Evaluation of a real, untrained tiny model on real files, and the numbers made of its samples."""

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.generation import GenerationMixin

from vision_r1_recipes import backends, toy
from vision_r1_recipes import evaluate as ev
from vision_r1_recipes.bridge.endpoint import EndpointConfig, served
from vision_r1_recipes.data import load_processor, load_rows
from vision_r1_recipes.progress import progress
from vision_r1_recipes.recipe import RecipeError


QUICK = {"max_new_tokens": 12, "batch_size": 5, "buckets": (4, 8)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy.build(folder, num_base=40, num_cold=20, num_train=4, num_test=12)
    return folder


@pytest.fixture(scope="module")
def evaluated(world):
    summary = ev.evaluate(str(world / "model"), str(world / "rl"), output_dir=str(world / "eval"), seed=3, **QUICK)
    return summary, pd.read_parquet(world / "eval" / "samples.parquet")


def test_untrained_model_end_to_end(world, evaluated):
    summary, samples = evaluated
    gold = pd.read_parquet(world / "rl" / "test.parquet")
    assert list(samples.columns) == [
        "id", "problem", "solution", "sample", "completion", "tokens", "truncated", "answer", "format", "correct",
    ]  # fmt: skip
    assert list(samples["id"]) == [f"row {i}" for i in range(12)]
    assert list(samples["problem"]) == list(gold["problem"]) and list(samples["solution"]) == list(gold["answer"])
    assert summary["questions"] == 12 and summary["format_rate"] == summary["hfrrf"] == 0
    assert samples["tokens"].between(1, 12).all() and (samples["tokens"][samples["truncated"]] == 12).all()
    assert summary["mean_tokens"] == samples["tokens"].mean() and summary["truncated"] == samples["truncated"].mean()
    assert not samples["correct"][samples["truncated"]].any()
    assert sum(b["questions"] for b in summary["by_length"]) == 12
    assert json.loads((world / "eval" / "summary.json").read_text()) == summary


def test_settings_are_recorded(world, evaluated):
    summary, _ = evaluated
    sampling = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.0, "do_sample": True}
    wanted = {**sampling, "max_new_tokens": 12, "batch_size": 5, "seed": 3, "system_prompt": None}
    assert {key: summary["sampling"][key] for key in wanted} == wanted
    assert summary["name"] == "model" and summary["model"] == str(world / "model")
    assert summary["data"] == {"path": str(world / "rl"), "split": "test", "limit": None, "dropped": {}}
    assert summary["environment"]["packages"]["transformers"] and summary["dtype"] == "torch.float32"


def test_seed_decides(world, evaluated, tmp_path):
    _, samples = evaluated

    def completions(seed):
        folder = tmp_path / str(seed)
        ev.evaluate(str(world / "model"), str(world / "rl"), output_dir=str(folder), seed=seed, **QUICK)
        return list(pd.read_parquet(folder / "samples.parquet")["completion"])

    assert completions(3) == list(samples["completion"])
    assert completions(4) != list(samples["completion"])


@pytest.mark.parametrize("temperature", [0.6, 0.0])
def test_nothing_is_inherited_from_the_saved_generation_config(world, tmp_path, monkeypatch, temperature):
    folder = tmp_path / "resaved"
    model = AutoModelForImageTextToText.from_pretrained(world / "model")
    assert model.generation_config.repetition_penalty == 1.05 and model.generation_config.temperature == 1e-6
    ends = model.generation_config.eos_token_id
    model.save_pretrained(folder)
    load_processor(str(world / "model")).save_pretrained(folder)
    traps = {"no_repeat_ngram_size": 2, "min_p": 0.5, "use_cache": False, "max_length": 20, "bad_words_ids": [[5]]}
    saved = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(saved | traps))

    used = []
    prepare = GenerationMixin._prepare_generation_config

    def spy(self, *args, **kwargs):
        result = prepare(self, *args, **kwargs)
        used.append(result[0])
        return result

    monkeypatch.setattr(GenerationMixin, "_prepare_generation_config", spy)
    ev.evaluate(str(folder), str(world / "rl"), limit=2, temperature=temperature, max_new_tokens=2)
    (config,) = used
    assert config.repetition_penalty == 1.0 and config.top_k == 0 and config.use_cache is True
    assert config.do_sample is (temperature > 0)
    assert (config.temperature, config.top_p) == ((0.6, 0.95) if temperature else (1.0, 1.0))
    assert not config.no_repeat_ngram_size and config.min_p is None and config.bad_words_ids is None
    assert config.suppress_tokens == [model.config.image_token_id]
    assert set(config.eos_token_id) == set(ends) and len(ends) == 2
    assert (folder / "eval" / "rl" / "summary.json").is_file()


def test_lengths_ends_and_order(world, monkeypatch):
    """`generate` is replaced by one that answers each question with as many words as its prompt has real tokens."""
    processor = load_processor(str(world / "model"))
    rows, _ = load_rows([{"path": str(world / "rl"), "split": "test"}], "rl", processor)
    sampling = {"max_new_tokens": 400, "temperature": 0.6, "top_p": 0.95}
    backend = backends.Transformers(str(world / "model"), processor, dtype="auto", batch_size=5, args={}, **sampling)
    model = backend.model
    end, pad = model.generation_config.eos_token_id
    word = processor.tokenizer("a")["input_ids"][0]
    lengths = rows.with_format(None)["tokens"][:]
    cap = sorted(lengths)[-2]

    def generate(input_ids, attention_mask, pixel_values, **kwargs):
        tail = torch.full((len(input_ids), cap), pad)
        for row, n in zip(tail, attention_mask.sum(1).tolist(), strict=True):
            row[:n] = word
            row[n : n + 1] = end if n % 2 else pad  # either token ends a turn
        return torch.cat([input_ids, tail], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    found, batches = {}, []
    ev._collect(backend, rows, 1, 0, found, lambda batch: (found.update(batch), batches.append(batch)))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    asked = [lengths[i] for batch in batches for (*_, i), _ in batch]
    assert asked == sorted(lengths)
    made = [found[0, 0, i] for i in range(len(rows))]
    assert [m["truncated"] for m in made] == [n >= cap for n in lengths]
    assert [m["tokens"] for m in made] == [min(n + 1, cap) for n in lengths]
    assert [m["completion"] for m in made] == ["a" * min(n, cap) for n in lengths]


R1 = "<think> Wait. 7+5=12 </think><answer> Final Answer:12 </answer>"


@pytest.mark.parametrize(
    "text, has_format, correct",
    [
        (R1, True, True),
        (R1.replace("Final Answer:12", "13"), True, False),
        ("12", False, True),
        ("The answer is 12.", False, True),
        ("There are 12 red dots.", False, True),
        ("**Answer:** 12", False, True),
        ("The answer is 13.", False, False),
        ("<answer> 12 </answer>", False, True),
        ("<answer>3</answer> No. <answer> Final Answer: 12 </answer>", False, True),
        ("<answer>12</answer> No. <answer>3</answer>", False, False),
        ("<think> it is 12 </think> 12", False, True),
        ("<think> So the answer is 12.", False, False),
        ("<think> 12 </think><answer> Final Answer:12", False, False),
        ("Adding both. " * 50 + "So the total is \\boxed{12}.", False, True),
        ("Adding both. " * 50 + "\nThe answer is: 12", False, True),
        ("Adding both. " * 50 + "12", False, False),
        ("", False, False),
    ],
)
def test_judge(text, has_format, correct):
    judged = ev.judge(text, "12", truncated=False)
    assert (judged["format"], judged["correct"]) == (has_format, correct)
    assert ev.judge(text, "12", truncated=True) == {"answer": None, "format": False, "correct": False}


def test_summary_of_known_samples():
    samples = pd.DataFrame(
        [
            ("Wait, let me check. wait", 4, False, True, True),
            ("Hmmm, a mistake, the waiter checkmates", 5, False, True, False),
            ("12", 8, False, False, True),
            ("", 9, True, False, False),
        ],
        columns=["completion", "tokens", "truncated", "format", "correct"],
    )
    summary = ev.summarize(samples, (4, 8, 100))
    assert summary["accuracy"] == 0.5 and summary["accuracy_se"] == 0.25 and summary["hfrrf"] == 0.25
    assert summary["mean_tokens"] == summary["median_tokens"] == 6.5 and summary["truncated"] == 0.25
    assert [(b["questions"], b["accuracy"]) for b in summary["by_length"]] == [(1, 1), (2, 0.5), (1, 0), (0, None)]
    assert [ev.bucket_name(b) for b in summary["by_length"]] == ["1-4", "5-8", "9-100", "over 100"]
    per_thousand = {word: r["per_1000_tokens"] * 26 / 1000 for word, r in summary["reflection"].items()}
    assert per_thousand == pytest.approx({"wait": 2, "hmm": 1, "alternatively": 0, "mistake": 1, "check": 1, "any": 5})
    assert summary["reflection"]["wait"]["share"] == 0.25 and summary["reflection"]["any"]["share"] == 0.5


@pytest.mark.parametrize("right", [0, 40])
def test_none_or_all_right_is_not_known_without_error(right):
    samples = pd.DataFrame({"id": range(40), "completion": "12", "tokens": 2, "truncated": False, "format": True})
    summary = ev.summarize(samples.assign(correct=right > 0))
    assert (summary["accuracy_se"], summary["accuracy_interval"]) == (0, 0.075)  # the rule of three
    said = {"name": "x", "data": {"path": "rl", "split": "test", "limit": None, "dropped": {}}}
    assert f"accuracy {right * 2.5} % ± 7.5 (95 % interval)" in ev.describe({**said, **summary})


def columns(correct):
    return {"id": [f"row {i}" for i in range(len(correct))], "correct": list(correct)}


def test_paired_difference_of_known_cases():
    right, wrong = columns([True] * 50), columns([False] * 50)
    assert ev.paired_difference(right, right) == (0, -0.06, 0.06)  # the rule of three
    assert ev.paired_difference(right, wrong) == (1, 0.94, 1)
    assert ev.paired_difference(wrong, right) == (-1, -1, -0.94)

    # 60 questions only `a` gets right, 20 only `b`: the interval is close to the normal one, and to a plain loop's.
    a = np.array([1] * 60 + [0] * 20 + [1] * 300 + [0] * 100, bool)
    b = np.array([0] * 60 + [1] * 20 + [1] * 300 + [0] * 100, bool)
    mean, low, high = ev.paired_difference(columns(a), columns(b))
    difference = a.astype(float) - b
    half = 1.96 * difference.std() / np.sqrt(480)
    assert mean == pytest.approx(40 / 480)
    assert (low, high) == (pytest.approx(mean - half, abs=0.004), pytest.approx(mean + half, abs=0.004))
    rng = np.random.default_rng(1)
    loop = [rng.choice(difference, 480).mean() for _ in range(4000)]
    assert (low, high) == pytest.approx(tuple(np.percentile(loop, [2.5, 97.5])), abs=0.004)
    assert ev.paired_difference(columns(a), columns(b)) == (mean, low, high)


def test_paired_difference_needs_the_same_questions():
    a = columns([True, False])
    with pytest.raises(ValueError, match="`id` differs"):
        ev.paired_difference(a, columns([True]))
    with pytest.raises(ValueError, match="`id` differs"):
        ev.paired_difference(a, {**a, "id": a["id"][::-1]})
    with pytest.raises(ValueError, match="`solution` differs"):
        ev.paired_difference({**a, "solution": ["1", "2"]}, {**a, "solution": ["1", "3"]})
    with pytest.raises(ValueError, match="no samples"):
        ev.paired_difference(columns([]), columns([]))


def test_lora_adapter_is_merged(world, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(world / "model")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path)
    load_processor(str(world / "model")).save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    loaded = backends.load_model(str(tmp_path))
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
        assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-4)
        assert not torch.allclose(backends.load_model(str(world / "model"))(input_ids=ids).logits, expected, atol=1e-2)
    assert isinstance(loaded.generation_config, GenerationConfig) and "lora" not in str(loaded).lower()


@pytest.mark.parametrize("given, used", [(None, "Think first."), ("", None), ("Be brief.", "Be brief.")])
def test_system_prompt_is_the_recipe_s_unless_given(world, tmp_path, monkeypatch, given, used):
    folder = tmp_path / "run"
    shutil.copytree(world / "model", folder / "checkpoint-2")
    (folder / "recipe.yaml").write_text("system_prompt: Think first.\n")
    seen = []

    def complete(model, processor, rows):
        seen.extend(rows)
        return [{"completion": "12", "tokens": 2, "truncated": False} for _ in rows]

    monkeypatch.setattr(backends, "complete", complete)
    summary = ev.evaluate(str(folder / "checkpoint-2"), str(world / "rl"), limit=3, system_prompt=given)
    first = seen[0]["prompt"][0]
    assert (first["content"][0]["text"] if first["role"] == "system" else None) == used
    assert summary["sampling"]["system_prompt"] == used and summary["questions"] == 3


def test_bad_input(world, tmp_path, capsys):
    model, data = str(world / "model"), str(world / "rl")
    with pytest.raises(RecipeError, match=r"can't read the model .*nowhere"):
        ev.evaluate(str(tmp_path / "nowhere"), data)
    with pytest.raises(RecipeError, match="nowhere"):
        ev.evaluate(model, str(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match="val"):
        ev.evaluate(model, data, split="val")
    for key, value, needs in (
        *(("temperature", wrong, "at least 0") for wrong in (-1, float("nan"), float("inf"))),
        *(("top_p", wrong, "over 0, up to 1") for wrong in (0, float("nan"))),
        *((key, 0, "at least 1") for key in ("n", "limit", "max_new_tokens", "batch_size", "max_pixels")),
        *(("min_pixels", -5, "at least 1"), ("retries", -1, "at least 0"), ("seed", -1, "0 to 2**32 - 1")),
        *(("max_dropped_share", 1.5, "0 to 1"), ("dtype", "float33", "auto, bfloat16 ...")),
    ):
        with pytest.raises(RecipeError, match=re.escape(f"`{key}`: {value}, needs {needs}")):
            ev.evaluate(model, data, **{key: value})
    with pytest.raises(RecipeError, match="`buckets`: 0, needs at least 1"):
        ev.evaluate(model, data, buckets=(8, 0))
    with pytest.raises(SystemExit, match="2"):
        ev.main([model, "--data", data, "--backend_args", "{a: "])
    assert "argument --backend_args: '{a: ' is not valid YAML" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for place in ("file", "file/eval"):
        with pytest.raises(RecipeError, match=f"{place} can't be a folder, .*/file is a file"):
            ev.evaluate(model, data, output_dir=str(tmp_path / place))
    with pytest.raises(RecipeError, match=r"can't (be written|write)"):
        ev.evaluate(model, data, output_dir="/proc/eval", **QUICK)
    shutil.copytree(model, tmp_path / "incomplete")
    weights = load_file(Path(model, "model.safetensors"))
    lost = next(name for name in weights if "norm" in name)
    del weights[lost]
    save_file(weights, tmp_path / "incomplete" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="1 weights are missing"):
        ev.evaluate(str(tmp_path / "incomplete"), data)


@pytest.mark.slow
def test_as_a_script(tmp_path):
    run = subprocess.run(
        [sys.executable, ev.__file__, str(tmp_path / "nowhere"), "--data", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "error: can't read the model" in run.stderr and "Traceback" not in run.stderr


SEVERAL = {**QUICK, "n": 3, "retries": 2, "seed": 3}


@pytest.fixture(scope="module")
def several(world):
    summary = ev.evaluate(str(world / "model"), str(world / "rl"), output_dir=str(world / "several"), **SEVERAL)
    return summary, pd.read_parquet(world / "several" / "samples.parquet")


def test_several_samples_and_retries(world, evaluated, several):
    """An untrained model never writes `</answer>`: each of its completions is drawn twice more."""
    summary, samples = several
    assert list(samples["sample"]) == [0, 1, 2] * 12 and list(samples["id"][::3]) == [f"row {i}" for i in range(12)]
    first = samples[samples["sample"] == 0]
    assert list(first["completion"]) == list(evaluated[1]["completion"])  # one sample more changes no other
    assert samples["completion"].nunique() > 30
    assert (samples["attempts"] == 3).all() and summary["retried"] == 1
    retries = pd.read_parquet(world / "several" / "retries.parquet")
    assert len(retries) == 72 and set(retries["attempt"]) == {1, 2}
    last = retries[retries["attempt"] == 2].set_index(["id", "sample"])["correct"]
    assert list(samples.set_index(["id", "sample"])["correct_with_retries"]) == list(last.reindex(
        pd.MultiIndex.from_frame(samples[["id", "sample"]])))  # fmt: skip
    assert (summary["questions"], summary["samples_per_question"]) == (12, 3)
    assert {"accuracy_majority", "accuracy_with_retries"} <= summary.keys()
    assert summary["sampling"]["n"] == 3 and summary["sampling"]["retries"] == 2


@pytest.mark.slow
def test_killed_it_goes_on_and_ends_with_the_same_samples(world, several, tmp_path):
    """Killed in the samples, in the retries, and with half a line written."""
    options = [part for key, value in SEVERAL.items() for part in (f"--{key}", *map(str, np.ravel(value)))]
    command = [sys.executable, "-m", "vision_r1_recipes.evaluate", str(world / "model"), "--data", str(world / "rl")]
    progress = tmp_path / "progress.jsonl"

    def lines():
        return progress.read_bytes().count(b"\n") if progress.is_file() else 0

    for target in (4, 15):
        process = subprocess.Popen([*command, "--output_dir", str(tmp_path), *options], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while lines() < target:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not (tmp_path / "summary.json").is_file()
        with progress.open("ab") as file:
            file.write(b'{"made": [[[0, 0, ')
    before = lines()
    summary = ev.evaluate(str(world / "model"), str(world / "rl"), output_dir=str(tmp_path), **SEVERAL)
    assert 15 <= before < 27 and not progress.exists()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "samples.parquet"), several[1])
    assert summary | {"environment": None} == several[0] | {"environment": None}


def listens():
    """To SIGINT, which a shell's background jobs, perhaps these tests, ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_ctrl_c_says_that_the_same_command_goes_on(world, tmp_path):
    command = [sys.executable, "-m", "vision_r1_recipes.evaluate", str(world / "model"), "--data", str(world / "rl")]
    command += ["--output_dir", str(tmp_path), "--n", "99", "--batch_size", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listens)
    deadline = time.monotonic() + 120
    while not (tmp_path / ev.PROGRESS).is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    while process.poll() is None:  # Python drops one that comes in a `__del__`
        assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        time.sleep(1)
    said = process.stderr.read()
    # Python ends itself by the signal, which a shell calls 130 too, when it came in an `exec`.
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in said, said
    assert said.strip().endswith("what was answered is kept. Run the same command again to go on.")


@pytest.mark.parametrize("made_of_it", ["raise ImportError('a C library failed to import')", "raise", "pass"])
def test_ctrl_c_is_one_whatever_a_library_makes_of_it(made_of_it):
    """NumPy's `import_array` and others raise their own exception when a KeyboardInterrupt comes to them."""
    script = f"""
import signal
from vision_r1_recipes.progress import stops_kindly
with stops_kindly():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        {made_of_it}
print("went on")
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=listens)
    if made_of_it == "pass":
        assert (process.returncode, process.stdout) == (0, "went on\n")
    else:
        assert process.returncode == 130 and process.stderr.startswith("stopped; what was answered is kept.")


def test_another_evaluation_in_its_folder_is_left_alone(world, evaluated, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "eval"
    shutil.copytree(world / "eval", folder)
    with pytest.raises(RecipeError, match=r"holds another evaluation: `seed` was 3, is 4. Delete it"):
        ev.evaluate(str(world / "model"), str(world / "rl"), output_dir=str(folder), seed=4, **QUICK)
    monkeypatch.setattr(backends, "load_model", None)
    again = {**QUICK, "buckets": (6,)}  # of the samples that are there
    summary = ev.evaluate(str(world / "model"), str(world / "rl"), output_dir=str(folder), seed=3, **again)
    assert [b["up_to"] for b in summary["by_length"]] == [6, None] and "finished before" in capsys.readouterr().out
    assert summary["accuracy"] == evaluated[0]["accuracy"]
    with contextlib.ExitStack() as stack:
        settings = json.loads((folder / "summary.json").read_text())["settings"]
        (folder / "summary.json").unlink()
        stack.enter_context(progress(folder / ev.PROGRESS, settings))
        with pytest.raises(RecipeError, match="another process is evaluating into"):
            stack.enter_context(progress(folder / ev.PROGRESS, settings))


@pytest.mark.parametrize("line", [2, 1])
def test_damaged_progress_is_named_and_mended_as_told(world, evaluated, tmp_path, monkeypatch, line):
    """A line in the middle, and that of the settings: what is told to be deleted is, and the samples are the same."""
    folder, run = tmp_path / "of mine", (str(world / "model"), str(world / "rl"))
    settings = {**QUICK, "output_dir": str(folder), "seed": 3}

    class Stopped(Exception):
        pass

    def stopped(*_):
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(ev, "_tables", stopped)
        ev.evaluate(*run, **settings)
    path = folder / ev.PROGRESS
    whole = path.read_bytes().splitlines(keepends=True)
    assert len(whole) == 4
    for damaged in (b"\0\xff\0\r\n", b"{}\n" if line > 1 else b"null\n"):
        path.write_bytes(b"".join([*whole[: line - 1], damaged, *whole[line:]]))
        with monkeypatch.context() as patch:
            patch.setattr(backends, "load_model", None)  # told before
            with pytest.raises(RecipeError, match=f"progress.jsonl is damaged in line {line}. Delete") as told:
                ev.evaluate(*run, **settings, check=True)
    if line > 1:
        subprocess.run(str(told.value).split("`")[1], shell=True, check=True)
        assert path.read_bytes() == whole[0]
    else:
        path.unlink()
    ev.evaluate(*run, **settings)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / ev.SAMPLES), evaluated[1])


def test_damage_that_is_still_json_is_named(world, evaluated, tmp_path):
    settings = evaluated[0]["settings"]
    for line in ({"made": 5, "state": []}, {"made": [], "state": None}, {"made": [], "state": "abc"}):
        (tmp_path / ev.PROGRESS).write_text(f"{json.dumps(settings)}\n{json.dumps(line)}\n")
        with pytest.raises(RecipeError, match=r"progress.jsonl is damaged: .*Delete it"):
            ev.evaluate(str(world / "model"), str(world / "rl"), output_dir=str(tmp_path), seed=3, **QUICK)
    shutil.copytree(world / "eval", tmp_path / "eval")
    for key in ("settings", "data", "sampling"):
        (tmp_path / "eval" / ev.SUMMARY).write_text(json.dumps({**evaluated[0], key: "abc"}))
        with pytest.raises(RecipeError, match=f"summary.json is damaged: `{key}` is 'abc'"):
            ev.compare(str(world / "eval"), str(tmp_path / "eval"))


@pytest.mark.parametrize(
    "name, content",
    [(ev.SUMMARY, b"{}"), (ev.SUMMARY, b'{"na'), (ev.SAMPLES, b"PAR1"), (ev.SAMPLES, None), (ev.SAMPLES, "part")],
)
def test_a_damaged_evaluation_is_named(world, evaluated, tmp_path, name, content):
    folder = tmp_path / "eval"
    shutil.copytree(world / "eval", folder)
    samples = pd.read_parquet(folder / ev.SAMPLES)
    (folder / name).unlink()
    if content == "part":
        samples[:-1].to_parquet(folder / name)
    elif content is not None:
        (folder / name).write_bytes(content)
    for call in (
        lambda: ev.compare(str(world / "eval"), str(folder)),
        lambda: ev.evaluate(str(world / "model"), str(world / "rl"), output_dir=str(folder), seed=3, **QUICK),
    ):
        with pytest.raises(RecipeError, match=rf"{name} is damaged: .*Delete {folder}, and evaluate again"):
            call()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_adapter_is_named(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(RecipeError, match="is damaged"):
        ev.weights_of(str(tmp_path))


def test_the_commit_of_a_hub_id_is_a_setting(world, tmp_path, monkeypatch):
    """From the Hub's cache, as a machine without network has it."""
    monkeypatch.chdir(tmp_path)
    cache = Path(HF_HUB_CACHE, "models--me--toy")
    folder = tmp_path / "runs/eval/toy/rl"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(world / "model", cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs/main").write_text(commit)
        call = ("me/toy", str(world / "rl"))
        if commit == "b" * 40:
            with pytest.raises(RecipeError, match=f"`commit` was {'a' * 40}, is {commit}"):
                ev.evaluate(*call, limit=2, max_new_tokens=2)
            continue
        ev.evaluate(*call, limit=2, max_new_tokens=2)
        assert json.loads((folder / "summary.json").read_text())["settings"]["commit"] == commit


def test_several_models_and_sets_in_one_call(world, tmp_path, monkeypatch):
    """All are checked before the first is asked, and a model is loaded once for all sets."""
    for name in ("a", "b"):
        shutil.copytree(world / "model", tmp_path / name)
    shutil.copytree(world / "rl", tmp_path / "other")
    shutil.copytree(world / "rl", tmp_path / "elsewhere/rl")
    loads = []
    load = backends.load_model
    monkeypatch.setattr(backends, "load_model", lambda *args: loads.append(args) or load(*args))
    sets = [str(world / "rl"), str(tmp_path / "other")]
    options = ["--limit", "2", "--max_new_tokens", "4"]
    models = [str(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(RecipeError, match="nowhere"):
        ev.main([*models, "--data", *sets, str(tmp_path / "nowhere"), *options])
    with pytest.raises(RecipeError, match=r"would both be written to .*apart, each with its own `--output_dir`"):
        ev.main([models[0], "--data", sets[0], str(tmp_path / "elsewhere/rl"), *options])
    with pytest.raises(RecipeError, match="one model and one set"):
        ev.main([*models, "--data", *sets, "--name", "x"])
    assert not loads
    ev.main([*models, "--data", *sets, *options])
    assert [Path(model).name for model, _ in loads] == ["a", "b"]
    # A folder's name does not tell the sampling: the advice is one that can be followed.
    with pytest.raises(RecipeError, match=r"a/eval/rl holds .* Delete it, or give this one, by itself, another"):
        ev.main([*models, "--data", *sets, *options, "--temperature", "0"])
    ev.main([models[0], "--data", sets[0], *options, "--temperature", "0", "--output_dir", str(tmp_path / "greedy")])
    completions = [
        pd.read_parquet(tmp_path / name / "eval" / data / "samples.parquet")["completion"].tolist()
        for name in ("a", "b")
        for data in ("rl", "other")
    ]
    assert completions == [completions[0]] * 4  # the seed is the evaluation's


def test_majority():
    assert ev.majority(["1", "2", "2"], [True, False, False]) is False
    assert ev.majority(["0.5", "2", "1/2"], [True, False, True]) is True  # one answer
    assert ev.majority(["3", "2", None], [True, False, False]) is True  # the first of equals
    assert ev.majority([None, pd.NA], [False, False]) is False
    assert ev.majority([r"\frac{1}{", "2", "x =", "2"], [False, True, False, True]) is True  # no golds, but answers


def test_pass_at_1_and_its_error_are_of_questions():
    samples = pd.DataFrame(
        {
            **{"id": ["a"] * 4 + ["b"] * 4, "sample": [0, 1, 2, 3] * 2, "completion": "x", "tokens": 1},
            **{"truncated": False, "format": True, "answer": ["1", "1", "2", "3", "4", "4", "4", "5"]},
            "correct": [True, True, False, False, True, True, True, False],
        }
    )
    summary = ev.summarize(samples)
    assert (summary["questions"], summary["accuracy"], summary["accuracy_majority"]) == (2, 0.625, 1.0)
    assert summary["accuracy_se"] == pytest.approx(0.125 / np.sqrt(2))
    other = samples.assign(correct=False)
    assert ev.paired_difference(samples, other)[0] == 0.625


@pytest.mark.slow
@pytest.mark.parametrize("n, questions", [(1, 300), (8, 100)])
def test_the_interval_covers_the_true_difference(n, questions):
    """1,000 simulated benchmarks: questions of their own difficulty, two models that are right more or less often."""
    rng = np.random.default_rng(0)

    def difficulties(size):
        p = rng.beta(1, 1, size)
        return p, np.clip(p - 0.05 + rng.normal(0, 0.1, size), 0, 1)

    p, q = difficulties(1_000_000)
    truth, covered = (p - q).mean(), 0
    for trial in range(1000):
        ids = {"id": np.repeat(np.arange(questions), n), "sample": np.tile(np.arange(n), questions)}
        a, b = ({**ids, "correct": rng.random(questions * n) < np.repeat(x, n)} for x in difficulties(questions))
        _, low, high = ev.paired_difference(a, b, n=1000, seed=trial)
        covered += low <= truth <= high
    assert 0.93 <= covered / 1000 <= 0.97


def test_compare(world, evaluated, several, tmp_path, capsys):
    ev.main(["compare", str(world / "eval"), str(world / "several")])
    out = capsys.readouterr().out
    assert "difference: " in out and "over 12 questions" in out
    assert "settings differ: n 1 against 3, retries 0 against 2" in out
    other = {**QUICK, "seed": 3, "dtype": "bfloat16", "min_pixels": 784, "max_pixels": 7056}
    ev.evaluate(str(world / "model"), str(world / "rl"), output_dir=str(tmp_path / "other"), **other)
    summary = json.loads((tmp_path / "other/summary.json").read_text())
    summary["sampling"]["min_p"] = 0.1  # that another backend has
    (tmp_path / "other/summary.json").write_text(json.dumps(summary))
    for pair in (("eval", "other"), ("other", "eval")):
        places = [str((tmp_path if name == "other" else world) / name) for name in pair]
        found = ev.compare(*places).partition("settings differ: ")[2]
        assert re.findall(r"(\w+) \S+ against", found) == ["dtype", "max_pixels", "min_p", "min_pixels"]
    shutil.copytree(world / "eval", tmp_path / "other pictures")
    summary = json.loads((world / "eval/summary.json").read_text())
    summary["settings"]["questions"] = "abc"
    (tmp_path / "other pictures/summary.json").write_text(json.dumps(summary))
    found = ev.compare(str(world / "eval"), str(tmp_path / "other pictures"))
    assert re.search(r"settings differ: prompts '\w+' against 'abc'$", found)
    with pytest.raises(RecipeError, match="nowhere is not the folder of a finished evaluation"):
        ev.compare(str(world / "eval"), str(tmp_path / "nowhere"))
    ev.evaluate(str(world / "model"), str(world / "rl"), output_dir=str(tmp_path), limit=5, **QUICK)
    with pytest.raises(RecipeError, match="not of the same questions"):
        ev.compare(str(world / "eval"), str(tmp_path))


@contextlib.contextmanager
def serving(command: str, model: str, log: Path):
    """The base URL of a server."""
    sampling = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 1}
    config = EndpointConfig(model, "http://127.0.0.1:{port}/v1", **sampling, serve=command, server_timeout=120)
    with served(config, log) as running:
        yield running.base_url


@pytest.mark.slow
def test_a_server_of_the_model_answers_like_transformers(world, tmp_path):
    """Greedy, through pictures, chat template and caps: `transformers serve` against this process."""
    model, data = str(world / "model"), str(world / "rl")
    greedy = {"temperature": 0.0, "max_new_tokens": 24}
    ev.evaluate(model, data, output_dir=str(tmp_path / "here"), **greedy)
    saved = json.loads((world / "model/generation_config.json").read_text())
    # It takes no fields but OpenAI's and a whole generation_config.
    config = {"repetition_penalty": 1.0, "eos_token_id": saved["eos_token_id"], "pad_token_id": saved["pad_token_id"]}
    command = f"{Path(sys.executable).with_name('transformers')} serve {{model}} --port {{port}}"
    with serving(command, model, tmp_path / "log") as base_url:
        args = {"base_url": base_url, "extra_body": {"generation_config": json.dumps(config)}}
        folder = str(tmp_path / "served")
        summary = ev.evaluate(model, data, output_dir=folder, backend="openai", backend_args=args, **greedy)
    assert summary["sampling"]["backend"] == "openai"
    ours, theirs = (pd.read_parquet(tmp_path / name / "samples.parquet") for name in ("here", "served"))
    # The server strips, and an untrained model writes tokens that only one of the two calls special.
    plain = ~(ours["completion"] + theirs["completion"]).str.contains("<|", regex=False)
    assert plain.sum() >= 8
    assert list(theirs["completion"][plain]) == list(ours["completion"][plain].str.strip())
    assert list(theirs["truncated"]) == list(ours["truncated"]) and list(theirs["correct"]) == list(ours["correct"])


@pytest.mark.slow
def test_a_server_that_refuses_and_fails(world, tmp_path, capsys, monkeypatch):
    """Faults pass, a refused question is wrong and told; the model is a name: a processor is named, and counts."""
    monkeypatch.setattr("vision_r1_recipes.bridge.endpoint._count", lambda tokens: 0)
    data = str(world / "rl")
    server = f"{sys.executable} -m vision_r1_recipes.toy_server --port {{port}} --refuse 0.3 --faults 0.2 --slow 0.1"
    with serving(server, "toy-mllm", tmp_path / "log") as base_url:
        call = {"backend": "openai", "batch_size": 3, "backend_args": {"base_url": base_url}, "max_new_tokens": 99}
        with pytest.raises(RecipeError, match="`--processor` names one"):
            ev.evaluate("toy-mllm", data, **call)
        with pytest.raises(RecipeError, match="`backend_args` needs `base_url`"):
            ev.evaluate("toy-mllm", data, **{**call, "backend_args": {}})
        with pytest.raises(RecipeError, match=r"unknown key .*`base_ur`"):
            ev.evaluate("toy-mllm", data, **{**call, "backend_args": {"base_ur": ""}})
        call |= {"processor": str(world / "model"), "output_dir": str(tmp_path / "out"), "n": 2, "retries": 1}
        summary = ev.evaluate("toy-mllm", data, **call)
    samples = pd.read_parquet(tmp_path / "out/samples.parquet")
    refused = samples["refused"].notna()
    assert 0 < summary["refused"] == refused.sum() < 24 and not samples["correct"][refused].any()
    assert (samples["attempts"][refused] == 1).all() and (samples["attempts"][~refused] == 2).all()
    assert f"the server refused {summary['refused']} requests" in capsys.readouterr().out
    assert samples["completion"][~refused].str.contains("row").all()
    tokenizer = load_processor(str(world / "model")).tokenizer
    assert list(samples["tokens"]) == [len(tokenizer.encode(text)) for text in samples["completion"]]
