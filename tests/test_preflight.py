"""What is refused before a weight is read, and how the refusal looks from the outside."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vision_r1_recipes import plan, preflight
from vision_r1_recipes.configs import GRPO_DERIVED, VisionGRPOConfig, VisionSFTConfig
from vision_r1_recipes.recipe import RecipeError


ROOT = Path(__file__).parents[1]
STAGES = [
    {"max_completion_length": 64, "num_generations": 4, "steps": 2},
    {"max_completion_length": 128, "num_generations": 2, "steps": 2},
]
COMMON = {"use_cpu": True, "bf16": False, "report_to": "none"}
GRPO = {
    **COMMON,
    "stages": STAGES,
    "prompts_per_rollout": 4,
    "per_device_train_batch_size": 4,
    "max_prompt_length": 100,
}
SFT = {**COMMON, "global_batch_size": 4, "per_device_train_batch_size": 2}


@pytest.fixture
def model(tmp_path):
    """Writes the configuration of a model and returns its folder."""

    def write(heads=4, positions=4096):
        text = {"model_type": "qwen2_5_vl_text", "num_attention_heads": heads, "max_position_embeddings": positions}
        text |= {"hidden_size": 8 * heads, "num_key_value_heads": heads, "num_hidden_layers": 1}
        folder = tmp_path / f"model-{heads}-{positions}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "text_config": text}))
        return str(folder)

    return write


@pytest.fixture
def problems(tmp_path, model):
    """All problems of a recipe with `changes` on one process; `None` takes a key out."""

    def find(base, **changes):
        values = {"output_dir": str(tmp_path / "out"), "model_name_or_path": model(), "datasets": [{"path": "x"}]}
        values = {k: v for k, v in {**values, **base, **changes}.items() if v is not None}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
        try:
            preflight.read([str(tmp_path / "r.yaml")], VisionGRPOConfig if base is GRPO else VisionSFTConfig)
        except RecipeError as error:
            return str(error).splitlines()
        return []

    return find


@pytest.mark.parametrize("base", [GRPO, SFT], ids=["grpo", "sft"])
def test_nothing_wrong(problems, base):
    assert problems(base) == []


@pytest.mark.parametrize("base", [GRPO, SFT], ids=["grpo", "sft"])
@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"save_only_model": True}, ["`save_only_model`: true", "resumed", "Remove it"]),
        ({"model_name_or_path": None}, ["`model_name_or_path` is missing"]),
        ({"datasets": None}, ["`datasets` is empty", "path:"]),
        ({"datasets": [{"paht": "x"}]}, ["datasets[0].`paht`", "`path`"]),
        ({"datasets": ["runs/toy/rl"]}, ["datasets[0]", "{path: runs/toy/rl}"]),
        ({"datasets": [{"path": "x"}, {"path": "x", "limit": -1}]}, ["datasets[1]", "`limit`: -1"]),
        ({"min_pixels": 900, "max_pixels": 800}, ["`min_pixels` 900", "`max_pixels` 800"]),
        ({"max_dropped_share": 5}, ["`max_dropped_share`: 5", "0 to 1"]),
        ({"remove_unused_columns": True}, ["`remove_unused_columns`"]),
        ({"gradient_accumulation_steps": 2}, ["`gradient_accumulation_steps`: 2", "derived", "Remove it"]),
        ({"gradient_accumulation_steps": 1}, ["`gradient_accumulation_steps`: 1", "derived", "Remove it"]),
    ],
)
def test_refused_everywhere(problems, base, changes, parts):
    found = problems(base, **changes)
    assert len(found) == 1 and all(part in found[0] for part in parts), found


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"stages": None}, ["`stages` is missing", "num_generations"]),
        ({"prompts_per_rollout": None}, ["`prompts_per_rollout`"]),
        ({"prompts_per_update": 3}, ["prompts_per_rollout = 4 / prompts_per_update = 3", "2, 4"]),
        ({"eval_datasets": [{"path": "x"}]}, ["`eval_datasets` and `eval_every_rollouts`"]),
        ({"eval_every_rollouts": 1}, ["`eval_datasets` and `eval_every_rollouts`"]),
        ({"use_vllm": True}, ["`vllm_max_model_length`: None", "228"]),
        ({"use_vllm": True, "vllm_max_model_length": 227}, ["`vllm_max_model_length`: 227", "228"]),
        ({"use_vllm": True, "vllm_max_model_length": 228, "eval_max_completion_length": 129}, ["228", "229"]),
        ({"use_vllm": True, "max_prompt_length": None}, ["`max_prompt_length` is needed"]),
        ({"max_prompt_length": 4000}, ["4128", "4096 positions"]),
        ({"loss_type": "dapoo"}, ["`loss_type`: 'dapoo'", "dapo"]),
        ({"use_transformers_continuous_batching": True}, ["`use_transformers_continuous_batching`", "no pictures"]),
        ({"auto_find_batch_size": True}, ["auto_find_batch_size is not supported by GRPO"]),
        ({"sync_ref_model": True, "save_every_rollouts": 1}, ["`sync_ref_model`", "no checkpoint"]),
        ({"temperature": 0.0}, ["`temperature`: 0 must be over 0"]),
        ({"top_p": 2.0}, ["`top_p`: 2 must be over 0 and at most 1"]),
        ({"beta": -1.0}, ["`beta`: -1 must not be negative"]),
        ({"learning_rate": -1.0}, ["`learning_rate`: -1 must be over 0"]),
        ({"report_to": "wandbb"}, ["`report_to`: 'wandbb'", "wandb"]),
        ({"attn_implementation": "flash_attention_2"}, ["flash-attn is not installed", "sdpa"]),
        ({"vllm_mode": "colocated"}, ["`vllm_mode`: 'colocated'", "colocate, server"]),
    ],
)
def test_refused_by_grpo(problems, changes, parts, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: True)  # vLLM is there
    found = problems(GRPO, **changes)
    assert len(found) == 1 and all(part in found[0] for part in parts), found


def test_vllm_is_not_here(problems, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    (found,) = problems(GRPO, use_vllm=True, vllm_max_model_length=512)
    assert "vLLM is not installed here" in found and "[vllm]" in found


@pytest.mark.parametrize("key", GRPO_DERIVED)
def test_derived_keys_are_refused_beside_stages(problems, key):
    defaults = VisionGRPOConfig.__dataclass_fields__
    other = {"save_strategy": "no", "eval_strategy": "epoch"}.get(key, 3)
    for value in (other, defaults[key].default):
        if value is not None and "Strategy" not in str(value):
            (found,) = problems(GRPO, **{key: value})
            assert f"`{key}`: {value!r}" in found and "derived" in found


def test_sft_alone(problems):
    assert problems(SFT, max_length=4096) == []
    for changes, part in [
        ({"max_length": 5000}, "`max_length` 5000 is over the model's 4096 positions"),
        ({"packing": True}, "`packing`"),
        ({"eval_datasets": [{"path": "x"}]}, "`eval_datasets` and `eval_strategy`"),
        ({"global_batch_size": 5}, "5 / (per_device_train_batch_size 2 x 1 processes) is 2.5"),
        ({"global_batch_size": 0}, "`global_batch_size`: 0"),
    ]:
        (found,) = problems(SFT, **changes)
        assert part in found


def test_nothing_hides_behind_the_arithmetic(problems, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: True)
    wrong = {"prompts_per_update": 3, "eval_every_rollouts": 5, "log_every_rollouts": 0, "eval_temperature": 0.0}
    wrong |= {"use_vllm": True, "vllm_max_model_length": 40, "vllm_tensor_parallel_size": 3, "max_steps": 7}
    found = problems(GRPO, **wrong)
    parts = ["prompts_per_rollout = 4 / prompts_per_update = 3", "`eval_datasets` and", "`log_every_rollouts`: 0"]
    parts += ["`eval_temperature`", "`vllm_max_model_length`: 40", "doesn't divide 4 heads", "`max_steps`: 7"]
    assert all(any(part in line for line in found) for part in parts), found


def test_everything_is_listed_at_once(problems):
    """Unknown keys, wrong types, arithmetic and the rest, in one go, each once."""
    parts = ["`learning_rat`", "`bf16`: 'maybe'", "over 4 processes", "stages[1].steps = 0", "`save_only_model`"]
    parts += ["`datasets` is empty", "`model_name_or_path` is missing", "`num_generations`: 8", "`loss_type`"]
    wrong = {"learning_rat": 1, "bf16": "maybe", "save_only_model": True, "loss_type": "x", "num_generations": 8}
    wrong |= {"datasets": None, "model_name_or_path": None}
    found = problems(GRPO, **wrong, prompts_per_rollout=5, prompts_per_update=2)
    assert [sum(part in line for line in found) for part in parts] == [1, 1, 0, 0, 1, 1, 1, 1, 1]
    assert len(found) == len(set(found))
    assert any("prompts_per_rollout = 5 / prompts_per_update = 2" in line for line in found)
    found = problems(GRPO, **wrong, stages=[STAGES[0], {**STAGES[1], "steps": 0}])
    assert [sum(part in line for line in found) for part in parts] == [1, 1, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("heads, parallel, ok", [(28, 4, True), (28, 8, False), (16, 8, True), (28, 3, False)])
def test_tensor_parallel_divides_the_heads(model, tmp_path, heads, parallel, ok):
    values = {**GRPO, "output_dir": "out", "datasets": [{"path": "x"}], "model_name_or_path": model(heads)}
    values |= {"use_vllm": True, "vllm_max_model_length": 512, "vllm_tensor_parallel_size": parallel}
    values |= {"prompts_per_rollout": 24, "per_device_train_batch_size": 2}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    _, found = plan.plan([str(tmp_path / "r.yaml")], 24)
    assert bool(found) is not ok
    if found:
        assert f"{parallel} doesn't divide {heads} heads, or suit {heads} KV heads; 1, 2, 4, 7 do" in found[0]


def test_tensor_parallel_suits_the_kv_heads():
    text = preflight.model_config("Qwen/Qwen2.5-VL-7B-Instruct").get_text_config()  # 28 heads, 4 of them KV
    assert [n for n in range(1, 29) if preflight._splits(text, n)] == [1, 2, 4, 28]


def test_known_models_stand_in_for_the_hub():
    config = preflight.model_config("Qwen/Qwen2.5-VL-7B-Instruct").get_text_config()
    assert (config.num_attention_heads, config.max_position_embeddings) == (28, 128000)
    assert preflight.model_config("Qwen/none-such") is None


def test_fsdp_on_a_cpu(problems, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    (found,) = problems(SFT)
    assert "FSDP" in found and "ddp.yaml" in found


# From the outside


def run(script, *argv):
    start = time.monotonic()
    script = ROOT / "src" / "vision_r1_recipes" / script
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *map(str, argv)], capture_output=True, text=True, env=env, check=False
    )
    assert time.monotonic() - start < 60
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def hollow(toy, tmp_path_factory):
    """A model's folder without its weights: whoever loads it fails otherwise than by our message."""
    folder = tmp_path_factory.mktemp("hollow") / "model"
    shutil.copytree(toy / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, recipe, overrides, parts",
    [
        ("grpo.py", "ptst.yaml", ("--num_generation", "8"), ["`num_generation`: 8", "`num_generations`"]),
        (
            "grpo.py",
            "ptst.yaml",
            ("--datasets", "{{path: {toy}/none}}"),
            ["datasets[0]", "{toy}/none", "no such path"],
        ),
        (
            "sft.py",
            "cold_start.yaml",
            ("--datasets", "{{path: {toy}/rl}}"),
            ["answer, images, problem", "conversations"],
        ),
    ],
)
def test_scripts_refuse_in_words(toy, hollow, tmp_path, script, recipe, overrides, parts):
    argv = [
        "--model_name_or_path",
        hollow,
        "--output_dir",
        tmp_path / "out",
        *(part.format(toy=toy) for part in overrides),
    ]
    done = run(script, ROOT / "recipes" / "toy" / recipe, *argv)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors and all(part.format(toy=toy) in "\n".join(errors) for part in parts), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank, said", [("0", "error: one\nerror: two\n"), ("1", "")])
def test_only_the_first_rank_speaks(monkeypatch, capsys, rank, said):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as stop, preflight.kind_errors():
        preflight.check(["one", "two"])
    assert stop.value.code == 2 and capsys.readouterr().err == said
