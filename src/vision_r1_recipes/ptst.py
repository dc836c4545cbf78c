"""Progressive Thinking Suppression Training (PTST): the length cap grows by stages while the group shrinks.

Paper section 3.3 `[paper]`: 4K x 16, then 8K x 8 (the released model), optionally 16K x 4. The stage is a pure
function of the rollout's index; the callback only applies it. A "step" of a stage is one *rollout* with all of its
updates, as in the framework the authors used `[easyr1]`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import TYPE_CHECKING

from transformers import TrainerCallback


if TYPE_CHECKING:
    from .trainers import VisionGRPOTrainer


@dataclass(frozen=True)
class Stage:
    """
    One stage of PTST.

    Args:
        max_completion_length (`int`):
            Cap on the completion, in tokens. A completion that is cut off has no `</answer>` and scores 0 under HFRRF:
            the cap is the only length pressure `[author]`.
        num_generations (`int`):
            Completions per prompt (group size), at least 2.
        steps (`int`):
            Rollouts in this stage.
    """

    max_completion_length: int
    num_generations: int
    steps: int


def parse_stages(stages: Iterable[Stage | Mapping]) -> list[Stage]:
    """
    Turn a recipe's `stages` into [`Stage`] objects.

    Raises:
        `ValueError`: with every fault found, when the list is empty, a key is missing or unknown, or a value is not a
            whole number in its range.
    """
    names = [field.name for field in fields(Stage)]
    if stages is not None and not isinstance(stages, Iterable):
        raise ValueError(f"stages = {stages!r}: needs a list of {{{', '.join(names)}}}.")
    parsed, problems = [], []
    for i, stage in enumerate(stages or []):
        values = asdict(stage) if isinstance(stage, Stage) else stage
        if not isinstance(values, Mapping) or set(values) != set(names):
            problems.append(f"stages[{i}] = {values!r}: needs exactly the keys {', '.join(names)}.")
            continue
        for name in names:
            least = 2 if name == "num_generations" else 1
            if not isinstance(values[name], int) or isinstance(values[name], bool) or values[name] < least:
                problems.append(f"stages[{i}].{name} = {values[name]!r}: needs a whole number of at least {least}.")
        parsed.append(Stage(**values))
    if not parsed and not problems:
        problems.append("stages is empty: give at least one {max_completion_length, num_generations, steps}.")
    if problems:
        raise ValueError("\n".join(problems))
    return parsed


def num_rollouts(stages: list[Stage]) -> int:
    """Rollouts in the whole schedule."""
    return sum(stage.steps for stage in stages)


def stage_at(stages: list[Stage], rollout: int) -> int:
    """
    Index into `stages` of the stage that rollout number `rollout` (0-based) belongs to; the last one past the end.
    """
    for i, stage in enumerate(stages):
        if rollout < stage.steps:
            return i
        rollout -= stage.steps
    return len(stages) - 1


@dataclass(frozen=True)
class BatchArithmetic:
    """How a rollout is cut into micro-batches. All numbers are the same at every stage, except the rows."""

    micro_steps_per_rollout: int  # TRL's `steps_per_generation`
    micro_steps_per_update: int  # the Trainer's `gradient_accumulation_steps`
    updates_per_rollout: int  # optimizer steps, `num_iterations` included
    rows_per_micro_batch: tuple[int, ...]  # completions per device, one number per stage


def batch_arithmetic(
    stages: list[Stage],
    prompts_per_rollout: int,
    prompts_per_update: int,
    per_device_train_batch_size: int,
    world_size: int,
    num_iterations: int = 1,
) -> tuple[BatchArithmetic | None, list[str]]:
    """
    Derive accumulation from a recipe's prompts and the launcher's processes.

    `per_device_train_batch_size` counts completions at the *first* stage; later stages take
    `per_device_train_batch_size * num_generations / num_generations of stage 1`, so that prompts per micro-batch stay
    constant and, where length x group size does, tokens too.

    Returns:
        The numbers, or `None`, and the list of all problems, each with the arithmetic and values that would work.
    """
    first = stages[0].num_generations
    micro = per_device_train_batch_size
    problems = []
    if prompts_per_rollout % world_size:
        low = prompts_per_rollout // world_size * world_size
        near = [n for n in (low, low + world_size) if n > 0]
        worlds = [w for w in _divisors(prompts_per_rollout) if abs(w - world_size) <= world_size]
        problems.append(
            f"prompts_per_rollout = {prompts_per_rollout} over {world_size} processes is "
            f"{prompts_per_rollout / world_size:.4g} prompts each, not a whole number. "
            f"Nearest prompts_per_rollout: {_nearest(near, prompts_per_rollout)}; "
            f"nearest world sizes: {_nearest(worlds, world_size)}."
        )
    if prompts_per_rollout % prompts_per_update:
        problems.append(
            f"prompts_per_rollout = {prompts_per_rollout} / prompts_per_update = {prompts_per_update} is "
            f"{prompts_per_rollout / prompts_per_update:.4g} updates per rollout, not a whole number. "
            f"Nearest prompts_per_update: {_nearest(_divisors(prompts_per_rollout), prompts_per_update)}."
        )
    rows = [Fraction(micro * stage.num_generations, first) for stage in stages]
    fits_stages = [m for m in range(1, 16 * first + 1) if all(m * s.num_generations % first == 0 for s in stages)]
    for i, (stage, row) in enumerate(zip(stages, rows, strict=True)):
        if row.denominator != 1:
            problems.append(
                f"stage {i + 1}: per_device_train_batch_size = {micro} x num_generations {stage.num_generations} / "
                f"{first} (stage 1) is {float(row):.4g} rows per micro-batch, not a whole number. "
                f"Nearest per_device_train_batch_size: {_nearest(fits_stages, micro)}."
            )
    micro_steps = Fraction(prompts_per_update * first, world_size * micro)
    if micro_steps.denominator != 1:
        fits = [m for m in fits_stages if prompts_per_update * first % (world_size * m) == 0]
        key, values, now = "per_device_train_batch_size", fits, micro
        if not fits:
            key, now = "prompts_per_update", prompts_per_update
            values = [n for n in _divisors(prompts_per_rollout) if n * first % (world_size * micro) == 0]
        if not values:
            key, now = "world sizes", world_size
            values = [w for w in _divisors(prompts_per_rollout) if prompts_per_update * first % (w * micro) == 0]
        problems.append(
            f"prompts_per_update = {prompts_per_update} x num_generations {first} / ({world_size} processes x "
            f"per_device_train_batch_size {micro}) is {float(micro_steps):.4g} micro-steps per update, not a whole "
            f"number. Nearest {key}: {_nearest(values, now)}."
        )
    if problems:
        return None, problems
    updates = prompts_per_rollout // prompts_per_update
    return (
        BatchArithmetic(
            micro_steps_per_rollout=int(micro_steps) * updates,
            micro_steps_per_update=int(micro_steps),
            updates_per_rollout=updates * num_iterations,
            rows_per_micro_batch=tuple(int(row) for row in rows),
        ),
        [],
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _nearest(values: list[int], to: int, count: int = 3) -> str:
    near = sorted(sorted(values, key=lambda value: abs(value - to))[:count])
    return ", ".join(map(str, near)) or "none alone, change two numbers"


class PTSTCallback(TrainerCallback):
    """
    Sets the stage of a [`VisionGRPOTrainer`] at the start of every rollout, also of the first one after a resume.

    Args:
        trainer ([`VisionGRPOTrainer`]):
            The trainer whose completion length and group size follow the schedule.
        stages (`list[Stage]`):
            The schedule.
        updates_per_rollout (`int`, *optional*, defaults to `1`):
            Optimizer steps per rollout. A stage can only begin with a rollout.
        stop_after_rollouts (`int`, *optional*):
            Save a checkpoint and end the training after this rollout of the schedule.
    """

    def __init__(
        self,
        trainer: VisionGRPOTrainer,
        stages: list[Stage],
        updates_per_rollout: int = 1,
        stop_after_rollouts: int | None = None,
    ):
        self.trainer = trainer
        self.stages = stages
        self.updates_per_rollout = updates_per_rollout
        self.stop_after_rollouts = stop_after_rollouts
        self._current = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._current = None

    def on_step_begin(self, args, state, control, **kwargs):
        rollout, update = divmod(state.global_step, self.updates_per_rollout)
        index = stage_at(self.stages, rollout)
        if index == self._current:
            return
        if update:
            raise RuntimeError(
                f"Optimizer step {state.global_step} lies inside rollout {rollout} (update {update} of "
                f"{self.updates_per_rollout}). A run can only be resumed between rollouts."
            )
        self._current = index
        self.trainer.set_stage(index, self.stages[index])

    def on_step_end(self, args, state, control, **kwargs):
        last = self.stop_after_rollouts
        if last is not None and state.global_step >= last * self.updates_per_rollout:
            control.should_save = control.should_training_stop = True
