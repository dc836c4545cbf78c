"""Both trainers on the tiny real model, through the entry points, on real files."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from driver import fixed_completions, length_is_even
from runs import ROOT, SAVES, STAGES, history, launch, trace
from vision_r1_recipes import backends, checkpoints, data, grpo, recipe, rewards, sft, trainers
from vision_r1_recipes.ptst import Stage
from vision_r1_recipes.recipe import RecipeError
from vision_r1_recipes.trainers import VisionGRPOTrainer, VisionSFTTrainer, _Rollouts, collapse_runs, vision_modules


def spy(monkeypatch, owner, name, note):
    """Call `note(result, *args)` after every call of `owner.name`."""
    inner = getattr(owner, name)

    def spied(*args, **kwargs):
        result = inner(*args, **kwargs)
        note(result, *args)
        return result

    monkeypatch.setattr(owner, name, spied)


@pytest.fixture
def rewarding(monkeypatch):
    """A reward that an untrained model can earn."""
    monkeypatch.setitem(grpo.REWARDS, "hfrrf", [length_is_even])


def test_every_rollout_has_its_stage(recipes, toy, tmp_path, monkeypatch):
    """The tensors: prompts x group rows, no completion over the cap; one decode and one processed picture a prompt."""
    rollouts, decodes, processed, kept = [], [], [], []

    def note(output, trainer, inputs):
        prompts = Counter(map(tuple, output["prompt_ids"].tolist()))
        rollouts.append((len(inputs), *output["completion_ids"].shape, sorted(prompts.values())))
        kept.append(sum(pixels.nbytes for pixels in trainer._pictures.pixels))
        assert not any("pixel" in name for name in output)
        assert all(pixels.device.type == "cpu" for pixels in trainer._pictures.pixels)

    spy(monkeypatch, VisionGRPOTrainer, "_generate_and_score_completions", note)
    spy(monkeypatch, data, "fetch_image", lambda *_: decodes.append(1))
    images = type(data.load_processor(str(toy / "model")).image_processor)
    spy(monkeypatch, images, "preprocess", lambda made, *_: processed.append(len(made["image_grid_thw"])))
    grpo.main([str(recipes / "grpo.yaml"), "--output_dir", str(tmp_path)])
    groups = [8, 8, 6, 4, 4]
    assert [rollout[1] for rollout in rollouts] == [4 * group for group in groups]
    for (prompts, _, length, counts), group, cap in zip(rollouts, groups, [8, 8, 12, 16, 16], strict=True):
        assert prompts == 4
        assert length == cap  # an untrained model hardly ever comes to an end
        assert sum(counts) == 4 * group
        assert all(count % group == 0 for count in counts)  # two rows may hold the same question and picture tokens
    assert len(decodes) == sum(processed) == 4 * len(groups)
    assert len(set(kept)) == 1  # the pictures' bytes don't grow with the group
    rows = history(tmp_path)[:-1]
    assert [row["rollout"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["stage"] for row in rows] == [1, 1, 2, 3, 3]
    assert [row["stage/num_generations"] for row in rows] == groups
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]  # two updates per rollout
    assert rows[-1]["epoch"] == pytest.approx(5 * 4 / 10)  # passes over the rows
    assert all(0 < row["time/host_share"] < 1 for row in rows[1:])
    assert all(row["time/rollout"] > row["time/generation"] > 0 < row["tokens_per_second"] for row in rows)
    assert recipe.load(tmp_path / "recipe.yaml")["stages"] == STAGES


@pytest.mark.slow
@pytest.mark.parametrize("iterations", ["1", "2"])
def test_pictures_once_per_prompt_change_nothing(recipes, tmp_path, monkeypatch, rewarding, iterations):
    """
    TRL's own handling, every row's pictures processed twice, kept on the device and looked at for each row, gives the
    same numbers up to rounding, with the same completions.
    """
    run = [str(recipes / "grpo.yaml"), "--num_iterations", iterations, "--output_dir"]
    grpo.main([*run, str(tmp_path / "ours")])
    monkeypatch.setattr(trainers, "shareable", lambda processor: False)
    grpo.main([*run, str(tmp_path / "trls")])
    for ours, theirs in zip(trace(tmp_path / "ours")[:-1], trace(tmp_path / "trls")[:-1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    rows = history(tmp_path / "ours")[:-1]
    assert [row["step"] for row in rows] == [2 * int(iterations) * i for i in range(1, 6)]
    assert rows[-1]["kl"] > 0


@pytest.mark.parametrize("rows, prompts, processes", [(10, 4, 1), (10, 4, 2), (3, 8, 2), (16, 4, 4)])
def test_no_prompt_is_lost(rows, prompts, processes):
    """Rollouts straddle passes: over any run every row is seen floor or ceil of the mean number of times."""
    rollouts, micro_steps = 7, 3
    shares = [
        _Rollouts(list(range(rows)), prompts, rollouts, micro_steps, 42, index, processes, Counter())
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
    single = _Rollouts(list(range(rows)), prompts, rollouts, micro_steps, 42, 0, 1, Counter())
    for rollout in range(rollouts):
        assert single[rollout * micro_steps] == [row for share in shares for row in share[rollout * micro_steps]]
    orders = [[single.row_at(data_pass * rows + i) for i in range(rows)] for data_pass in range(3)]
    assert all(sorted(order) == list(range(rows)) for order in orders)
    assert rows < 5 or len(set(map(tuple, orders))) == 3


# GRPO: stage edges after steps 4 and 6, a pass over the rows ends inside the rollout of steps 5 and 6. SFT: an epoch
# ends after step 4.
@pytest.mark.slow
@pytest.mark.parametrize("kind, steps", [("grpo", (2, 4, 6, 8)), ("sft", (2, 4, 5))])
@pytest.mark.parametrize(
    "peft",
    [
        pytest.param(["--dtype", "bfloat16", "--bf16", "false"], id="mixed", marks=pytest.mark.slow),
        pytest.param([], id="full"),
        pytest.param(["--use_peft", "--lora_r", "4"], id="lora", marks=pytest.mark.slow),
    ],
)
def test_resume_goes_on_bit_for_bit(recipes, tmp_path, kind, steps, peft, rewarding):
    """Weights, reference, optimizer, data and RNG come back: the trace equals the uninterrupted one."""
    run = [str(recipes / f"{kind}.yaml"), *SAVES[kind], *peft, "--save_total_limit", "null"]
    main = {"grpo": grpo, "sft": sft}[kind].main
    main([*run, "--output_dir", str(tmp_path / "whole")])
    for step in steps:
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        main([*run, "--output_dir", str(tmp_path / f"from_{step}"), "--resume_from_checkpoint", checkpoint])
        assert trace(tmp_path / f"from_{step}")[:-1] == trace(tmp_path / "whole")[:-1]
    rows = trace(tmp_path / "whole")[:-1]
    assert kind == "sft" or all(row["kl"] > 0 and row["reward"] > 0 for row in rows[1:])


@pytest.mark.slow
def test_chained_runs_are_one_run(recipes, tmp_path, rewarding):
    """One run per stage, each resumed from the last, the last stage appended; the model is saved at the end only."""
    run = [str(recipes / "grpo.yaml"), "--save_every_rollouts", "5", "--output_dir"]
    grpo.main([*run, str(tmp_path / "single")])
    chained = [*run, str(tmp_path / "chained"), "--resume_from_checkpoint", "auto"]
    grpo.main([*chained, "--stop_after_rollouts", "2", "--stages", json.dumps(STAGES[:2])])
    assert not (tmp_path / "chained/model.safetensors").exists()
    grpo.main([*chained, "--stop_after_rollouts", "3"])
    with pytest.raises(RecipeError, match=r"`stop_after_rollouts`: 3, but .*checkpoint-6 is at rollout 3 already"):
        grpo.main([*chained, "--stop_after_rollouts", "3"])
    grpo.main(chained)
    assert trace(tmp_path / "chained")[:-1] == trace(tmp_path / "single")[:-1]
    ours, theirs = weights(tmp_path / "chained"), weights(tmp_path / "single")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_another_run_is_not_resumed(recipes, toy, tmp_path, rewarding):
    run = [str(recipes / "grpo.yaml"), *SAVES["grpo"], "--output_dir", str(tmp_path)]
    grpo.main([*run, "--stop_after_rollouts", "1"])
    resumed = [*run, "--resume_from_checkpoint", "auto", "--stop_after_rollouts", "2"]
    with pytest.raises(RecipeError, match=r"`beta`: 0.01 in the checkpoint, 0.5 now"):
        grpo.main([*resumed, "--beta", "0.5"])
    shutil.copytree(toy / "rl", tmp_path / "rl")
    other = json.dumps([{"path": str(tmp_path / "rl"), "limit": 10}])
    with pytest.raises(RecipeError, match="`datasets`"):
        grpo.main([*resumed, "--datasets", other])
    grpo.main([*resumed, "--datasets", other, "--force_resume", "true"])
    # the same recipe over data that changed
    file = next((tmp_path / "rl").rglob("train*.parquet"))
    rows = pq.read_table(file)
    answers = ["7" if i == 3 else answer for i, answer in enumerate(rows["answer"].to_pylist())]
    pq.write_table(rows.set_column(rows.column_names.index("answer"), "answer", pa.array(answers)), file)
    with pytest.raises(RecipeError, match="`data`: "):
        grpo.main([*resumed[:-1], "3", "--datasets", other])


@pytest.mark.slow
def test_a_finished_run_is_moved_aside(recipes, tmp_path, capsys):
    run = [str(recipes / "sft.yaml"), "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    sft.main(run)
    first = (tmp_path / "run/model.safetensors").read_bytes()
    sft.main([*run, "--seed", "1"])
    (aside,) = tmp_path.glob("run.*")
    assert f"moved to {aside}" in capsys.readouterr().out
    assert (aside / "model.safetensors").read_bytes() == first
    assert recipe.load(tmp_path / "run/recipe.yaml")["seed"] == 1
    sft.main([*run, "--seed", "1", "--resume_from_checkpoint", "auto"])
    assert "finished: nothing to do" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"holds another run, finished.*\n`seed`: 1 in the checkpoint, 2 now"):
        sft.main([*run, "--seed", "2", "--resume_from_checkpoint", "auto"])


@pytest.mark.slow
def test_a_finished_run_with_completions_is_moved_aside(recipes, tmp_path):
    run = [str(recipes / "grpo.yaml"), "--log_completions", "true", "--num_completions_to_print", "0"]
    for _ in range(2):
        grpo.main([*run, "--output_dir", str(tmp_path / "run")])
    (aside,) = tmp_path.glob("run.*")
    assert len(list((aside / "completions").glob("*.parquet"))) == 5
    assert len(list((tmp_path / "run/completions").glob("*.parquet"))) == 5


def test_killed_while_the_model_is_saved(recipes, tmp_path, monkeypatch):
    """Not finished before the model is there: the next start saves it."""
    run = [str(recipes / "sft.yaml"), *SAVES["sft"], "--max_steps", "2", "--output_dir", str(tmp_path)]
    save = VisionSFTTrainer.save_model

    def die(self, folder=None, _internal_call=False):
        if not _internal_call:
            raise KeyboardInterrupt
        save(self, folder, _internal_call)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VisionSFTTrainer, "save_model", die)
        sft.main(run)
    assert not (tmp_path / "model.safetensors").exists()
    sft.main([*run, "--resume_from_checkpoint", "auto"])
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_best_model_is_the_best_checkpoints(recipes, toy, tmp_path):
    run = [str(recipes / "sft.yaml"), *SAVES["sft"], "--max_steps", "3", "--output_dir", str(tmp_path)]
    cold = json.dumps([{"path": str(toy / "cold"), "data_files": "vision_r1_llava_cot_full.json", "limit": 4}])
    run += ["--eval_datasets", cold, "--eval_strategy", "steps", "--eval_steps", "1", "--save_total_limit", "null"]
    run += ["--load_best_model_at_end", "true", "--metric_for_best_model", "loss", "--greater_is_better", "true"]
    sft.main(run)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["best_global_step"] < 3  # the highest loss: the first
    best, final = weights(tmp_path / f"checkpoint-{state['best_global_step']}"), weights(tmp_path)
    assert all(torch.equal(best[name], final[name]) for name in best)


@pytest.mark.slow
def test_an_evaluation_inside_a_rollout_leaves_its_pictures(recipes, toy, tmp_path, monkeypatch, rewarding):
    held_out = json.dumps([{"path": str(toy / "rl"), "split": "test", "limit": 3}])
    run = [str(recipes / "grpo.yaml"), "--eval_datasets", held_out, "--eval_every_rollouts", "5", "--output_dir"]
    grpo.main([*run, str(tmp_path / "at the end")])
    monkeypatch.setattr(
        trainers.PTSTCallback,
        "on_step_end",
        lambda self, args, state, control, **_: vars(control).update(should_evaluate=True),
    )
    grpo.main([*run, str(tmp_path / "at every step")])
    ours, theirs = (
        [row for row in trace(tmp_path / name)[:-1] if "eval_reward" not in row]
        for name in ("at the end", "at every step")
    )
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("kind, kills", [("grpo", 3), ("sft", 2)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(recipes, tmp_path, kind, kills):
    """SIGKILL inside a checkpoint, then at random instants; what was generated is compared as well."""
    rng = random.Random(kind)
    run = [sys.executable, ROOT / "tests/driver.py", kind, recipes / f"{kind}.yaml", *SAVES[kind]]
    run += ["--save_total_limit", "2", "--resume_from_checkpoint", "auto"]
    if kind == "grpo":
        stages = [{**stage, "steps": 4} for stage in STAGES]
        run += ["--log_completions", "true", "--num_completions_to_print", "0", "--stages", json.dumps(stages)]
    else:
        run += ["--max_steps", "12"]
    run = list(map(str, run))
    updates, steps = (2, 24) if kind == "grpo" else (1, 12)
    subprocess.run([*run, "--output_dir", str(tmp_path / "whole")], check=True, capture_output=True, timeout=300)
    run += ["--output_dir", str(tmp_path / "killed")]
    first = target = 2 * updates
    done = subprocess.run(
        run, capture_output=True, text=True, env={**os.environ, "KILL_BEFORE_MARK": str(first)}, timeout=300
    )
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / f"killed/checkpoint-{first}/model.safetensors").is_file()
    said = ""
    for _ in range(kills):
        target += updates * rng.randint(1, 2)
        process = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not (tmp_path / f"killed/checkpoint-{target}").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        said += process.communicate()[0]
        assert process.returncode == -signal.SIGKILL
    assert f"checkpoint-{first} is not complete, a run was killed there: skipped" in said
    done = subprocess.run(
        [*run, "--output_dir", str(tmp_path / "killed")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    whole = trace(tmp_path / "whole")
    assert trace(tmp_path / "killed")[:-1] == whole[:-1]
    assert whole[-2]["step"] == steps
    for table in sorted((tmp_path / "whole/completions").glob("*.parquet")) if kind == "grpo" else []:
        theirs = pd.read_parquet(tmp_path / "killed/completions" / table.name)
        assert pd.read_parquet(table).astype(str).equals(theirs.astype(str))
        assert len(theirs) == 4 * (
            8 if table.stem <= "completions_00008" else 6 if table.stem <= "completions_00016" else 4
        )
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == 2


@pytest.mark.slow
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
        "--max_steps",
        "4",
        "--model_name_or_path",
        str(tmp_path / "world/model"),
    ]
    sft.main([*run, "--output_dir", str(tmp_path / "run")])
    resumed = [*run, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint"]
    sft.main([*resumed, str(tmp_path / "run/checkpoint-2")])  # a tied model has no lm_head.weight: that is no fault
    marked = checkpoints.read(tmp_path / "run/checkpoint-2")
    file = tmp_path / "run/checkpoint-2/model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "q_proj" in name)]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="is not complete"):
        sft.main([*resumed, str(tmp_path / "run/checkpoint-2"), "--output_dir", str(tmp_path / "other")])
    checkpoints.mark(tmp_path / "run/checkpoint-2", marked)
    with pytest.raises(RuntimeError, match="missing_keys"):
        sft.main([*resumed, str(tmp_path / "run/checkpoint-2"), "--output_dir", str(tmp_path / "other")])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def rows_like_trls(toy, layout: str):
    """A dataset in a format of TRL's documentation, made from the toy's rows."""
    processor = data.load_processor(str(toy / "model"))
    rows, _ = data.load_rows([{"path": str(toy / "rl"), "limit": 4}], "rl", processor)
    made = []
    for i, row in enumerate(rows):
        text = row["prompt"][-1]["content"][-1]["text"]
        prompt = [{"role": "user", "content": text}]
        if layout == "text in a string":
            made.append({"prompt": f"Question: {text} Answer:", "solution": row["solution"]})
        elif layout == "text":
            made.append({"prompt": prompt, "solution": row["solution"]})
        elif layout == "image":
            made.append({"prompt": prompt, "image": row["images"][0], "solution": row["solution"]})
        elif layout == "images":
            made.append({"prompt": prompt, "images": row["images"], "solution": row["solution"]})
        else:  # one row in two has a picture, one of them two
            images = row["images"] * (0, 1, 0, 2)[i]
            made.append({"prompt": prompt, "images": images, "solution": row["solution"]})
    return processor, Dataset.from_list(made)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, staged",
    [
        *((layout, True) for layout in ("text in a string", "text", "image", "images", "mixed")),
        *((layout, False) for layout in ("text", "image", "images")),  # TRL 1.16 itself can't process mixed rows
    ],
)
def test_trls_own_dataset_formats(toy, tmp_path, layout, staged):
    """With a schedule and without; a user's reward gets every column, pictures included, and TRL's prompts."""
    from vision_r1_recipes import VisionGRPOConfig

    processor, rows = rows_like_trls(toy, layout)
    seen = []

    def reward(prompts, completions, solution, **columns):
        pictures = columns.get("images", columns.get("image", [None] * len(prompts)))
        seen.append((len(prompts), [type(picture).__name__ for picture in pictures]))
        return [float(i % 3) for i in range(len(completions))]

    schedule = {"stages": [{**STAGES[0], "num_generations": 4}, STAGES[2]], "prompts_per_rollout": 4}
    plain = {"num_generations": 4, "max_completion_length": 8, "max_steps": 2}
    args = VisionGRPOConfig(
        output_dir=str(tmp_path),
        **(schedule if staged else plain),
        per_device_train_batch_size=16,
        use_cpu=True,
        bf16=False,
        report_to="none",
        beta=0.01,
        learning_rate=1e-3,
        save_strategy="no" if not staged else "steps",
    )
    trainer = VisionGRPOTrainer(
        str(toy / "model"), reward_funcs=reward, args=args, train_dataset=rows, processing_class=processor
    )
    trainer.train()
    assert len(seen) == (4 if staged else 2)
    assert {count for count, _ in seen} == {16}
    kind = {"image": "PngImageFile", "images": "list", "mixed": "list"}.get(layout, "NoneType")
    assert all(set(kinds) <= {kind, "Image"} for _, kinds in seen), seen
    assert not staged or trainer.state.log_history[-2]["kl"] > 0


OPTIONS = [
    {"num_iterations": 2},
    {"loss_type": "bnpo", "scale_rewards": "batch"},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "cispo", "epsilon_high": 5.0},
    {"top_entropy_quantile": 0.5},
    {"gradient_checkpointing": True, "beta": 0.0},
    {"sync_ref_model": True, "ref_model_sync_steps": 1},
    {"entropy_coef": 0.001, "epsilon_high": 0.28, "delta": 1.5},
    {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    {"shuffle_dataset": False, "multi_objective_aggregation": "normalize_then_sum"},
    {"log_completions": True, "log_multimodal": True, "num_completions_to_print": 0},
]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_trls_options_under_a_schedule(recipes, tmp_path, options, rewarding):
    argv = [part for key, value in options.items() for part in (f"--{key}", json.dumps(value))]
    grpo.main([str(recipes / "grpo.yaml"), "--output_dir", str(tmp_path), *argv])
    rows = history(tmp_path)[:-1]
    assert [row["stage"] for row in rows] == [1, 1, 2, 3, 3]
    assert all(row["grad_norm"] > 0 for row in rows[1:])


def test_the_servers_own_settings_are_checked():
    good = {"model_config": {"max_model_len": 512, "logprobs_mode": "processed_logprobs"}}
    trainers.check_server(good, 512)
    trainers.check_server(good, None)
    with pytest.raises(RuntimeError, match="--max-model-len 512, `vllm_max_model_length` is 513"):
        trainers.check_server(good, 513)
    with pytest.raises(RuntimeError, match="--logprobs-mode raw_logits"):
        trainers.check_server({"model_config": {**good["model_config"], "logprobs_mode": "raw_logits"}}, 512)


def test_a_phase_that_takes_too_long_is_named(capsys):
    """Half of `ddp_timeout` before the other ranks give up, the rank that keeps them waiting says where it is."""
    rank = SimpleNamespace(
        args=SimpleNamespace(ddp_timeout=0.1),
        accelerator=SimpleNamespace(process_index=3),
        state=SimpleNamespace(global_step=12),
        model=SimpleNamespace(training=True),
        _seconds=Counter(),
    )
    with VisionGRPOTrainer._phase(rank, "rewards"):
        pass
    assert not capsys.readouterr().err
    with VisionGRPOTrainer._phase(rank, "generation"):
        time.sleep(0.3)
    assert "rank 3 has been in phase generation" in capsys.readouterr().err
    assert rank._seconds["generation"] > 0.2


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


@pytest.mark.slow
def test_evaluation_in_training(recipes, toy, tmp_path, monkeypatch, rewarding):
    """Its own group, length and sampling, every row once; the training doesn't notice."""
    seen, decodes = [], []

    def note(output, trainer, inputs):
        if not trainer.model.training:
            sampling = trainer.generation_config.temperature, trainer.generation_config.top_p
            seen.append((len(inputs), *output["completion_ids"].shape, trainer.max_completion_length, *sampling))

    held_out = json.dumps([{"path": str(toy / "rl"), "split": "test", "limit": 4}])
    run = [str(recipes / "grpo.yaml"), "--output_dir"]
    grpo.main([*run, str(tmp_path / "without")])
    spy(monkeypatch, VisionGRPOTrainer, "_generate_and_score_completions", note)
    spy(monkeypatch, data, "fetch_image", lambda *_: decodes.append(1))
    evaluated = ["--eval_every_rollouts", "2", "--num_generations_eval", "2", "--per_device_eval_batch_size", "4"]
    evaluated += ["--eval_datasets", held_out, "--eval_max_completion_length", "20"]
    grpo.main([*run, str(tmp_path / "with"), *evaluated])
    rows = [row for row in history(tmp_path / "with") if "eval_reward" in row]
    assert [row["rollout"] for row in rows] == [2, 4, 5]  # the Trainer evaluates at the end as well
    for row in rows:
        assert 16 < row["eval_completions/max_length"] <= 20
        assert row["eval_max_completion_length"] == 20
        assert (row["eval_temperature"], row["eval_top_p"]) == (0.6, 0.95)
    assert seen == [(4, 8, 20, 20, 0.6, 0.95)] * 3  # four prompts, two completions of each
    assert len(decodes) == 5 * 4 + 3 * 4
    trained = [row for row in trace(tmp_path / "with")[:-1] if "eval_reward" not in row]
    assert trained == trace(tmp_path / "without")[:-1]


