"""
vLLM's colocate mode for real, on its CPU build and the tiny model: `make test-vllm`, in an environment of its own.
"""

import json
import os
from functools import partial
from pathlib import Path
from statistics import mean

import pytest


os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")
vllm = pytest.importorskip("vllm", reason="vLLM is not in this environment: make test-vllm")

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402
from vllm.model_executor.layers import utils as layers  # noqa: E402

from driver import length_is_even  # noqa: E402
from vision_r1_recipes import data, grpo, recipe, sft, toy, trainers  # noqa: E402
from vision_r1_recipes.configs import VisionGRPOConfig  # noqa: E402
from vision_r1_recipes.evaluate import evaluate  # noqa: E402
from vision_r1_recipes.export import export  # noqa: E402
from vision_r1_recipes.rewards import hfrrf  # noqa: E402
from vision_r1_recipes.trainers import VisionGRPOTrainer  # noqa: E402


ROOT = Path(__file__).parents[1]
STAGES = [
    {"max_completion_length": 24, "num_generations": 8, "steps": 2},
    {"max_completion_length": 48, "num_generations": 4, "steps": 2},
]
COLOCATE = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 512, "vllm_enable_sleep_mode": False}


@pytest.fixture(autouse=True)
def unpacked_weights(monkeypatch):
    """The CPU build repacks linear weights and then refuses new ones: keep them as they are."""

    def keep(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(layers, "dispatch_cpu_unquantized_gemm", keep)
    # TRL names no dtype and vLLM turns float32 into bfloat16: the same on both sides, to compare numbers.
    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm.LLM, dtype="float32"))


def test_the_schedule_reaches_vllm(toy, tmp_path, monkeypatch):
    """Caps, groups and weights are the trainer's at every rollout, and both sides see the same prompt."""
    requests, syncs = [], []
    generate = vllm.LLM.generate
    sync = trainers.GRPOTrainer._generate_single_turn

    def spy(self, prompts, *args, sampling_params, **kwargs):
        made = generate(self, prompts, *args, sampling_params=sampling_params, **kwargs)
        pad = self.get_tokenizer().convert_tokens_to_ids("<|image_pad|>")
        asked = [prompt["prompt_token_ids"].count(pad) for prompt in prompts]
        seen = [output.prompt_token_ids.count(pad) for output in made]
        lengths = [len(output.outputs[0].token_ids) for output in made]
        requests.append((len(prompts), sampling_params, set(asked), set(seen), max(lengths)))
        return made

    def note(self, *args, **kwargs):
        made = sync(self, *args, **kwargs)
        syncs.append((self._last_loaded_step, self.state.global_step))
        engine = self.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner.model
        theirs = dict(engine.named_parameters())
        ours = self.accelerator.unwrap_model(self.model).model.language_model.norm.weight
        (name,) = [name for name in theirs if name.endswith("model.norm.weight")]
        assert torch.equal(theirs[name], ours.detach().to(theirs[name].dtype))
        return made

    monkeypatch.setattr(vllm.LLM, "generate", spy)
    monkeypatch.setattr(trainers.GRPOTrainer, "_generate_single_turn", note)
    monkeypatch.setitem(grpo.REWARDS, "hfrrf", [length_is_even])
    values = {
        "base": str(ROOT / "recipes/toy/ptst.yaml"),
        "model_name_or_path": str(toy / "model"),
        "datasets": [{"path": str(toy / "rl"), "limit": 10}],
        **{"eval_datasets": None, "eval_every_rollouts": None, "eval_max_completion_length": None},
        "output_dir": str(tmp_path / "run"),
        "stages": STAGES,
        "prompts_per_rollout": 4,
        "prompts_per_update": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "probe_prompts": 0,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "token_truncate",
        **COLOCATE,
    }
    (tmp_path / "vllm.yaml").write_text(recipe.dump(values))
    grpo.main([str(tmp_path / "vllm.yaml")])
    assert [rows for rows, *_ in requests] == [32, 32, 16, 16]
    assert [sampling.max_tokens for _, sampling, *_ in requests] == [24, 24, 48, 48]
    for _, sampling, asked, seen, longest in requests:
        assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (1.0, 1.0, 1.0)
        assert asked == {1} and seen == {9}  # 84 x 84 pixels are nine tokens
        assert longest <= sampling.max_tokens
        assert list(sampling.logit_bias.values()) == [-100.0]
    assert syncs == [(0, 0), (2, 2), (4, 4), (6, 6)]
    rows = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"][:-1]
    assert [row["stage"] for row in rows] == [1, 1, 2, 2]
    # Rollouts 3 and 4 see pictures again: with old features of theirs the difference is 0.1 and more.
    assert all(row["sampling/sampling_logp_difference/mean"] < 0.005 for row in rows)
    assert rows[-1]["kl"] > 0


@pytest.fixture(scope="module")
def cold_started(tmp_path_factory):
    """A model that can answer one family of questions."""
    folder = tmp_path_factory.mktemp("cold")
    patch = pytest.MonkeyPatch()
    patch.setattr(toy, "FAMILIES", (toy.rectangle,))
    toy.build(folder, seed=3, num_base=8, num_cold=1200, num_train=200, num_test=8)
    patch.undo()
    sources = [
        {"path": str(folder / "cold"), "data_files": f"vision_r1_{name}_full.json"}
        for name in ("llava_cot", "mulberry_sft")
    ]
    sft.main(
        [
            *(str(ROOT / "recipes/toy/cold_start.yaml"), "--model_name_or_path", str(folder / "model")),
            *("--datasets", json.dumps(sources), "--max_steps", "200", "--learning_rate", "3e-3"),
            *("--output_dir", str(folder / "cold_start")),
        ]
    )
    return folder


