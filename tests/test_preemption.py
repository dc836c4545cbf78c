"""Runs that are asked to stop, and come back."""

import os
import signal
import time

import pytest

from runs import SAVES, launch, trace
from vision_r1_recipes import checkpoints, grpo, recipe, sft
from vision_r1_recipes.preemption import PreemptionCallback
from vision_r1_recipes.recipe import RecipeError


MAIN = {"grpo": grpo.main, "sft": sft.main}
ALWAYS, NO_MORE = "", "0"  # contents of the file: no end named, and one that is past


@pytest.fixture
def before_step(monkeypatch):
    """Call something before an optimizer step."""
    inner = PreemptionCallback.on_step_begin

    def set_up(step, do):
        def asked(self, args, state, control, **kwargs):
            inner(self, args, state, control, **kwargs)
            if state.global_step + 1 == step:
                do(self)

        monkeypatch.setattr(PreemptionCallback, "on_step_begin", asked)

    return set_up


@pytest.fixture(scope="module")
def whole(recipes, tmp_path_factory):
    """The trace of each kind's run without an interruption."""
    traces = {}

    def of(kind):
        if kind not in traces:
            folder = tmp_path_factory.mktemp(kind)
            MAIN[kind]([str(recipes / f"{kind}.yaml"), *SAVES[kind], "--output_dir", str(folder)])
            traces[kind] = trace(folder)[:-1]
        return traces[kind]

    return of


# Two updates make a rollout of the GRPO recipe.
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, step, content, stops_at, goes_on_from",
    [
        ("grpo", 3, "stop", 4, 4),
        ("grpo", 3, ALWAYS, 4, 4),
        ("grpo", 3, "in an hour", 4, 4),
        ("grpo", 3, NO_MORE, 3, 2),
        ("grpo", 1, NO_MORE, 1, None),
        ("grpo", 4, NO_MORE, 4, 4),
        ("grpo", 3, "SIGTERM", 4, 4),
        ("sft", 3, NO_MORE, 3, 3),
        ("sft", 3, "SIGTERM", 3, 3),
    ],
)
def test_a_run_stops_when_asked_and_comes_back(
    recipes, tmp_path, before_step, whole, capsys, kind, step, content, stops_at, goes_on_from
):
    expected = whole(kind)
    seen = []

    def ask(callback):
        if seen:  # it came back
            return
        seen.append(callback)
        if content == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            file = tmp_path / ("stop" if content == "stop" else "stop_at")
            file.write_text({"stop": "", "in an hour": str(time.time() + 3600)}.get(content, content))

    before_step(step, ask)
    run = [str(recipes / f"{kind}.yaml"), *SAVES[kind], "--output_dir", str(tmp_path)]
    run += ["--resume_from_checkpoint", "auto"]
    handler = signal.getsignal(signal.SIGTERM)
    MAIN[kind](run)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert f"asked to stop: stopped at step {stops_at} of" in capsys.readouterr().out
    saved = [path.name for path in checkpoints.saved(tmp_path)]
    assert (saved[-1] if saved else None) == (goes_on_from and f"checkpoint-{goes_on_from}")
    assert [path.name for path in tmp_path.glob("stop*")] == ["stopped"] * (content == "stop")
    assert not list(tmp_path.glob("*.safetensors"))  # an unfinished model is not exported
    MAIN[kind](run)
    said = capsys.readouterr().out
    assert (f"checkpoint-{goes_on_from}" if goes_on_from else "no checkpoint yet") in said
    assert trace(tmp_path)[:-1] == expected
    assert (tmp_path / "model.safetensors").is_file()


def test_a_rollout_is_finished_only_if_there_is_time(tmp_path):
    callback = PreemptionCallback.__new__(PreemptionCallback)
    callback.folder, callback.terminated_at = tmp_path, None
    callback._update_seconds, callback._save_seconds = 100.0, 50.0
    verdicts = []
    for left in (360, 340):
        (tmp_path / "stop_at").write_text(str(time.time() + left))
        verdicts.append([callback._wish(updates) for updates in (0, 1, 2, 3)])
    save, go_on, leave = 1, 0, 2
    assert verdicts == [[save, go_on, go_on, go_on], [save, go_on, go_on, leave]]


