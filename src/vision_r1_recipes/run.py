"""What `sft.py` and `grpo.py` do alike once they have a trainer: one progress line per log row, train, save."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from . import checkpoints, preflight, recipe
from .data import DataReport
from .preemption import PreemptionCallback


# What a reader follows, in this order; everything else is in trainer_state.json and the trackers.
LINE = {
    "rollout": "rollout {:g}",
    "stage": "stage {:g}",
    "stage/max_completion_length": "cap {:g}",
    "stage/num_generations": "group {:g}",
    "loss": "loss {:.4f}",
    "reward": "reward {:.3f}",
    "accuracy_rate": "accuracy {:.3f}",
    "format_rate": "format {:.3f}",
    "completions/mean_length": "tokens {:.1f}",
    "completions/clipped_ratio": "truncated {:.3f}",
    "kl": "kl {:.4f}",
    "grad_norm": "grad_norm {:.2f}",
    "mean_token_accuracy": "token accuracy {:.3f}",
    "learning_rate": "lr {:.1e}",
}


class ProgressLine(ProgressCallback):
    """The progress bar with a short line where the stock one prints every metric of a log row."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return super().on_log(args, state, control, logs=logs, **kwargs)
        if state.is_world_process_zero and self.training_bar is not None:
            shown = (form.format(logs[key]) for key, form in LINE.items() if logs.get(key) is not None)
            self.training_bar.write(f"step {state.global_step}: {', '.join(shown)}")


def run(trainer: Trainer, values: dict[str, Any], report: DataReport) -> None:
    """
    Train `trainer` to its end and save the model, with everything needed to repeat the run beside it.

    Args:
        trainer ([`VisionSFTTrainer`] or [`VisionGRPOTrainer`]):
            The trainer; a resume is asked for by its `args.resume_from_checkpoint`.
        values (`dict`):
            The resolved recipe.
        report ([`DataReport`]):
            What became of the rows.

    Raises:
        `RecipeError`: the checkpoint to resume from is of another run.
    """
    args, launch = trainer.args, trainer.accelerator.state
    world = {"num_processes": launch.num_processes, "distributed_type": str(launch.distributed_type.value)}
    if launch.deepspeed_plugin is not None:
        world["distributed_type"] += f" ZeRO-{launch.deepspeed_plugin.zero_stage}"
    trainer.run_identity = checkpoints.identity(values, **world, data=report.fingerprint)
    resuming = checkpoints.newest_is_wanted(args.resume_from_checkpoint)
    if resuming and checkpoints.finished(args.output_dir, args.max_steps):
        if trainer.accelerator.is_main_process:
            print(f"{args.output_dir} holds this run, finished: nothing to do")
        return
    checkpoint, skipped = checkpoints.wanted(args.resume_from_checkpoint, args.output_dir)
    if checkpoint is not None:
        preflight.check(preflight.refuse_changes(checkpoint, trainer.run_identity, args.force_resume))
        vars(trainer).update(checkpoints.read(checkpoint)["state"])
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(ProgressLine)
    preemption = PreemptionCallback(trainer)
    trainer.add_callback(preemption)
    if trainer.accelerator.is_main_process:
        for folder in skipped:
            print(f"{folder} is not complete, a run was killed there: skipped")
        if args.resume_from_checkpoint:
            print(f"going on from {checkpoint}" if checkpoint else "no checkpoint yet: starting afresh", flush=True)
        if checkpoint is None and Path(args.output_dir, "trainer_state.json").is_file():
            aside = f"{Path(args.output_dir)}.{datetime.now():%Y%m%d-%H%M%S}"
            os.rename(args.output_dir, aside)
            Path(args.output_dir, "completions").mkdir(parents=True)  # TRL has made it and will write there
            print(f"{args.output_dir} held a run that had ended: moved to {aside}")
        Path(args.output_dir, "trainer_state.json").unlink(missing_ok=True)  # of what goes on: not finished any more
        preemption.forget()
        recipe.save(values, args.output_dir, **world)
        report.save(Path(args.output_dir, "data_report.json"))
    trainer.accelerator.wait_for_everyone()  # every rank has looked for checkpoints before one is written
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        preemption.restore()
    if trainer.state.global_step < trainer.state.max_steps:
        newest, _ = checkpoints.wanted("auto", args.output_dir)
        if trainer.accelerator.is_main_process:
            preemption.clear(finished=False)
            print(
                f"{'asked to stop: ' * preemption.stopped}stopped at step {trainer.state.global_step} of "
                f"{trainer.state.max_steps}; `--resume_from_checkpoint auto` goes on from "
                f"{newest.name if newest else 'the start'}. The model is saved when the run is finished."
            )
        if newest and newest.name.endswith(f"-{trainer.state.global_step}"):
            trainer.save_state()
        return
    trainer.save_model(args.output_dir)
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        preemption.clear(finished=True)
    trainer.save_state()  # last: with it the run counts as finished
