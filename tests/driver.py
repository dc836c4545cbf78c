"""
`python driver.py grpo|sft RECIPE [--key value ...]`: the entry point with a reward that an untrained model can earn,
and with what every rollout really held on this rank written to `$ROLLOUTS/rank-N.jsonl`. With
`$FIXED_COMPLETIONS` nothing is sampled. It kills itself when all but
the last stroke of the checkpoint of step `$KILL_BEFORE_MARK` is written; rank 1 gets a SIGTERM before step
`$SIGTERM_BEFORE`.
"""

import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

from vision_r1_recipes import checkpoints, grpo, sft
from vision_r1_recipes.preemption import PreemptionCallback
from vision_r1_recipes.preflight import kind_errors
from vision_r1_recipes.trainers import VisionGRPOTrainer


def length_is_even(completions, **kwargs) -> list[float]:
    return [float(len(completion[0]["content"]) % 2 == 0) for completion in completions]


def fixed_completions(self, prompt_ids, images, fields, num_generations, **kwargs):
    completions = []
    for i, ids in enumerate(prompt_ids):
        rng = random.Random(str((ids, i % num_generations)))
        length = rng.randint(1, self.max_completion_length)
        completions.append([*(rng.randrange(500) for _ in range(length - 1)), self.eos_token_ids[0]])
    return completions, None


def record(inner):
    def spy(self, inputs):
        output = inner(self, inputs)
        seen = {
            "step": self.state.global_step,
            "training": self.model.training,
            "prompts": len(inputs),
            "rows": len(output["completion_ids"]),
            "length": output["completion_ids"].shape[1],
            "groups": sorted(Counter(map(tuple, output["prompt_ids"].tolist())).values()),
            "ids": [row["id"] for row in inputs],
        }
        rank = self.accelerator.process_index
        with (Path(os.environ["ROLLOUTS"]) / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(seen) + "\n")
        return output

    return spy


def kill_before_mark(mark):
    def killing(folder, content):
        if folder.name == f"checkpoint-{os.environ['KILL_BEFORE_MARK']}":
            os.kill(os.getpid(), signal.SIGKILL)
        mark(folder, content)

    return killing


def terminate_before(step):
    inner = PreemptionCallback.on_step_begin

    def terminating(self, args, state, control, **kwargs):
        if state.global_step + 1 == step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        inner(self, args, state, control, **kwargs)

    return terminating


if __name__ == "__main__":
    if "SIGTERM_BEFORE" in os.environ:
        PreemptionCallback.on_step_begin = terminate_before(int(os.environ["SIGTERM_BEFORE"]))
    if "KILL_BEFORE_MARK" in os.environ:
        checkpoints.mark = kill_before_mark(checkpoints.mark)
    grpo.REWARDS["hfrrf"] = [length_is_even]
    if "FIXED_COMPLETIONS" in os.environ:
        VisionGRPOTrainer._generate_single_turn = fixed_completions
    if "ROLLOUTS" in os.environ:
        VisionGRPOTrainer._generate_and_score_completions = record(VisionGRPOTrainer._generate_and_score_completions)
    with kind_errors():
        {"grpo": grpo, "sft": sft}[sys.argv[1]].main(sys.argv[2:])
