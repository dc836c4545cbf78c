"""The schedule, the batch arithmetic with its suggestions, and the callback."""

import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import TrainerState

from vision_r1_recipes.ptst import PTSTCallback, Stage, batch_arithmetic, num_rollouts, parse_stages, stage_at


K = 1024
TWO = [Stage(4 * K, 16, 100), Stage(8 * K, 8, 100)]
ABLATION = [Stage(4 * K, 16, 100), Stage(6 * K, 12, 100), Stage(8 * K, 8, 100)]
THREE = [*TWO, Stage(16 * K, 4, 100)]
LONG = [Stage(16 * K, 4, 300)]
GROWING = [Stage(4 * K, 16, 1), Stage(8 * K, 16, 1)]


def test_stage_at():
    stages = [Stage(1, 2, 2), Stage(2, 2, 1), Stage(3, 2, 3)]
    assert [stage_at(stages, i) for i in range(8)] == [0, 0, 1, 2, 2, 2, 2, 2]
    assert num_rollouts(stages) == 6
    assert [stage_at(TWO, i) for i in (0, 99, 100, 199)] == [0, 0, 1, 1]


def test_parse_stages():
    rows = [{"num_generations": 4, "steps": 1, "max_completion_length": 8}, Stage(16, 2, 3)]
    assert parse_stages(rows) == [Stage(8, 4, 1), Stage(16, 2, 3)]


GOOD = {"max_completion_length": 8, "num_generations": 4, "steps": 1}


@pytest.mark.parametrize(
    "stages, parts",
    [
        (None, ["empty"]),
        ([], ["empty"]),
        ([None], ["stages[0]", "steps"]),
        ([7], ["stages[0] = 7"]),
        (["a"], ["stages[0] = 'a'"]),
        ([{}], ["stages[0]", "num_generations"]),
        ([GOOD, {"num_generations": 4, "steps": 1}], ["stages[1]", "max_completion_length"]),
        ([{**GOOD, "step": 1}], ["stages[0]", "'step': 1"]),
        *(
            ([{**GOOD, key: value}], [f"stages[0].{key} = {value!r}", "at least"])
            for key in GOOD
            for value in (0, -1, 1.5, 4.0, "4", None, True, [4])
        ),
        ([{**GOOD, "num_generations": 1}], ["stages[0].num_generations = 1", "at least 2"]),
        ([{**GOOD, "steps": 0}, {**GOOD, "steps": "x"}, 3], ["stages[0].steps", "stages[1].steps", "stages[2]"]),
    ],
)
def test_bad_stages(stages, parts):
    with pytest.raises(ValueError) as error:
        parse_stages(stages)
    assert all(part in str(error.value) for part in parts), error.value


# Batch arithmetic


@pytest.mark.parametrize(
    "stages, rollout, update, micro, world, expected",  # micro-steps a rollout, an update; updates; rows by stage
    [
        (TWO, 512, 128, 4, 1, (2048, 512, 4, (4, 2))),
        (TWO, 512, 128, 4, 8, (256, 64, 4, (4, 2))),
        (TWO, 512, 128, 4, 64, (32, 8, 4, (4, 2))),
        (TWO, 512, 128, 16, 64, (8, 2, 4, (16, 8))),
        (TWO, 512, 128, 2, 512, (8, 2, 4, (2, 1))),
        (ABLATION, 512, 128, 4, 8, (256, 64, 4, (4, 3, 2))),
        (THREE, 512, 128, 4, 64, (32, 8, 4, (4, 2, 1))),
        (LONG, 512, 128, 1, 64, (32, 8, 4, (1,))),
        (GROWING, 512, 128, 4, 8, (256, 64, 4, (4, 4))),
        (TWO, 6, 6, 96, 1, (1, 1, 1, (96, 48))),
    ],
)
def test_batch_arithmetic(stages, rollout, update, micro, world, expected):
    numbers, problems = batch_arithmetic(stages, rollout, update, micro, world)
    assert problems == []
    per_rollout, per_update, updates, rows = expected
    assert numbers.micro_steps_per_rollout == per_rollout
    assert numbers.micro_steps_per_update == per_update
    assert numbers.updates_per_rollout == updates
    assert numbers.rows_per_micro_batch == rows
    for stage, n in zip(stages, rows, strict=True):  # every completion is trained on once, at every stage
        assert per_rollout * n * world == rollout * stage.num_generations
        assert per_update * n * world == update * stage.num_generations


def test_iterations_repeat_updates_not_micro_steps():
    once, twice = (batch_arithmetic(TWO, 512, 128, 4, 8, n)[0] for n in (1, 2))
    assert twice.updates_per_rollout == 2 * once.updates_per_rollout == 8
    assert twice.micro_steps_per_rollout == once.micro_steps_per_rollout


