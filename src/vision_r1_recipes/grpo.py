"""
GRPO with HFRRF and Progressive Thinking Suppression Training.

```shell
accelerate launch src/vision_r1_recipes/grpo.py recipes/ptst.yaml [--key value ...]
```
"""

import sys
from pathlib import Path


# A script's folder comes first on the path, where `evaluate.py` would shadow Hugging Face's `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402
from transformers import set_seed  # noqa: E402

from vision_r1_recipes import preflight  # noqa: E402
from vision_r1_recipes.configs import VisionGRPOConfig  # noqa: E402
from vision_r1_recipes.data import prepare  # noqa: E402
from vision_r1_recipes.probe import StartProbe  # noqa: E402
from vision_r1_recipes.rewards import accuracy_reward, format_reward, hfrrf  # noqa: E402
from vision_r1_recipes.run import run  # noqa: E402
from vision_r1_recipes.trainers import VisionGRPOTrainer, lora_config  # noqa: E402


REWARDS = {"hfrrf": [hfrrf], "soft": [format_reward, accuracy_reward]}


@record  # torchrun names the process that failed first, and shows its traceback
def main(argv: list[str]) -> None:
    values, data, args, model = preflight.read(argv, VisionGRPOConfig)
    set_seed(args.seed)

    processor, rows, eval_rows, report = prepare(data, model, "rl", data.max_prompt_length)

    args.model_init_kwargs = preflight.model_init_kwargs(model, args)
    trainer = VisionGRPOTrainer(
        model.model_name_or_path,
        reward_funcs=REWARDS[args.reward],
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=lora_config(model),
    )
    if args.probe_prompts:
        trainer.add_callback(StartProbe(trainer, args.probe_prompts, hard=args.reward == "hfrrf"))
    run(trainer, values, report)


if __name__ == "__main__":
    with preflight.kind_errors():
        main(sys.argv[1:])
