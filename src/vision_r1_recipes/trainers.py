"""The two small subclasses of TRL's trainers."""

from __future__ import annotations

import re
from collections import deque
from functools import lru_cache
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from trl import GRPOTrainer, ModelConfig, SFTTrainer, get_peft_config

from .configs import VisionGRPOConfig, VisionSFTConfig
from .ptst import PTSTCallback, Stage, num_rollouts, parse_stages, stage_at


def vision_modules(model: PreTrainedModel) -> torch.nn.Module:
    """
    The vision tower with its projector.

    Raises:
        `ValueError`: when transformers knows no image encoder of `model`.
    """
    encoder = model.get_encoder(modality="image")
    if not isinstance(encoder, torch.nn.Module) or encoder is model or encoder is model.base_model:
        raise ValueError(f"{type(model).__name__} has no image encoder that transformers can name.")
    return encoder


def lora_config(model_args: ModelConfig) -> LoraConfig | None:
    """
    TRL's LoRA configuration of a recipe's keys (`use_peft`, `lora_r`, ...), or `None` without `use_peft`.

    The vision tower is left out; `lora_target_modules` defaults to every linear layer of the language model.
    """
    config = get_peft_config(model_args)
    if config is None:
        return None
    with torch.device("meta"):  # names only
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(model_args.model_name_or_path))
    vision = vision_modules(model)
    name = next(name for name, module in model.named_modules() if module is vision)
    config.exclude_modules = rf"{re.escape(name)}\..*"
    config.target_modules = config.target_modules or "all-linear"
    return config


class _RestoreWeights:
    """
    Mixin: resuming restores the weights, or fails.

    A checkpoint of a Qwen2.5-VL is saved under the hub's key names, while `Trainer` loads it with `strict=False` into
    the module's own: every key is skipped with a warning and training goes on from the initial weights. Loading
    through `from_pretrained` converts the names. DeepSpeed, FSDP and PEFT checkpoints take other paths.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if self.is_fsdp_enabled or is_peft_model(model):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved, info = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype, output_loading_info=True)
        wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            listed = "; ".join(f"{kind}: {', '.join(map(str, keys[:5]))}" for kind, keys in wrong.items() if keys)
            raise RuntimeError(f"{resume_from_checkpoint} doesn't hold this model's weights. {listed}")
        model.load_state_dict(saved.state_dict(), strict=True)


class VisionSFTTrainer(_RestoreWeights, SFTTrainer):
    """
    TRL's [`SFTTrainer`] that can leave the vision tower as it is (`VisionSFTConfig.freeze_vision`).

    Example:
    ```python
    trainer = VisionSFTTrainer("Qwen/Qwen2.5-VL-7B-Instruct", args=VisionSFTConfig(freeze_vision=True), ...)
    ```
    """

    def __init__(self, model, args: VisionSFTConfig | None = None, **kwargs):
        super().__init__(model, args=args, **kwargs)
        if getattr(self.args, "freeze_vision", False) and not is_peft_model(self.model):
            vision_modules(self.model).requires_grad_(False)


class _Rollouts(Dataset):
    """
    Item `i` is what micro-step `i` of one process needs: its prompts of a rollout at the rollout's first micro-step,
    an empty list at the others, which train on the buffered completions.

    The run's prompts are one endless stream, a fresh permutation per pass over the rows derived from `(seed, pass)`.
    Rollouts take consecutive slices of it across the ends of passes, so no row is dropped. An item depends on nothing
    but its index: there is no state to lose at a resume.
    """

    def __init__(self, rows, prompts_per_rollout, rollouts, micro_steps, seed, process_index, num_processes):
        self.rows = rows
        self.prompts_per_rollout = prompts_per_rollout
        self.rollouts = rollouts
        self.micro_steps = micro_steps
        self.seed = seed
        self.process_index = process_index
        self.share = prompts_per_rollout // num_processes

    def __len__(self) -> int:
        return self.rollouts * self.micro_steps

    def __getitem__(self, i: int) -> list[dict[str, Any]]:
        rollout, micro_step = divmod(i, self.micro_steps)
        if micro_step:
            return []
        first = rollout * self.prompts_per_rollout + self.process_index * self.share
        return [self.rows[self.row_at(position)] for position in range(first, first + self.share)]

    def row_at(self, position: int) -> int:
        """Row number at `position` of the run's stream of prompts."""
        data_pass, offset = divmod(position, len(self.rows))
        return offset if self.seed is None else _permutation(self.seed, data_pass, len(self.rows))[offset]


@lru_cache(maxsize=2)  # a rollout straddles two passes at most, unless the data are smaller than a rollout
def _permutation(seed: int, data_pass: int, size: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + data_pass)
    return torch.randperm(size, generator=generator).tolist()


def _only(batch: list) -> list[dict[str, Any]]:
    return batch[0]