def figures(folder, output_dir, **backend) -> dict[str, float]:
    processor = data.load_processor(str(folder / "cold_start"))
    rows, _ = data.load_rows([{"path": str(folder / "rl")}], "rl", processor)
    args = VisionGRPOConfig(
        output_dir=str(output_dir),
        stages=[{"max_completion_length": 96, "num_generations": 8, "steps": 1}],
        prompts_per_rollout=32,
        per_device_train_batch_size=64,
        use_cpu=True,
        bf16=False,
        report_to="none",
        **backend,
    )
    trainer = VisionGRPOTrainer(
        str(folder / "cold_start"), reward_funcs=hfrrf, args=args, train_dataset=rows, processing_class=processor
    )
    return trainer.probe(32)[0]


def test_rewards_are_those_of_transformers(cold_started, tmp_path, monkeypatch):
    """256 completions of one checkpoint from both backends; without the guard vLLM's are worthless."""
    plain = figures(cold_started, tmp_path / "plain")
    guarded = figures(cold_started, tmp_path / "guarded", **COLOCATE)
    assert plain["reward"] > 0.2
    for key in ("reward", "format_rate", "accuracy_rate", "completions/clipped_ratio"):
        assert guarded[key] == pytest.approx(plain[key], abs=0.12), key
    assert guarded["completions/mean_length"] == pytest.approx(plain["completions/mean_length"], rel=0.15)
    monkeypatch.setattr(trainers, "guard_pictures", lambda *_: None)
    blind = figures(cold_started, tmp_path / "blind", **COLOCATE)
    print(
        {name: mean(f["reward"] for f in [x]) for name, x in {"plain": plain, "ours": guarded, "trl": blind}.items()}
    )
    assert blind["reward"] < guarded["reward"] / 2


def test_an_evaluation_is_that_of_transformers(cold_started, tmp_path):
    """Greedy, in float32 on both sides; then sampled, killed in the middle of it and gone on with."""
    model, rows = str(cold_started / "cold_start"), str(cold_started / "rl")
    greedy = {"temperature": 0.0, "max_new_tokens": 96, "dtype": "float32"}
    for backend in ("transformers", "vllm"):
        evaluate(model, rows, output_dir=str(tmp_path / backend), backend=backend, **greedy)
    ours, theirs = (pd.read_parquet(tmp_path / name / "samples.parquet") for name in ("transformers", "vllm"))
    assert (ours["completion"] == theirs["completion"]).sum() >= 7  # of 8
    assert list(ours["correct"]) == list(theirs["correct"]) and ours["format"].any()
    sampled = {"max_new_tokens": 96, "n": 3, "batch_size": 5, "backend": "vllm"}
    whole = evaluate(model, rows, output_dir=str(tmp_path / "whole"), **sampled)
    generate = vllm.LLM.generate
    calls = []

    def fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(vllm.LLM, "generate", fails)
        evaluate(model, rows, output_dir=str(tmp_path / "cut"), **sampled)
    assert len((tmp_path / "cut/progress.jsonl").read_text().splitlines()) == 3
    again = evaluate(model, rows, output_dir=str(tmp_path / "cut"), **sampled)
    assert again["accuracy"] == whole["accuracy"]
    whole, again = (pd.read_parquet(tmp_path / name / "samples.parquet") for name in ("whole", "cut"))
    pd.testing.assert_frame_equal(again, whole)


def test_an_export_is_a_plain_model(cold_started, tmp_path):
    """`LLM` with nothing of ours around it takes the export's sampling and answers as transformers does the run's."""
    run = cold_started / "cold_start"
    export(str(run), str(tmp_path / "export"))
    evaluate(
        *(str(run), str(cold_started / "rl")),
        **{"output_dir": str(tmp_path / "run"), "temperature": 0.0, "max_new_tokens": 96, "dtype": "float32"},
    )
    expected = list(pd.read_parquet(tmp_path / "run/samples.parquet")["completion"])
    llm = vllm.LLM(str(tmp_path / "export"), dtype="float32", max_model_len=512)
    carried = llm.get_default_sampling_params()
    assert (carried.temperature, carried.top_p, carried.repetition_penalty) == (0.6, 0.95, 1.0)
    processor = data.load_processor(str(tmp_path / "export"))
    rows, _ = data.load_rows([{"path": str(cold_started / "rl"), "split": "test"}], "rl", processor)
    prompts = [
        {
            "prompt": processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True),
            "multi_modal_data": {"image": row["images"]},
        }
        for row in rows
    ]
    made = llm.generate(prompts, vllm.SamplingParams(temperature=0.0, max_tokens=96, repetition_penalty=1.0))
    assert sum(output.outputs[0].text == text for output, text in zip(made, expected, strict=True)) >= 7  # of 8


def test_another_prompt_is_refused():
    class Generation:
        mode, generation_kwargs, sync_weights = "colocate", {}, None

        def generate(self, prompts, images, num_generations, profiler=None):
            return [[1, 9, 9, 9, 2] for _ in prompts], [], [], []

    generation = Generation()
    trainers.guard_pictures(generation, 9)
    assert generation.generate([[1, 9, 9, 9, 2]], ["picture"], 1)[0] == [[1, 9, 9, 9, 2]]
    with pytest.raises(RuntimeError, match="5 tokens, 3 of pictures, against 4 and 2"):
        generation.generate([[1, 9, 9, 2]], ["picture"], 1)