@pytest.mark.slow
def test_asked_in_its_last_step_a_run_finishes(recipes, tmp_path, before_step, whole):
    before_step(6, lambda callback: [(tmp_path / name).write_text(NO_MORE) for name in ("stop", "stop_at")])
    MAIN["sft"]([str(recipes / "sft.yaml"), *SAVES["sft"], "--output_dir", str(tmp_path)])
    assert checkpoints.finished(tmp_path) and (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.glob("stop*"))


@pytest.mark.slow
def test_what_a_job_has_left_stops_no_run_outside_of_slurm(recipes, tmp_path):
    (tmp_path / "stop_at").touch()
    MAIN["sft"]([str(recipes / "sft.yaml"), *SAVES["sft"], "--output_dir", str(tmp_path)])
    assert checkpoints.finished(tmp_path)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(recipes, tmp_path):
    run = [recipes / "grpo.yaml", *SAVES["grpo"], "--resume_from_checkpoint", "auto", "--output_dir"]
    launch("ddp", "grpo", *run, tmp_path / "whole")
    said = launch("ddp", "grpo", *run, tmp_path / "asked", SIGTERM_BEFORE="3")
    assert "asked to stop: stopped at step 4 of 10" in said
    assert [path.name for path in checkpoints.saved(tmp_path / "asked")] == ["checkpoint-2", "checkpoint-4"]
    launch("ddp", "grpo", *run, tmp_path / "asked")
    assert trace(tmp_path / "asked")[:-1] == trace(tmp_path / "whole")[:-1]


def test_the_state_of_a_run(recipes, tmp_path, capsys):
    run = [str(recipes / "sft.yaml"), *SAVES["sft"], "--max_steps", "2", "--output_dir", str(tmp_path)]

    def state(*more):
        assert recipe.main(["state", *run, *more]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert state() == "nothing"
    sft.main(run)
    assert state() == "finished"
    assert state("--report_to", "none") == "finished"  # which changes nothing of the science
    assert state("--warmup_steps", "[0.05]") == "finished"  # one item, as some keys are saved
    assert state("--learning_rate", "1.0") == "another run, finished"
    (tmp_path / "trainer_state.json").unlink()
    assert state() == "checkpoint-2"
    (tmp_path / "checkpoint-2/trainer_state.json").unlink()
    assert state() == "checkpoint-1"


@pytest.mark.slow
def test_a_part_of_a_run_can_be_finished(recipes, tmp_path, capsys):
    run = [str(recipes / "grpo.yaml"), "--output_dir", str(tmp_path), "--stop_after_rollouts"]
    MAIN["grpo"]([*run, "2"])
    states = []
    for more in (["2"], ["3"]):
        recipe.main(["state", *run, *more])
        states.append(capsys.readouterr().out.splitlines()[-1])
    assert states == ["part finished", "checkpoint-4"]


def test_a_finished_run_that_was_extended_and_killed_is_not_finished(recipes, tmp_path, before_step, capsys):
    stage = {"max_completion_length": 8, "num_generations": 8, "steps": 1}
    run = [str(recipes / "grpo.yaml"), *SAVES["grpo"], "--output_dir", str(tmp_path), "--stages"]
    MAIN["grpo"]([*run, str([stage])])
    longer = [*run, str([stage] * 3), "--resume_from_checkpoint", "auto"]

    def interrupt(_):
        raise KeyboardInterrupt

    before_step(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        MAIN["grpo"](longer)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a swallowed one hangs multiprocessing's pools
    capsys.readouterr()
    recipe.main(["state", *longer])
    assert capsys.readouterr().out.splitlines()[-1] == "checkpoint-2"


def test_what_is_pushed_is_finished(recipes, tmp_path):
    run = [str(recipes / "sft.yaml"), "--push_to_hub", "--output_dir", str(tmp_path)]
    with pytest.raises(RecipeError, match="every_save would push unfinished models"):
        sft.main(run)