@pytest.mark.parametrize(
    "stages, rollout, update, micro, world, sentences",
    [
        (TWO, 512, 128, 4, 60, ["512 over 60 processes is 8.533", "480, 540", "32, 64"]),
        (TWO, 512, 100, 4, 1, ["512 / prompts_per_update = 100 is 5.12", "64, 128"]),
        (
            TWO,
            512,
            128,
            1,
            8,
            ["stage 2: per_device_train_batch_size = 1 x num_generations 8 / 16", "0.5 rows", "2, 4"],
        ),
        (THREE, 512, 128, 2, 8, ["stage 3", "0.5 rows", "4"]),
        (
            LONG,
            512,
            128,
            3,
            64,
            ["128 x num_generations 4 / (64 processes x per_device_train_batch_size 3)", "2.667", "2, 4"],
        ),
        (TWO, 6, 6, 96, 4, ["6 over 4 processes is 1.5", "4, 8", "0.25 micro-steps", "Nearest per_device", "24"]),
        (THREE, 512, 100, 3, 60, ["over 60", "is 5.12", "stage 2", "stage 3", "micro-steps per update"]),
    ],
)
def test_impossible_batches(stages, rollout, update, micro, world, sentences):
    numbers, problems = batch_arithmetic(stages, rollout, update, micro, world)
    assert numbers is None
    assert all(sentence in "\n".join(problems) for sentence in sentences), problems


ARGUMENTS = {
    "prompts_per_rollout": "rollout",
    "prompts_per_update": "update",
    "per_device_train_batch_size": "micro",
    "world sizes": "world",
}
UNITS = re.compile(r"(stage \d+).*|.*is \S+ (prompts each|updates per rollout|micro-steps per update)")


def kind(problem):
    return next(filter(None, UNITS.match(problem).groups()))


def suggestions(problem):
    for name, values in re.findall(r"[Nn]earest ([\w ]+): (\d[\d, ]*)", problem):
        for value in values.split(", "):
            yield ARGUMENTS[name], int(value)


group = st.sampled_from([2, 4, 6, 8, 12, 16])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    groups=st.lists(group, min_size=1, max_size=3),
    rollout=st.integers(1, 600),
    update=st.integers(1, 300),
    micro=st.integers(1, 100),
    world=st.integers(1, 70),
)
def test_suggestions_work(groups, rollout, update, micro, world):
    stages = [Stage(8, n, 1) for n in groups]
    values = {"rollout": rollout, "update": update, "micro": micro, "world": world}
    numbers, problems = batch_arithmetic(stages, *values.values())
    assert (numbers is None) == bool(problems)
    assume(problems)
    assert len({kind(problem) for problem in problems}) == len(problems)
    for problem in problems:
        offered = list(suggestions(problem))
        assert offered or "two numbers" in problem, problem
        for key, value in offered:
            assert value > 0 and value != values[key]
            remaining = batch_arithmetic(stages, *{**values, key: value}.values())[1]
            assert kind(problem) not in map(kind, remaining), (problem, key, value)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(micro=st.integers(1, 64), update=st.sampled_from([8, 32, 128, 512]), world=st.sampled_from([1, 8, 64]))
def test_one_wrong_number_has_a_way_out(micro, update, world):
    """With one thing wrong, one of the numbers offered makes the whole run possible."""
    values = {"rollout": 512, "update": update, "micro": micro, "world": world}
    _, problems = batch_arithmetic(TWO, *values.values())
    assume(len(problems) == 1)
    offered = list(suggestions(problems[0]))
    assert any(not batch_arithmetic(TWO, *{**values, k: v}.values())[1] for k, v in offered), (problems, values)


# The callback


class Recorder:
    """The one method of the trainer that the callback uses."""

    def __init__(self):
        self.calls = []

    def set_stage(self, index, stage):
        self.calls.append((index, stage))


def drive(callback, steps):
    """Run `steps` of a training; returns `{optimizer step: stage}` where a stage was set."""
    seen = {}
    callback.on_train_begin(None, TrainerState(), None)
    for step in steps:
        before = len(callback.trainer.calls)
        callback.on_step_begin(None, TrainerState(global_step=step), None)
        for index, _ in callback.trainer.calls[before:]:
            seen[step] = index
    return seen


@pytest.mark.parametrize(
    "steps, updates, edges",  # edges: the optimizer steps at which the stage is set
    [
        (range(0, 6), 1, {0: 0, 2: 1, 3: 2}),
        (range(0, 24), 4, {0: 0, 8: 1, 12: 2}),
        (range(8, 24), 4, {8: 1, 12: 2}),
        (range(4, 24), 4, {4: 0, 8: 1, 12: 2}),
        (range(20, 24), 4, {20: 2}),
    ],
)
def test_callback_sets_the_stage_at_its_edges(steps, updates, edges):
    stages = [Stage(1, 2, 2), Stage(2, 4, 1), Stage(3, 8, 3)]
    recorder = Recorder()
    assert drive(PTSTCallback(recorder, stages, updates), steps) == edges
    assert [stage for _, stage in recorder.calls] == [stages[index] for index in edges.values()]


@pytest.mark.parametrize("step", [1, 3, 5, 7, 9, 21])
def test_callback_refuses_to_resume_inside_a_rollout(step):
    with pytest.raises(RuntimeError, match=rf"step {step} .*inside rollout {step // 4} .*between rollouts"):
        drive(PTSTCallback(Recorder(), TWO, 4), [step])


def test_second_train_starts_anew():
    recorder = Recorder()
    callback = PTSTCallback(recorder, [Stage(1, 2, 1), Stage(2, 2, 1)])
    drive(callback, [0, 1])
    drive(callback, [0, 1])
    assert [index for index, _ in recorder.calls] == [0, 1, 0, 1]
