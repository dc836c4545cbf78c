"""The keys of a recipe that are ours. Every other key is TRL's (`SFTConfig`, `GRPOConfig`, `ModelConfig`)."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from trl import GRPOConfig, SFTConfig

from .ptst import batch_arithmetic, num_rollouts, parse_stages
from .recipe import RecipeError


@dataclass
class DataArguments:
    """
    What a run reads, for SFT, GRPO and evaluation alike.

    Args:
        datasets (`list[dict]`):
            Sources, each `{path, name?, split?, data_files?, image_folder?, limit?, drop_reasoning?, pass_rates?,
            pass_rate_band?}`: a Hub id or a local path in one of the released layouts (see `data.py`).
        eval_datasets (`list[dict]`, *optional*):
            The same, for evaluation during training.
        system_prompt (`str`, *optional*):
            A system message before every prompt. `None` leaves it to the chat template; Qwen2.5-VL's then adds its
            default line.
        min_pixels (`int`, *optional*), max_pixels (`int`, *optional*):
            Bounds on a picture's area; it is resized by qwen-vl-utils' rule. `None` takes the processor's own.
        max_prompt_length (`int`, *optional*):
            RL rows whose prompt has more tokens, image tokens included, are dropped. Nothing is ever truncated.
        max_dropped_share (`float`, *optional*, defaults to `0.05`):
            Stop when more than this share of the rows had to be dropped, for any reasons.
        num_proc (`int`, *optional*):
            Processes that check and prepare the rows.
    """

    datasets: list[dict] = field(default_factory=list, metadata={"help": "Sources of rows."})
    eval_datasets: list[dict] | None = field(default=None, metadata={"help": "Sources for evaluation in training."})
    system_prompt: str | None = field(default=None, metadata={"help": "A system message before every prompt."})
    min_pixels: int | None = field(default=None, metadata={"help": "Least area of a picture, in pixels."})
    max_pixels: int | None = field(default=None, metadata={"help": "Greatest area of a picture, in pixels."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longer prompts (tokens) are dropped."})
    max_dropped_share: float = field(default=0.05, metadata={"help": "Greatest share of rows that may be dropped."})
    num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the rows."})


def below_one(config: Any, *names: str) -> list[str]:
    """A sentence for each of `names` that is set and under 1."""
    return [
        f"`{name}`: {value}, needs at least 1."
        for name in names
        if (value := getattr(config, name)) is not None and value < 1
    ]


@dataclass
class _Launched:
    """
    Mixin: how a run is launched.

    Args:
        accelerate_config (`str`, *optional*):
            The file that `slurm/train.slurm` gives to `accelerate launch --config_file`. The run doesn't read it.
    """

    accelerate_config: str | None = field(default=None, metadata={"help": "For `accelerate launch --config_file`."})

    def _num_processes(self) -> int:
        return int(os.environ.get("WORLD_SIZE", 1))


def derived_problem(key: str, value: Any, because: str) -> str:
    return f"`{key}`: {value!r} can't stand beside {because}: it is derived. Remove it."


def set_though_derived(config: Any, names: tuple[str, ...], because: str) -> list[str]:
    """A sentence for each key that we derive and that was set by hand."""
    problems = []
    for spec in fields(config):
        default = spec.default if spec.default_factory is MISSING else spec.default_factory()
        value = getattr(config, spec.name)
        if spec.name in names and value != default:
            problems.append(derived_problem(spec.name, value, because))
    return problems


@dataclass
class VisionSFTConfig(_Launched, SFTConfig):
    """
    TRL's [`SFTConfig`] and:

    Args:
        global_batch_size (`int`, *optional*):
            Rows per optimizer step over all processes; `gradient_accumulation_steps` is derived from it.
        freeze_vision (`bool`, *optional*, defaults to `False`):
            Train the language model only: vision tower and projector stay as they are.
        force_resume (`bool`, *optional*, defaults to `False`):
            Go on from a checkpoint although the recipe, the data or the number of processes changed since.

    `max_length` is the length in tokens, image tokens included, over which `sft.py` drops a row. TRL itself would cut
    the row there, through image tokens if need be.
    """

    global_batch_size: int | None = field(default=None, metadata={"help": "Rows per optimizer step, all processes."})
    freeze_vision: bool = field(default=False, metadata={"help": "Freeze vision tower and projector."})
    force_resume: bool = field(default=False, metadata={"help": "Resume although the recipe, data or world changed."})

    def __post_init__(self):
        if self.global_batch_size is not None:
            problems = set_though_derived(self, ("gradient_accumulation_steps",), "`global_batch_size`")
            problems += below_one(self, "global_batch_size", "per_device_train_batch_size")
            if problems:
                raise RecipeError("\n".join(problems))
            self.gradient_accumulation_steps = sft_accumulation(
                self.global_batch_size, self.per_device_train_batch_size, self._num_processes()
            )
        super().__post_init__()


def sft_accumulation(global_batch_size: int, per_device_train_batch_size: int, world_size: int) -> int:
    """Micro-steps per optimizer step; [`RecipeError`] with the arithmetic when it isn't a whole number."""
    rows = per_device_train_batch_size * world_size
    if global_batch_size % rows:
        whole = range(1, global_batch_size + 1)
        fits = [n for n in whole if global_batch_size % (n * world_size) == 0]
        near = sorted(fits, key=lambda n: abs(n - per_device_train_batch_size))[:3]
        name = "per_device_train_batch_size"
        if not near:
            fits = [n for n in whole if global_batch_size % (n * per_device_train_batch_size) == 0]
            near = sorted(fits, key=lambda n: abs(n - world_size))[:3]
            name = "processes"
        fix = f"{name}: {', '.join(map(str, sorted(near)))}; " if near else ""
        fix += f"global_batch_size: {max(global_batch_size // rows, 1) * rows}"
        raise RecipeError(
            f"global_batch_size = {global_batch_size} / (per_device_train_batch_size {per_device_train_batch_size} x "
            f"{world_size} processes) is {global_batch_size / rows:.4g}, not a whole number. What works: {fix}."
        )
    return global_batch_size // rows


