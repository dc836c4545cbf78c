"""Before a fresh run: can this checkpoint earn a reward at the first stage at all?"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from .recipe import RecipeError


if TYPE_CHECKING:
    from .trainers import VisionGRPOTrainer


class StartProbe(TrainerCallback):
    """
    Tries a few prompts when training begins from the start, prints what came out, and stops a hopeless run.

    Args:
        trainer ([`VisionGRPOTrainer`]):
            The trainer; its backend, group size and length are used, its trace stays bit for bit what it would be.
        num_prompts (`int`):
            Prompts over all processes, rounded up to the same number on each.
        hard (`bool`):
            Whether the reward needs the format.
    """

    def __init__(self, trainer: VisionGRPOTrainer, num_prompts: int, hard: bool):
        self.trainer, self.num_prompts, self.hard = trainer, num_prompts, hard

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            return
        metrics, sample = self.trainer.probe(self.num_prompts)
        stage = self.trainer.stages[0]
        if self.trainer.accelerator.is_main_process:
            print(describe(metrics, sample, stage.max_completion_length, stage.num_generations), flush=True)
        if advice := hopeless(metrics, self.hard, stage.max_completion_length):
            raise RecipeError(f"{advice} `probe_prompts: 0` starts anyway.")


def describe(metrics: Mapping[str, float], sample: str, cap: int, group: int) -> str:
    rates = (("format_rate", "format"), ("accuracy_rate", "accuracy"), ("completions/clipped_ratio", "truncated"))
    found = ", ".join(f"{name} {metrics[key]:.1%}" for key, name in rates if metrics.get(key) is not None)
    return (
        f"start probe, {group} completions of up to {cap} tokens per prompt: reward {metrics['reward']:.3f}, {found}, "
        f"{metrics['completions/mean_length']:.1f} tokens on average. The first one:\n"
        f"{textwrap.indent(textwrap.shorten(sample, 600, placeholder=' ...'), '    ')}"
    )


def hopeless(metrics: Mapping[str, float], hard: bool, cap: int) -> str | None:
    """Why no reward can ever come, and what to do; `None` when one can."""
    if metrics["reward"] != 0:
        return None
    if metrics["completions/clipped_ratio"] == 1:
        return (
            f"every completion of the start probe ran into the cap of {cap} tokens, so none can be rewarded: raise "
            "`max_completion_length` of the first stage, or start from a model that comes to an end."
        )
    if hard and metrics.get("format_rate") == 0:
        return (
            "no completion of the start probe has the format <think> ... </think><answer> ... </answer>, which the "
            "hard reward needs: start from a cold-started model (recipes/cold_start.yaml), ask for the format in "
            "`system_prompt`, or take `reward: soft` (recipes/zero.yaml)."
        )
    return None