@pytest.mark.slow
def test_the_start_probe(recipes, tmp_path, capsys, rewarding):
    """It says what the checkpoint can do, leaves no trace, and stops a run that can never earn a reward."""
    run = [str(recipes / "grpo.yaml"), "--output_dir"]
    grpo.main([*run, str(tmp_path / "without")])
    assert "start probe" not in capsys.readouterr().out
    grpo.main([*run, str(tmp_path / "with"), "--probe_prompts", "3"])
    said = capsys.readouterr().out
    assert "start probe, 8 completions of up to 8 tokens per prompt: reward 0." in said and "truncated" in said
    assert trace(tmp_path / "with")[:-1] == trace(tmp_path / "without")[:-1]
    grpo.REWARDS["hfrrf"] = [rewards.hfrrf]
    stages = [{"max_completion_length": 64, "num_generations": 4, "steps": 1}]
    with pytest.raises(RecipeError, match=r"the first stage|has the format <think>"):
        grpo.main([*run, str(tmp_path / "real"), "--probe_prompts", "3", "--stages", json.dumps(stages)])
    with pytest.raises(RecipeError, match=r"ran into the cap of 8 tokens.*`probe_prompts: 0`"):
        grpo.main([*run, str(tmp_path / "short"), "--probe_prompts", "3"])
    assert not (tmp_path / "short/model.safetensors").exists()


