"""Both trainers on the tiny real model, through the entry points, on real files."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from vision_r1_recipes import data, grpo, recipe, sft
from vision_r1_recipes.ptst import Stage
from vision_r1_recipes.trainers import VisionGRPOTrainer, VisionSFTTrainer, _Rollouts, collapse_runs, vision_modules


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
# 4Kx16 / 6Kx12 / 8Kx8 in small: rows per micro-batch 4, 3, 2.
STAGES = [
    {"max_completion_length": 8, "num_generations": 8, "steps": 2},
    {"max_completion_length": 12, "num_generations": 6, "steps": 1},
    {"max_completion_length": 16, "num_generations": 4, "steps": 2},
]


@pytest.fixture(scope="module")
def recipes(toy, tmp_path_factory):
    """Children of the toy recipes that take a second: an untrained model, a handful of rows, short completions."""
    folder = tmp_path_factory.mktemp("recipes")
    tiny_grpo = {
        "base": str(RECIPES / "toy/ptst.yaml"),
        "model_name_or_path": str(toy / "model"),
        "datasets": [{"path": str(toy / "rl"), "limit": 10}],
        "stages": STAGES,
        "prompts_per_rollout": 4,
        "prompts_per_update": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
    }
    tiny_sft = {
        "base": str(RECIPES / "toy/cold_start.yaml"),
        "model_name_or_path": str(toy / "model"),
        "datasets": [
            {"path": str(toy / "cold"), "data_files": f"vision_r1_{name}_full.json", "limit": 16}
            for name in ("llava_cot", "mulberry_sft")
        ],
        "global_batch_size": 8,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "max_length": 2048,
    }
    for name, values in {"grpo": tiny_grpo, "sft": tiny_sft}.items():
        (folder / f"{name}.yaml").write_text(recipe.dump(values))
    return folder


def history(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def trace(run: Path) -> list[dict]:
    """The log without the clock, and without SFT's token counter, which TRL starts anew in every process."""
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
    timed += ("num_tokens",) if not any("rollout" in row for row in history(run)) else ()
    return [{key: value for key, value in row.items() if key not in timed} for row in history(run)]


def test_every_rollout_has_its_stage(recipes, tmp_path, monkeypatch):
    """The tensors: prompts x group rows, no completion over the cap, every prompt G times, one decode each."""
    rollouts, decodes = [], []
    inner, fetch = VisionGRPOTrainer._generate_and_score_completions, data.fetch_image

    def spy(self, inputs):
        output = inner(self, inputs)
        prompts = Counter(map(tuple, output["prompt_ids"].tolist()))
        rollouts.append(
            (len(inputs), *output["completion_ids"].shape, sorted(prompts.values()), len(output["pixel_values"]))
        )
        return output

    monkeypatch.setattr(VisionGRPOTrainer, "_generate_and_score_completions", spy)
    monkeypatch.setattr(data, "fetch_image", lambda *args, **kwargs: decodes.append(1) or fetch(*args, **kwargs))
    grpo.main([str(recipes / "grpo.yaml"), "--output_dir", str(tmp_path)])
    groups = [8, 8, 6, 4, 4]
    assert [rollout[1] for rollout in rollouts] == [4 * group for group in groups]
    for (prompts, _, length, counts, _), group, cap in zip(rollouts, groups, [8, 8, 12, 16, 16], strict=True):
        assert prompts == 4
        assert length <= cap
        assert sum(counts) == 4 * group
        assert all(count % group == 0 for count in counts)  # two rows may hold the same question and picture tokens
    assert len(decodes) == 4 * len(groups)
    rows = history(tmp_path)[:-1]
    assert [row["rollout"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["stage"] for row in rows] == [1, 1, 2, 3, 3]
    assert [row["stage/num_generations"] for row in rows] == groups
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]  # two updates per rollout
    assert rows[-1]["epoch"] == pytest.approx(5 * 4 / 10)  # passes over the rows
    assert recipe.load(tmp_path / "recipe.yaml")["stages"] == STAGES


