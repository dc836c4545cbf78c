"""
Supervised fine-tuning, the cold start of Vision-R1 (Vision-R1-CI).

```shell
accelerate launch src/vision_r1_recipes/sft.py recipes/cold_start.yaml [--key value ...]
```
"""

import sys
from pathlib import Path


# A script's folder comes first on the path, where `evaluate.py` would shadow Hugging Face's `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402
from transformers import set_seed  # noqa: E402

from vision_r1_recipes import preflight  # noqa: E402
from vision_r1_recipes.configs import VisionSFTConfig  # noqa: E402
from vision_r1_recipes.data import prepare  # noqa: E402
from vision_r1_recipes.run import run  # noqa: E402
from vision_r1_recipes.trainers import VisionSFTTrainer, lora_config  # noqa: E402


@record  # torchrun names the process that failed first, and shows its traceback
def main(argv: list[str]) -> None:
    values, data, args, model = preflight.read(argv, VisionSFTConfig)
    set_seed(args.seed)

    processor, rows, eval_rows, report = prepare(data, model, "sft", args.max_length)
    args.max_length = None  # longer rows are gone; TRL would cut at this length, through image tokens if need be

    args.model_init_kwargs = preflight.model_init_kwargs(model, args)
    trainer = VisionSFTTrainer(
        model.model_name_or_path,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=lora_config(model),
    )
    run(trainer, values, report)


if __name__ == "__main__":
    with preflight.kind_errors():
        main(sys.argv[1:])