def test_a_template_that_opens_the_thinking(recipes, toy, tmp_path, monkeypatch):
    """Rewards and evaluation hear of the `<think>` that the generation prompt holds, from the one place that knows."""
    shutil.copytree(toy / "model", tmp_path / "model")
    processor = data.load_processor(str(tmp_path / "model"))
    assert data.generation_prefix(processor) == ""
    processor.chat_template = processor.chat_template.replace(
        "<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%"
    )
    processor.save_pretrained(tmp_path / "model")
    processor = data.load_processor(str(tmp_path / "model"))
    assert data.generation_prefix(processor) == "<think>"
    heard = []

    def reward(completions, generation_prefix, **kwargs):
        heard.extend(generation_prefix)
        return [float(len(prefix) % 2) for prefix in generation_prefix]

    monkeypatch.setitem(grpo.REWARDS, "hfrrf", [reward])
    run = ["--model_name_or_path", str(tmp_path / "model"), "--stop_after_rollouts", "1"]
    grpo.main([str(recipes / "grpo.yaml"), "--output_dir", str(tmp_path / "run"), *run])
    assert heard == ["<think>"] * 32
    model = backends.load_model(str(tmp_path / "model"))
    backends.set_sampling(model, processor, 4, 0.0, 1.0)
    rows, _ = data.load_rows([{"path": str(toy / "rl"), "limit": 2}], "rl", processor)
    made = backends.complete(model, processor, list(rows))
    assert all(row["completion"].startswith("<think>") for row in made)