# Added to `ddp_timeout`, seconds for each token of the longest completion: one process may generate it while the
# others wait [ours].
SECONDS_PER_TOKEN = 0.5
GRPO_DERIVED = (
    "num_generations",
    "max_completion_length",
    "max_steps",
    "num_train_epochs",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "generation_batch_size",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "save_strategy",
    "eval_strategy",
)


@dataclass
class VisionGRPOConfig(_Launched, GRPOConfig):
    """
    TRL's [`GRPOConfig`] and a schedule. Everything here counts *rollouts*; the Trainer's own keys are derived.
    Without `stages` it is TRL's config unchanged. `ddp_timeout` grows with the longest stage unless it is set.

    Args:
        stages (`list[dict]`, *optional*):
            `[{max_completion_length, num_generations, steps}, ...]`, see [`Stage`]. One entry is a plain run.
        prompts_per_rollout (`int`, *optional*):
            Prompts that completions are generated for at once, over all processes.
        prompts_per_update (`int`, *optional*):
            Prompts per optimizer step, over all processes: `prompts_per_update * num_generations` completions. TRL
            shuffles the completions of a rollout, so an update is not made of whole groups. Defaults to
            `prompts_per_rollout` (on-policy).
        log_every_rollouts (`int`, *optional*, defaults to `1`):
            Rollouts between two rows of the log.
        save_every_rollouts (`int`, *optional*):
            Rollouts between two checkpoints. `None` saves only the final model.
        eval_every_rollouts (`int`, *optional*):
            Rollouts between two evaluations on `eval_datasets`. `None` does none.
        reward (`str`, *optional*, defaults to `"hfrrf"`):
            `"hfrrf"`: 1 when format and answer are right, else 0 `[paper]`. `"soft"`: format and answer count one half
            each, as in Vision-R1-Zero `[paper]`.
        eval_max_completion_length (`int`, *optional*):
            Cap on the completions of an evaluation in training, at every stage alike. Defaults to the longest stage's.
        eval_temperature (`float`, *optional*, defaults to `0.6`):
            Temperature of an evaluation in training `[repo]`.
        eval_top_p (`float`, *optional*, defaults to `0.95`):
            Nucleus of an evaluation in training `[repo]`.
        probe_prompts (`int`, *optional*, defaults to `8`):
            Prompts that are tried before a fresh run, at the first stage: a run that can never earn a reward stops
            there. 0 tries none.
        stop_after_rollouts (`int`, *optional*):
            Save a checkpoint and end after this rollout of the schedule, to be resumed: a long run in parts.
        force_resume (`bool`, *optional*, defaults to `False`):
            Go on from a checkpoint although the recipe, the data or the number of processes changed since.
    """

    stages: list[dict] | None = field(default=None, metadata={"help": "PTST: the stages of the run."})
    prompts_per_rollout: int | None = field(default=None, metadata={"help": "Prompts per rollout, all processes."})
    prompts_per_update: int | None = field(default=None, metadata={"help": "Prompts per update, all processes."})
    log_every_rollouts: int = field(default=1, metadata={"help": "Rollouts between two log rows."})
    save_every_rollouts: int | None = field(default=None, metadata={"help": "Rollouts between two checkpoints."})
    eval_every_rollouts: int | None = field(default=None, metadata={"help": "Rollouts between two evaluations."})
    reward: str = field(default="hfrrf", metadata={"help": "The reward.", "choices": ["hfrrf", "soft"]})
    eval_max_completion_length: int | None = field(default=None, metadata={"help": "Cap in evaluations."})
    eval_temperature: float = field(default=0.6, metadata={"help": "Temperature of evaluations."})
    eval_top_p: float = field(default=0.95, metadata={"help": "Nucleus of evaluations."})
    probe_prompts: int = field(default=8, metadata={"help": "Prompts tried before a fresh run; 0: none."})
    stop_after_rollouts: int | None = field(default=None, metadata={"help": "Save and end after this rollout."})
    force_resume: bool = field(default=False, metadata={"help": "Resume although the recipe, data or world changed."})

    def __post_init__(self):
        if self.stages is not None:
            self._derive()
        elif self.prompts_per_rollout is not None:
            raise RecipeError(
                "`stages` is missing: give at least one {max_completion_length, num_generations, steps}."
            )
        super().__post_init__()

    def _derive(self):
        problems = set_though_derived(self, GRPO_DERIVED, "`stages`")
        try:
            stages = parse_stages(self.stages)
        except ValueError as error:
            stages = None
            problems += str(error).splitlines()
        if self.prompts_per_rollout is None:
            problems.append("`stages` needs `prompts_per_rollout` (the authors' framework took 512).")
        counts = ("prompts_per_rollout", "prompts_per_update", "per_device_train_batch_size", "num_iterations")
        impossible = below_one(self, *counts)
        problems += impossible + below_one(
            self,
            "log_every_rollouts",
            "save_every_rollouts",
            "eval_every_rollouts",
            "eval_max_completion_length",
            "stop_after_rollouts",
        )
        if self.eval_temperature <= 0 or not 0 < self.eval_top_p <= 1 or self.probe_prompts < 0:
            problems.append(
                f"`eval_temperature` {self.eval_temperature} must be over 0, `eval_top_p` {self.eval_top_p} over 0 "
                f"and at most 1, `probe_prompts` {self.probe_prompts} at least 0."
            )
        if self.prompts_per_update is None:
            self.prompts_per_update = self.prompts_per_rollout
        if stages is None or self.prompts_per_rollout is None or impossible:
            raise RecipeError("\n".join(problems))
        numbers, wrong = batch_arithmetic(
            stages,
            self.prompts_per_rollout,
            self.prompts_per_update,
            self.per_device_train_batch_size,
            self._num_processes(),
            self.num_iterations,
        )
        if problems or wrong:
            raise RecipeError("\n".join(problems + wrong))
        if self.ddp_timeout == type(self).__dataclass_fields__["ddp_timeout"].default:
            longest = max(stage.max_completion_length for stage in stages)
            self.ddp_timeout += int(longest * SECONDS_PER_TOKEN)
        updates = numbers.updates_per_rollout
        self.num_generations = stages[0].num_generations
        self.max_completion_length = stages[0].max_completion_length
        self.gradient_accumulation_steps = numbers.micro_steps_per_update
        self.steps_per_generation = numbers.micro_steps_per_rollout
        self.max_steps = num_rollouts(stages) * updates
        self.logging_steps = self.log_every_rollouts * updates
        self.save_strategy = "steps" if self.save_every_rollouts else "no"
        self.save_steps = (self.save_every_rollouts or num_rollouts(stages)) * updates
        self.eval_strategy = "steps" if self.eval_every_rollouts else "no"
        self.eval_steps = self.eval_every_rollouts and self.eval_every_rollouts * updates
        # One sample per question: TRL would take the group size of the first stage, and refuse most batch sizes.
        self.num_generations_eval = self.num_generations_eval or 1
