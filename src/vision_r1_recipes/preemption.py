"""End a run where it can go on from, when the cluster wants its machines back."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from time import perf_counter, time

import torch
from transformers import Trainer, TrainerCallback


# Files in `output_dir`: somebody's wish; that it was fulfilled; when the machines go away, from `slurm/train.slurm`.
STOP, STOPPED, STOP_AT = "stop", "stopped", "stop_at"
GRACE = 30  # seconds from SIGTERM to SIGKILL: SLURM's default KillWait, and what torchrun leaves its processes
GO_ON, SAVE, LEAVE = range(3)


class PreemptionCallback(TrainerCallback):
    """
    Ends a run early that is asked to, between two rollouts with a checkpoint.

    It is asked by a file in its `output_dir`, `stop`, or `stop_at` with the time (seconds since 1970) at which the
    machines go away, if that is known, or by SIGTERM, half a minute before SIGKILL. At every optimizer step the
    processes agree on what to do: at the end of a rollout they save and end; inside one they go on to its end if that,
    at the speed measured, comes in time, and otherwise end at once: the run goes on from its last checkpoint. Without
    `stages` every optimizer step is the end of a rollout.

    Args:
        trainer ([`VisionSFTTrainer`] or [`VisionGRPOTrainer`]):
            The trainer of the run.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir)
        self.updates_per_rollout = getattr(trainer, "updates_per_rollout", 1)
        self.terminated_at: float | None = None
        self.stopped = False
        self._previous = None
        self._update_seconds = self._save_seconds = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._previous = signal.signal(signal.SIGTERM, self._terminate)

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Give SIGTERM back: to be called after an error too, which `on_train_end` never hears of."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _terminate(self, *_):
        self.terminated_at = time()

    def seconds_left(self) -> float | None:
        """Seconds until this process loses its machine; `None` when nobody has said so."""
        if self.terminated_at is not None:
            return self.terminated_at + GRACE - time()
        try:
            return float((self.folder / STOP_AT).read_text()) - time()
        except ValueError:  # nobody knows when
            return float("inf")
        except OSError:  # not there; or a network disk that will say so at the next step
            return float("inf") if (self.folder / STOP).exists() else None

    def forget(self) -> None:
        """Leave out a time that a job has left behind; `slurm/train.slurm` does so itself, before it may write one."""
        if "SLURM_JOB_ID" not in os.environ:
            (self.folder / STOP_AT).unlink(missing_ok=True)

    def clear(self, finished: bool) -> None:
        """Take the files away for the next start; one that was to stop and has not finished leaves `stopped`."""
        (self.folder / STOP_AT).unlink(missing_ok=True)
        if finished:
            (self.folder / STOP).unlink(missing_ok=True)
        elif (self.folder / STOP).exists():
            (self.folder / STOP).replace(self.folder / STOPPED)

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        seconds, first = perf_counter() - self._start, state.global_step % self.updates_per_rollout == 1
        if not first or not self._update_seconds:  # a rollout's first update comes after its completions
            self._update_seconds = seconds
        self._saving = perf_counter()
        if state.global_step >= state.max_steps:
            return
        wish = torch.tensor([self._wish(-state.global_step % self.updates_per_rollout)], device=args.device)
        wish = int(self.trainer.accelerator.gather(wish).max())  # a signal reaches one process before another
        if wish:
            self.stopped = control.should_training_stop = True
            control.should_save = wish == SAVE

    def _wish(self, updates_to_go: int) -> int:
        left = self.seconds_left()
        if left is None:
            return GO_ON
        if not updates_to_go:
            return SAVE
        return GO_ON if updates_to_go * self._update_seconds + self._save_seconds < left else LEAVE

    def on_save(self, args, state, control, **kwargs):
        self._save_seconds = perf_counter() - self._saving