def test_collapse_runs():
    assert collapse_runs([1, 9, 9, 9, 2, 9, 3], 9) == [1, 9, 2, 9, 3]
    assert collapse_runs([9, 9], 9) == [9]
    assert collapse_runs([], 9) == []


@pytest.mark.slow
def test_a_short_line_per_log_row(recipes, tmp_path, capsys):
    grpo.main([str(recipes / "grpo.yaml"), "--output_dir", str(tmp_path / "grpo")])
    sft.main([str(recipes / "sft.yaml"), "--output_dir", str(tmp_path / "sft")])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 5 + 6
    assert lines[2].startswith("step 6: rollout 3, stage 2, cap 12, group 6, loss")
    assert lines[-1].startswith("step 6: loss")
    assert all(len(line) < 220 for line in lines)


@pytest.mark.slow
def test_wandb_offline(recipes, tmp_path):
    run = [sys.executable, ROOT / "src/vision_r1_recipes/grpo.py", recipes / "grpo.yaml", "--report_to", "wandb"]
    run += ["--output_dir", tmp_path / "run", "--log_completions", "true"]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    subprocess.run(list(map(str, run)), check=True, env=environment, cwd=tmp_path, timeout=300)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert list((tmp_path / "run/completions").glob("*.parquet"))


BACKENDS = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED ZeRO-2", "zero3": "DEEPSPEED ZeRO-3"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, kind, lora",
    [
        ("ddp", "sft", False),
        ("zero3", "grpo", False),
        ("zero3", "sft", False),
        pytest.param("ddp", "grpo", False, marks=pytest.mark.full),
        pytest.param("ddp", "grpo", True, marks=pytest.mark.full),
        pytest.param("zero2", "grpo", False, marks=pytest.mark.full),
        pytest.param("zero2", "sft", False, marks=pytest.mark.full),
    ],
)
def test_two_processes(recipes, tmp_path, backend, kind, lora):
    """
    DDP, ZeRO-2 and ZeRO-3 on two CPU processes: the schedule in the tensors of each rank, sharding in the files of
    each, and a resume from the middle (GRPO: a stage edge) that goes on bit for bit.
    """
    run = [recipes / f"{kind}.yaml", *SAVES[kind], "--save_total_limit", "null"]
    run += ["--use_peft", "true", "--output_dir"] if lora else ["--output_dir"]
    probe = ["--probe_prompts", "4"] if kind == "grpo" else []
    said = launch(backend, kind, *run, tmp_path / "run", *probe, ROLLOUTS=str(tmp_path))
    assert ("start probe" in said) == (kind == "grpo")
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["distributed_type"] == BACKENDS[backend]
    assert environment["num_processes"] == 2
    rows = history(tmp_path / "run")[:-1]
    if kind == "grpo":
        assert [row["stage"] for row in rows] == [1, 1, 2, 3, 3]
        assert all(row["kl"] > 0 for row in rows[1:])
        ranks = [
            [json.loads(line) for line in (tmp_path / f"rank-{rank}.jsonl").read_text().splitlines()]
            for rank in range(2)
        ]
        for rank in ranks:
            assert [rollout["step"] for rollout in rank] == [0, 0, 2, 4, 6, 8]
            assert rank.pop(0)["ids"] == rank[0]["ids"]  # the probe tries the first rollout's prompts
            assert [rollout["prompts"] for rollout in rank] == [2] * 5
            assert [rollout["rows"] for rollout in rank] == [2 * group for group in (8, 8, 6, 4, 4)]
            assert [rollout["length"] for rollout in rank] == [8, 8, 12, 16, 16]
            for rollout, group in zip(rank, (8, 8, 6, 4, 4), strict=True):
                assert all(count % group == 0 for count in rollout["groups"])
        assert all(not set(one["ids"]) & set(other["ids"]) for one, other in zip(*ranks, strict=True))
    else:
        assert rows[-1]["loss"] < rows[0]["loss"]
    # Sharded parameters are saved by every rank (ZeRO-3), sharded optimizer states too (ZeRO-2).
    shards = {path.name for path in (tmp_path / "run").glob("checkpoint-*/global_step*/*zero_pp_rank_1*")}
    assert any("optim_states" in name for name in shards) == (backend != "ddp")
    assert any("model_states" in name for name in shards) == (backend == "zero3")
    if not lora:
        source = recipe.load(recipes / f"{kind}.yaml")["model_name_or_path"]
        assert load_file(tmp_path / "run/model.safetensors").keys() == load_file(f"{source}/model.safetensors").keys()
    said = launch(backend, kind, *run, tmp_path / "again", "--resume_from_checkpoint", tmp_path / "run/checkpoint-4")
    assert "going on from" in said
    assert trace(tmp_path / "again")[:-1] == trace(tmp_path / "run")[:-1]


@pytest.mark.slow
def test_one_process_or_two(recipes, tmp_path, rewarding, monkeypatch):
    """
    An update is the same on any number of processes and with other micro-batches (`dapo`). Sampling is not, so the
    completions here are a function of prompt and place in the group.
    """
    run = [recipes / "grpo.yaml", "--prompts_per_update", "4", "--output_dir"]
    launch("ddp", "grpo", *run, tmp_path / "two", FIXED_COMPLETIONS="1")
    monkeypatch.setattr(VisionGRPOTrainer, "_generate_single_turn", fixed_completions)
    grpo.main([*map(str, run), str(tmp_path / "one")])
    grpo.main([*map(str, run), str(tmp_path / "small"), "--per_device_train_batch_size", "8"])
    for other in ("two", "small"):
        for one, row in zip(trace(tmp_path / "one")[:-1], trace(tmp_path / other)[:-1], strict=True):
            for key in ("loss", "grad_norm", "reward"):  # TRL's logged `kl` is a mean over micro-batches
                assert one[key] == pytest.approx(row[key], rel=1e-3, abs=1e-6), key
        theirs = weights(tmp_path / other)
        assert all(torch.allclose(w, theirs[name], atol=1e-4) for name, w in weights(tmp_path / "one").items())