@pytest.mark.parametrize("rows, prompts, processes", [(10, 4, 1), (10, 4, 2), (3, 8, 2), (16, 4, 4)])
def test_no_prompt_is_lost(rows, prompts, processes):
    """Rollouts straddle passes: over any run every row is seen floor or ceil of the mean number of times."""
    rollouts, micro_steps = 7, 3
    shares = [
        _Rollouts(list(range(rows)), prompts, rollouts, micro_steps, 42, index, processes)
        for index in range(processes)
    ]
    seen = Counter()
    for share in shares:
        assert len(share) == rollouts * micro_steps
        for micro_step in range(len(share)):
            assert len(share[micro_step]) == (0 if micro_step % micro_steps else prompts // processes)
            seen.update(share[micro_step])
    mean = rollouts * prompts / rows
    assert set(seen) == set(range(rows)) or mean < 1
    assert {int(mean), -int(-mean // 1)} >= set(seen.values())
    # one process or several, the rollouts are the same
    single = _Rollouts(list(range(rows)), prompts, rollouts, micro_steps, 42, 0, 1)
    for rollout in range(rollouts):
        assert single[rollout * micro_steps] == [row for share in shares for row in share[rollout * micro_steps]]
    orders = [[single.row_at(data_pass * rows + i) for i in range(rows)] for data_pass in range(3)]
    assert all(sorted(order) == list(range(rows)) for order in orders)
    assert rows < 5 or len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize("kind, steps", [("grpo", 10), ("sft", 4)])
def test_resume_goes_on_bit_for_bit(recipes, tmp_path, kind, steps):
    """Weights, optimizer, data and RNG come back: the trace from a checkpoint on equals the uninterrupted one."""
    every = ["--save_every_rollouts", "1"] if kind == "grpo" else ["--save_strategy", "steps", "--save_steps", "1"]
    run = [str(recipes / f"{kind}.yaml"), *every, "--save_total_limit", "null"]
    main = {"grpo": grpo, "sft": sft}[kind].main
    main([*run, "--output_dir", str(tmp_path / "whole")])
    for step in (2, steps // 2 // 2 * 2, steps - 2):
        main(
            [
                *run,
                *("--output_dir", str(tmp_path / f"from_{step}")),
                *("--resume_from_checkpoint", str(tmp_path / "whole" / f"checkpoint-{step}")),
            ]
        )
        assert trace(tmp_path / f"from_{step}")[:-1] == trace(tmp_path / "whole")[:-1]
    last = trace(tmp_path / "whole")[-2]
    assert kind == "sft" or last["kl"] > 0


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_another_model_is_refused(recipes, toy, tmp_path, tied):
    from vision_r1_recipes import toy as world

    world.build(tmp_path / "world", seed=1, num_base=4, num_cold=4, num_train=4, num_test=2, tie_word_embeddings=tied)
    run = [
        str(recipes / "sft.yaml"),
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--model_name_or_path",
        str(tmp_path / "world/model"),
    ]
    sft.main([*run, "--output_dir", str(tmp_path / "run")])
    resumed = [*run, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint"]
    sft.main([*resumed, str(tmp_path / "run/checkpoint-2")])  # a tied model has no lm_head.weight: that is no fault
    file = tmp_path / "run/checkpoint-2/model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "q_proj" in name)]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="missing_keys"):
        sft.main([*resumed, str(tmp_path / "run/checkpoint-2")])


def length_is_even(completions, **kwargs) -> list[float]:
    return [float(len(completion[0]["content"]) % 2 == 0) for completion in completions]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("frozen", [True, False])
def test_sft_learns_and_freezes(recipes, toy, tmp_path, frozen):
    sft.main(
        [
            *(str(recipes / "sft.yaml"), "--output_dir", str(tmp_path), "--freeze_vision", str(frozen)),
            *("--max_steps", "12", "--learning_rate", "3e-3", "--warmup_steps", "0"),
        ]
    )
    losses = [row["loss"] for row in history(tmp_path) if "loss" in row]
    assert losses[-1] < losses[0] - 0.5
    before, after = weights(toy / "model"), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    vision = {name for name in before if ".visual." in name}
    assert changed - vision
    assert bool(changed & vision) != frozen


def test_loss_is_on_the_completion_only(recipes, tmp_path, monkeypatch):
    batches = []
    inner = VisionSFTTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        batches.append((self.processing_class, inputs["input_ids"].clone(), inputs["labels"].clone()))
        return inner(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(VisionSFTTrainer, "compute_loss", spy)
    sft.main([str(recipes / "sft.yaml"), "--output_dir", str(tmp_path), "--max_steps", "1"])
    for processor, ids, labels in batches:
        for row, target in zip(ids, labels, strict=True):
            text = processor.decode(target[target != -100])
            assert text.startswith("<think>") and "</answer><|im_end|>" in text
            assert "<|im_start|>assistant" in processor.decode(row[target == -100])
            assert torch.equal(row[target != -100], target[target != -100])


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_lora_leaves_the_vision_tower_alone(recipes, tmp_path, kind, monkeypatch):
    monkeypatch.setitem(grpo.REWARDS, "hfrrf", [length_is_even])  # an untrained model never scores
    main = {"grpo": grpo, "sft": sft}[kind].main
    main([str(recipes / f"{kind}.yaml"), "--output_dir", str(tmp_path), "--use_peft", "--lora_r", "4"])
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert names and not any("visual" in name for name in names)
    assert any("q_proj" in name for name in names) and any("down_proj" in name for name in names)
    if kind == "grpo":
        assert history(tmp_path)[-2]["kl"] > 0


def test_real_models_have_a_vision_tower_that_we_find():
    for size, billions in (("3B", 3.75), ("7B", 8.29)):
        config = AutoConfig.from_pretrained(ROOT / f"data/models/Qwen2.5-VL-{size}-Instruct")
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
        assert sum(p.numel() for p in vision_modules(model).parameters()) / 1e9 == pytest.approx(0.67, abs=0.01)


def test_another_architecture_trains_and_resumes(toy, recipes, tmp_path):
    """Nothing hard-codes Qwen2.5-VL's names: a tiny Qwen3-VL goes through SFT, GRPO and a resume."""
    from transformers import AutoTokenizer

    from vision_r1_recipes import toy as world

    model, processor = world.build_qwen3_vl(AutoTokenizer.from_pretrained(toy / "model"), 0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    swap = ["--model_name_or_path", str(tmp_path / "model"), "--min_pixels", "16384", "--max_pixels", "16384"]
    sft.main([str(recipes / "sft.yaml"), *swap, "--output_dir", str(tmp_path / "sft"), "--freeze_vision", "true"])
    run = [str(recipes / "grpo.yaml"), *swap, "--save_every_rollouts", "2", "--max_prompt_length", "512"]
    grpo.main([*run, "--output_dir", str(tmp_path / "whole"), "--save_total_limit", "null"])
    grpo.main(
        [
            *(*run, "--output_dir", str(tmp_path / "again")),
            *("--resume_from_checkpoint", str(tmp_path / "whole/checkpoint-4")),
        ]
    )
    assert trace(tmp_path / "again")[:-1] == trace(tmp_path / "whole")[:-1]


def test_without_stages_it_is_trls_own_trainer(toy, tmp_path):
    from trl import GRPOTrainer

    from vision_r1_recipes import VisionGRPOConfig, hfrrf

    processor = data.load_processor(str(toy / "model"))
    rows, _ = data.load_rows([{"path": str(toy / "rl"), "limit": 4}], "rl", processor)
    logs = []
    for trainer_class in (GRPOTrainer, VisionGRPOTrainer):
        args = VisionGRPOConfig(
            output_dir=str(tmp_path / trainer_class.__name__),
            max_steps=2,
            num_generations=4,
            max_completion_length=8,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
        )
        trainer = trainer_class(
            str(toy / "model"), reward_funcs=hfrrf, args=args, train_dataset=rows, processing_class=processor
        )
        trainer.train()
        logs.append(
            [
                {k: v for k, v in row.items() if "time" not in k and "per_second" not in k}
                for row in trainer.state.log_history
            ]
        )
    assert logs[0] == logs[1]


def test_set_stage_reaches_the_generation_config(recipes, toy, tmp_path):
    from vision_r1_recipes import VisionGRPOConfig, hfrrf

    processor = data.load_processor(str(toy / "model"))
    rows, _ = data.load_rows([{"path": str(toy / "rl"), "limit": 4}], "rl", processor)
    args = VisionGRPOConfig(
        output_dir=str(tmp_path),
        stages=STAGES,
        prompts_per_rollout=2,
        per_device_train_batch_size=8,
        use_cpu=True,
        bf16=False,
        report_to="none",
        log_every_rollouts=1,
    )
    trainer = VisionGRPOTrainer(
        str(toy / "model"), reward_funcs=hfrrf, args=args, train_dataset=rows, processing_class=processor
    )
    trainer.set_stage(2, Stage(**STAGES[2]))
    assert trainer.generation_config.max_new_tokens == trainer.max_completion_length == 16
    assert trainer.num_generations == 4
    # the checkpoint's own 1.05 and 1e-6 must not leak into rollouts
    assert trainer.generation_config.repetition_penalty == 1.0
    assert trainer.generation_config.temperature == 1.0


def test_evaluation_in_training(recipes, toy, tmp_path):
    held_out = json.dumps([{"path": str(toy / "rl"), "split": "test", "limit": 4}])
    run = [str(recipes / "grpo.yaml"), "--output_dir", str(tmp_path), "--eval_datasets", held_out]
    grpo.main([*run, "--eval_every_rollouts", "2"])
    rows = [row for row in history(tmp_path) if "eval_reward" in row]
    assert [row["rollout"] for row in rows] == [2, 4, 5]  # the Trainer evaluates at the end as well
    assert all(row["eval_completions/mean_length"] > 0 for row in rows)


def test_collapse_runs():
    assert collapse_runs([1, 9, 9, 9, 2, 9, 3], 9) == [1, 9, 2, 9, 3]
    assert collapse_runs([9, 9], 9) == [9]
    assert collapse_runs([], 9) == []


def test_a_short_line_per_log_row(recipes, tmp_path, capsys):
    grpo.main([str(recipes / "grpo.yaml"), "--output_dir", str(tmp_path / "grpo")])
    sft.main([str(recipes / "sft.yaml"), "--output_dir", str(tmp_path / "sft")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 5 + 4
    assert lines[2].startswith("step 6: rollout 3, stage 2, cap 12, group 6, loss")
    assert lines[-1].startswith("step 4: loss")
    assert all(len(line) < 220 for line in lines)


def test_wandb_offline(recipes, tmp_path):
    run = [sys.executable, ROOT / "src/vision_r1_recipes/grpo.py", recipes / "grpo.yaml", "--report_to", "wandb"]
    run += ["--output_dir", tmp_path / "run", "--log_completions", "true"]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    subprocess.run(list(map(str, run)), check=True, env=environment, cwd=tmp_path, timeout=300)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert list((tmp_path / "run/completions").glob("*.parquet"))


BACKENDS = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_two_processes(recipes, tmp_path, backend, kind):
    """DDP, ZeRO-2 and ZeRO-3 on two CPU processes, through `accelerate launch` as the README has it."""
    run = ["-m", "accelerate.commands.launch", "--config_file", RECIPES / f"accelerate/{backend}.yaml"]
    run += ["--num_processes", "2", ROOT / f"src/vision_r1_recipes/{kind}.py", recipes / f"{kind}.yaml"]
    run += ["--save_every_rollouts", "5"] if kind == "grpo" else ["--save_strategy", "steps", "--save_steps", "4"]
    done = subprocess.run(
        [sys.executable, *map(str, run), "--output_dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["distributed_type"] == BACKENDS[backend]
    assert environment["num_processes"] == 2
    rows = history(tmp_path / "run")[:-1]
    if kind == "grpo":
        assert [row["stage"] for row in rows] == [1, 1, 2, 3, 3]
        assert all(row["completions/max_length"] <= row["stage/max_completion_length"] for row in rows)
        assert rows[-1]["kl"] > 0
    else:
        assert rows[-1]["loss"] < rows[0]["loss"]
    # Sharded parameters are saved by every rank (ZeRO-3), sharded optimizer states too (ZeRO-2).
    shards = {path.name for path in (tmp_path / "run").glob("checkpoint-*/global_step*/*zero_pp_rank_1*")}
    assert any("optim_states" in name for name in shards) == (backend != "ddp")
    assert any("model_states" in name for name in shards) == (backend == "zero3")
    weights(tmp_path / "run")