class VisionGRPOTrainer(_RestoreWeights, GRPOTrainer):
    """
    TRL's [`GRPOTrainer`] with Progressive Thinking Suppression Training.

    With `VisionGRPOConfig.stages`, a row of the dataloader is a prompt, and the group is made when completions are
    generated. Group size and length can then change between two rollouts, prompts per update stay what the recipe
    says, and a picture is decoded once per rollout. Without `stages` the trainer is TRL's own.

    Example:
    ```python
    args = VisionGRPOConfig(
        stages=[
            {"max_completion_length": 4096, "num_generations": 16, "steps": 100},
            {"max_completion_length": 8192, "num_generations": 8, "steps": 100},
        ],
        prompts_per_rollout=512,
        prompts_per_update=128,
    )
    trainer = VisionGRPOTrainer("path/of/Vision-R1-CI", reward_funcs=hfrrf, args=args, train_dataset=dataset)
    ```
    """

    def __init__(self, model, reward_funcs=None, args: VisionGRPOConfig | None = None, **kwargs):
        super().__init__(model, reward_funcs=reward_funcs, args=args, **kwargs)
        self.stages = parse_stages(args.stages) if getattr(args, "stages", None) else None
        if self.stages is None:
            return
        self.updates_per_rollout = args.steps_per_generation // args.gradient_accumulation_steps * self.num_iterations
        self.set_stage(0, self.stages[0])
        self.add_callback(PTSTCallback(self, self.stages, self.updates_per_rollout))

    def set_stage(self, index: int, stage: Stage) -> None:
        """Generate from now on `stage.num_generations` completions of up to `stage.max_completion_length` tokens."""
        self.num_generations = stage.num_generations
        self.max_completion_length = stage.max_completion_length
        self._rows = self.args.per_device_train_batch_size * stage.num_generations // self.stages[0].num_generations
        if self.use_vllm:
            self.vllm_generation.max_completion_length = stage.max_completion_length
        else:
            self.generation_config.max_new_tokens = stage.max_completion_length
            self.generation_kwargs["max_new_tokens"] = stage.max_completion_length

    def get_train_dataloader(self) -> DataLoader:
        if self.stages is None:
            return super().get_train_dataloader()
        rollouts = _Rollouts(
            self.train_dataset,
            self.args.prompts_per_rollout,
            num_rollouts(self.stages),
            self.args.steps_per_generation * self.num_iterations,
            (self.args.data_seed if self.args.data_seed is not None else self.args.seed)
            if self.shuffle_dataset
            else None,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return DataLoader(
            rollouts,
            batch_size=1,
            collate_fn=_only,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.stages is not None and self.model.training:
            inputs = [dict(row) for row in inputs for _ in range(self.num_generations)]
        return super()._generate_and_score_completions(inputs)

    def _generate_single_turn(self, prompt_ids, images, *args, **kwargs):
        if self.use_vllm and self.vllm_mode == "colocate" and images is not None:
            prompt_ids = [collapse_runs(ids, self._image_pad_token_id) for ids in prompt_ids]
        return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, batch_size=None, **kwargs):
        # TRL passes the first stage's micro-batch; longer stages have fewer rows in the same memory.
        if batch_size is not None and self.stages is not None and self.model.training:
            batch_size = self._rows
        return super()._get_per_token_logps_and_entropies(model, input_ids, *args, batch_size=batch_size, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.stages is not None:
            done = self.state.global_step / self.updates_per_rollout
            index = stage_at(self.stages, max(0, -(-self.state.global_step // self.updates_per_rollout) - 1))
            stage = self.stages[index]
            logs["rollout"] = int(done) if done == int(done) else done
            logs["stage"] = index + 1
            logs["stage/max_completion_length"] = stage.max_completion_length
            logs["stage/num_generations"] = stage.num_generations
            # The Trainer's epoch is a share of the run here; users expect passes over the data.
            self.state.epoch = done * self.args.prompts_per_rollout / len(self.train_dataset)
        if self.log_completions:
            # wandb's tables refuse messages whose parts have different keys, as pictures and text have.
            self._logs["prompt"] = deque(map(_as_text, self._logs["prompt"]), self._logs["prompt"].maxlen)
        super().log(logs, start_time)


def _as_text(messages: list[dict[str, Any]] | str) -> list[dict[str, str]] | str:
    """Messages with their parts joined, `<image>` where a picture stands."""
    if isinstance(messages, str):
        return messages

    def text(content) -> str:
        parts = [] if isinstance(content, str) else content
        return "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts) or content

    return [{"role": message["role"], "content": text(message["content"])} for message in messages]


def collapse_runs(ids: list[int], token_id: int) -> list[int]:
    """
    `ids` with every run of `token_id` made one.

    vLLM expands each image placeholder itself; TRL's colocate mode hands it prompts that are expanded already, and the
    model then sees the image tokens twice.
    """
    return [token for i, token in enumerate(ids) if token != token_id or i == 0 or ids[i - 1] != token_id]
