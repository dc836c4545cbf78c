"""Which checkpoint a run goes on from, and when it refuses to."""

import json

import pytest

from vision_r1_recipes import checkpoints, preflight
from vision_r1_recipes.configs import VisionSFTConfig
from vision_r1_recipes.recipe import RecipeError


RECIPE = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "output_dir": "a", "log_every_rollouts": 1}
STAGES = [{"max_completion_length": 8, "num_generations": 4, "steps": 2}]


def save(folder, step, complete=True, **identity):
    path = folder / f"checkpoint-{step}"
    (path / "global_step").mkdir(parents=True)
    for name in ("model.safetensors", "global_step/optimizer.pt"):
        (path / name).write_text(f"weights of {step}")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if complete:
        checkpoints.mark(path, {"identity": identity, "state": {}})
    return path


@pytest.mark.parametrize("wanted", [None, "false", "None", False, "auto", "AUTO"])
def test_nothing_to_go_on_from(tmp_path, wanted):
    assert checkpoints.wanted(wanted, tmp_path) == (None, [])
    assert checkpoints.wanted(wanted, tmp_path / "none") == (None, [])


def test_the_newest_complete_one(tmp_path):
    with pytest.raises(RecipeError, match=rf"true, but {tmp_path} holds no complete checkpoint.*auto"):
        checkpoints.wanted("true", tmp_path)
    with pytest.raises(RecipeError, match="`resume_from_checkpoint`: tru is not a folder"):
        checkpoints.wanted("tru", tmp_path)
    older, newest = save(tmp_path, 5), save(tmp_path, 20)
    (tmp_path / "checkpoint-best").mkdir()
    for wanted, found in [("true", newest), (True, newest), ("auto", newest), (str(older), older), ("false", None)]:
        assert checkpoints.wanted(wanted, tmp_path) == (found, [])


def lose_marker(path):
    (path / checkpoints.MARKER).unlink()


def lose_file(path):
    (path / "global_step/optimizer.pt").unlink()


def cut_file(path):
    (path / "model.safetensors").write_text("weig")


def cut_marker(path):
    (path / checkpoints.MARKER).write_text((path / checkpoints.MARKER).read_text()[:30])


@pytest.mark.parametrize("harm", [lose_marker, lose_file, cut_file, cut_marker])
def test_incomplete_ones_are_passed_over_and_named(tmp_path, harm):
    older, newest = save(tmp_path, 5), save(tmp_path, 20)
    harm(newest)
    assert checkpoints.wanted("auto", tmp_path) == (older, [newest])
    with pytest.raises(RecipeError, match="checkpoint-20 is not complete"):
        checkpoints.wanted(str(newest), tmp_path)
    lose_marker(older)
    assert checkpoints.wanted("auto", tmp_path) == (None, [newest, older])
    with pytest.raises(RecipeError, match=r"only incomplete ones: .*checkpoint-20, .*checkpoint-5"):
        checkpoints.wanted("true", tmp_path)


def identity(**changed):
    launch = {"num_processes": 2, "distributed_type": "MULTI_CPU", "data": "abc"}
    return checkpoints.identity({**RECIPE, "stages": STAGES, **changed}, **launch)


@pytest.mark.parametrize(
    "changed",
    [
        {"output_dir": "b", "log_every_rollouts": 5, "save_every_rollouts": 2, "report_to": "wandb"},
        {"stop_after_rollouts": 3, "num_proc": 4, "eval_every_rollouts": 2, "resume_from_checkpoint": "auto"},
        {"stages": [*STAGES, {"max_completion_length": 16, "num_generations": 2, "steps": 9}]},
        {"vllm_max_model_length": 99, "per_device_eval_batch_size": 2, "dataloader_num_workers": 3},
        {"num_iterations": 1, "gradient_checkpointing": True, "max_pixels": None},
    ],
)
def test_what_may_change(changed):
    assert checkpoints.changes(identity(), identity(**changed)) == []


@pytest.mark.parametrize(
    "changed, parts",
    [
        ({"learning_rate": 2e-4}, ["`learning_rate`: 0.0001 in the checkpoint, 0.0002 now"]),
        ({"beta": 0.5, "seed": 1}, ["`beta`: 0.0 in the checkpoint, 0.5 now", "`seed`"]),
        ({"stages": [{**STAGES[0], "steps": 3}]}, ["`stages`"]),
        ({"dataloader_drop_last": True}, ["`dataloader_drop_last`: false in the checkpoint, true now"]),
        (
            {"stages": [*STAGES, STAGES[0]], "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5},
            ["`lr_scheduler_type`", "`stages`", "`warmup_steps`"],
        ),
        ({"stages": [*STAGES, STAGES[0]], "lr_scheduler_type": "cosine"}, ["`lr_scheduler_type`", "`stages`"]),
    ],
)
def test_what_may_not_change(changed, parts):
    found = checkpoints.changes(identity(), identity(**changed))
    assert len(found) == len(parts) and all(part in line for part, line in zip(parts, found, strict=True))


@pytest.mark.parametrize("key, value", [("num_processes", 4), ("data", "xyz"), ("distributed_type", "DEEPSPEED")])
def test_world_and_data_may_not_change(key, value):
    (found,) = checkpoints.changes(identity(), {**identity(), key: value})
    assert f"`{key}`" in found
    unknown_yet = {name: value for name, value in identity().items() if name != key}
    assert checkpoints.changes(identity(), unknown_yet) == []


def config(folder, **kwargs):
    return VisionSFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", **kwargs)


def test_preflight(tmp_path):
    """A used folder is not overwritten, another run's checkpoint not taken, unless that is forced."""
    path = save(tmp_path, 3, **checkpoints.identity(RECIPE, num_processes=1))
    (found,) = preflight.run_problems(RECIPE, config(tmp_path))
    assert "`output_dir`" in found and "--resume_from_checkpoint auto" in found
    for wanted in ("auto", "true", str(path)):
        assert preflight.run_problems(RECIPE, config(tmp_path, resume_from_checkpoint=wanted)) == []
        other = {**RECIPE, "learning_rate": 1.0}
        problems = preflight.run_problems(other, config(tmp_path, resume_from_checkpoint=wanted))
        assert "force_resume" in problems[0] and "`learning_rate`: 0.0001" in problems[1]
        forced = config(tmp_path, resume_from_checkpoint=wanted, force_resume=True)
        assert preflight.run_problems(other, forced) == []
    other = save(tmp_path / "other", 3, **checkpoints.identity(RECIPE, num_processes=1))
    (found,) = preflight.run_problems(RECIPE, config(tmp_path, resume_from_checkpoint=str(other)))
    assert "holds a run already" in found
    (found,) = preflight.run_problems(RECIPE, config(tmp_path / "none", resume_from_checkpoint="true"))
    assert "no complete checkpoint" in found
