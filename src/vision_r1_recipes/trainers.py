"""The two small subclasses of TRL's trainers."""

from __future__ import annotations

import copy
import random
import re
import shutil
import sys
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, is_peft_model, set_seed
from datasets import IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOTrainer, ModelConfig, SFTTrainer, get_peft_config, is_conversational, prepare_multimodal_messages

from . import checkpoints
from .configs import VisionGRPOConfig, VisionSFTConfig
from .data import generation_prefix
from .pictures import Pictures, SharedFeatures, pictures_of, shareable
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


class _Checkpoints:
    """
    Mixin: a checkpoint says that it is complete, and resuming restores its weights or fails.

    A checkpoint of a Qwen2.5-VL is saved under the hub's key names, while `Trainer` loads it with `strict=False` into
    the module's own: every key is skipped with a warning and training goes on from the initial weights. Loading
    through `from_pretrained` converts the names. DeepSpeed and FSDP checkpoints take other paths.
    """

    run_identity: Mapping[str, Any] = MappingProxyType({})  # written into every checkpoint, see `checkpoints.identity`

    def _save_checkpoint(self, model, trial) -> None:
        home = Path(self._get_output_dir(trial=trial))
        folder = home / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # what a killed run left
        self.accelerator.wait_for_everyone()
        # The marker follows when every rank has written its part, and older checkpoints go only after that.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            state = {name: getattr(self, name) for name in ("_total_train_tokens",) if hasattr(self, name)}
            checkpoints.mark(folder, {"identity": dict(self.run_identity), "state": state})
            for later in checkpoints.saved(home)[checkpoints.saved(home).index(folder) + 1 :]:
                if checkpoints.read(later) is None:  # left by a killed run; in the way of the rotation
                    shutil.rmtree(later)
            rotate_checkpoints(str(home), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if is_peft_model(model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            saved, loaded = load_peft_weights(resume_from_checkpoint, device="cpu"), get_peft_model_state_dict(model)
            wrong = [name for name in saved.keys() | loaded.keys() if not _same(saved.get(name), loaded.get(name))]
            if wrong:
                raise RuntimeError(
                    f"{resume_from_checkpoint} doesn't hold this adapter's weights: {sorted(wrong)[:5]}"
                )
            return
        # In float32, which holds every dtype that a model may mix.
        saved, info = type(model).from_pretrained(
            resume_from_checkpoint, dtype=torch.float32, output_loading_info=True
        )
        wrong = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            listed = "; ".join(f"{kind}: {', '.join(map(str, keys[:5]))}" for kind, keys in wrong.items() if keys)
            raise RuntimeError(f"{resume_from_checkpoint} doesn't hold this model's weights. {listed}")
        model.load_state_dict(saved.state_dict(), strict=True)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def _keep_used_conversions(model: PreTrainedModel | PeftModel) -> None:
    """
    Save under the key names that were read. Under ZeRO-3 transformers 5.23 keeps renamings that did not apply to the
    checkpoint and undoes them on saving: a Qwen2.5-VL gets `model.model.layers...`, which vLLM can't read.
    """
    model = model.get_base_model() if is_peft_model(model) else model
    if getattr(model, "_weight_conversions", None):
        model._weight_conversions = [used for used in model._weight_conversions if used.was_used()]


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a.to(b.dtype).cpu(), b.detach().cpu())


class VisionSFTTrainer(_Checkpoints, SFTTrainer):
    """
    TRL's [`SFTTrainer`] that can leave the vision tower as it is (`VisionSFTConfig.freeze_vision`).

    Example:
    ```python
    trainer = VisionSFTTrainer("Qwen/Qwen2.5-VL-7B-Instruct", args=VisionSFTConfig(freeze_vision=True), ...)
    ```
    """

    def __init__(self, model, args: VisionSFTConfig | None = None, **kwargs):
        super().__init__(model, args=args, **kwargs)
        _keep_used_conversions(self.model)
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

    def __init__(self, rows, prompts_per_rollout, rollouts, micro_steps, seed, process_index, num_processes, seconds):
        self.rows = rows
        self.prompts_per_rollout = prompts_per_rollout
        self.rollouts = rollouts
        self.micro_steps = micro_steps
        self.seed = seed
        self.process_index = process_index
        self.share = prompts_per_rollout // num_processes
        self.seconds = seconds  # a counter: time spent on reading rows, unless another process reads them

    def __len__(self) -> int:
        return self.rollouts * self.micro_steps

    def __getitem__(self, i: int) -> list[dict[str, Any]]:
        rollout, micro_step = divmod(i, self.micro_steps)
        if micro_step:
            return []
        start = perf_counter()
        first = rollout * self.prompts_per_rollout + self.process_index * self.share
        rows = [self.rows[self.row_at(position)] for position in range(first, first + self.share)]
        self.seconds["pictures"] += perf_counter() - start
        return rows

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


@contextmanager
def _rng_kept():
    """What is drawn inside leaves no trace in Python's, numpy's and torch's random states."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@dataclass
class _Rollout:
    """The prompts of one rollout on one process, while completions are generated and scored."""

    prompts: list[dict[str, Any]]  # rows of the dataset, one per prompt
    group: int  # completions per prompt

    def repeat(self, items: Iterable) -> list:
        """One item per prompt -> one per completion."""
        return [item for item in items for _ in range(self.group)]

    @property
    def prompt_of_row(self) -> list[int]:
        return self.repeat(range(len(self.prompts)))


class VisionGRPOTrainer(_Checkpoints, GRPOTrainer):
    """
    TRL's [`GRPOTrainer`] with Progressive Thinking Suppression Training.

    With `VisionGRPOConfig.stages`, a row of the dataloader is a prompt, and the group is made when completions are
    generated. Group size and length can then change between two rollouts, prompts per update stay what the recipe
    says, and a picture is decoded and processed once per rollout, kept once, in host memory, and seen once by each
    forward pass. Evaluation works the same way with `num_generations_eval`. Without `stages` the trainer is TRL's own.

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
        _keep_used_conversions(self.model)
        self.stages = parse_stages(args.stages) if getattr(args, "stages", None) else None
        if self.use_vllm:
            guard_pictures(self.vllm_generation, self._image_pad_token_id)
            if self.vllm_mode == "server" and self.accelerator.is_main_process:
                check_server(self.vllm_generation.vllm_client.get_server_info(), args.vllm_max_model_length)
        self._rollout: _Rollout | None = None
        self._pictures: Pictures | None = None
        self._seconds = Counter()
        if self.stages is None:
            return
        if isinstance(self.train_dataset, IterableDataset):
            raise ValueError("`stages` needs a dataset with a length: load the rows, or leave `stages` out.")
        if args.use_transformers_continuous_batching and shareable(self.processing_class):
            raise ValueError("`use_transformers_continuous_batching` takes no pictures in TRL 1.16: set it to false.")
        if args.sync_ref_model and args.save_strategy != "no":
            raise ValueError("`sync_ref_model`: the reference is in no checkpoint. Set it, or saving, off.")
        stock = self.tools or self.environment_factories is not None or self.rollout_func is not None
        self._shares_pictures = shareable(self.processing_class) and not stock
        if self._shares_pictures:
            self._features = SharedFeatures([self.accelerator.unwrap_model(self.model), self.ref_model])
        self.updates_per_rollout = args.steps_per_generation // args.gradient_accumulation_steps * self.num_iterations
        self.set_stage(0, self.stages[0])
        self.add_callback(PTSTCallback(self, self.stages, self.updates_per_rollout, args.stop_after_rollouts))

    def set_stage(self, index: int, stage: Stage) -> None:
        """Generate from now on `stage.num_generations` completions of up to `stage.max_completion_length` tokens."""
        self.num_generations = stage.num_generations
        self._rows = self.args.per_device_train_batch_size * stage.num_generations // self.stages[0].num_generations
        self._set_sampling(max_completion_length=stage.max_completion_length)

    def _set_sampling(self, max_completion_length: int, **sampling: float) -> None:
        self.max_completion_length = max_completion_length
        if self.use_vllm:
            vars(self.vllm_generation).update(max_completion_length=max_completion_length, **sampling)
        else:
            sampling["max_new_tokens"] = max_completion_length
            self.generation_config.update(**sampling)
            self.generation_kwargs.update(sampling)

    def get_train_dataloader(self) -> DataLoader:
        if self.stages is None:
            return super().get_train_dataloader()
        return DataLoader(
            self.rollouts(),
            batch_size=1,
            collate_fn=_only,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def rollouts(self) -> _Rollouts:
        """The run's prompts on this process, by micro-step."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _Rollouts(
            self.train_dataset,
            self.args.prompts_per_rollout,
            num_rollouts(self.stages),
            self.args.steps_per_generation * self.num_iterations,
            seed if self.shuffle_dataset else None,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self._seconds,
        )

    def _get_eval_sampler(self, eval_dataset) -> Sampler:
        # TRL's repeats rows by `num_generations_eval`; here the group is made when completions are generated.
        return super()._get_eval_sampler(eval_dataset) if self.stages is None else SequentialSampler(eval_dataset)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """
        TRL's evaluation with its own length and sampling, at a seed of its own; training goes on untouched. Its
        completions are not written: their table would take the place of the training's at the same step.
        """
        if self.stages is None:
            return super().evaluate(*args, **kwargs)
        ours = self.args
        cap = ours.eval_max_completion_length or max(stage.max_completion_length for stage in self.stages)
        before = {"max_completion_length": self.max_completion_length, "temperature": self.temperature}
        before["top_p"] = self.top_p
        logs, self._logs, log_completions, self.log_completions = self._logs, _empty(), self.log_completions, False
        pictures = self._pictures  # of the completions that are still in the buffer
        self._set_sampling(cap, temperature=ours.eval_temperature, top_p=ours.eval_top_p)
        try:
            with _rng_kept():
                set_seed(ours.seed, device_specific=True)
                return super().evaluate(*args, **kwargs)
        finally:
            self._set_sampling(**before)
            self._logs, self.log_completions, self._pictures = logs, log_completions, pictures

    def probe(self, num_prompts: int) -> tuple[dict[str, float], str]:
        """
        Metrics of a rollout of the run's first `num_prompts` prompts at the present stage, and its first completion.

        Weights, random states, metrics and logs are afterwards what they were.
        """
        share = -(-num_prompts // self.accelerator.num_processes)
        rows = self.rollouts()[0][:share]
        kept = copy.deepcopy((self._metrics, self._logs)), self.state.num_input_tokens_seen, Counter(self._seconds)
        training = self.model.training
        self.model.train()
        try:
            with _rng_kept():
                self._generate_and_score_completions(rows)
            metrics = {name: float(np.mean(values)) for name, values in self._metrics["train"].items() if values}
            sample = _as_text(next(iter(self._logs["completion"])))
            return metrics, sample if isinstance(sample, str) else sample[-1]["content"]
        finally:
            self.model.train(training)
            (self._metrics, self._logs), self.state.num_input_tokens_seen, seconds = kept
            self._seconds.clear()
            self._seconds.update(seconds)

    @contextmanager
    def _phase(self, name: str):
        """Count the seconds inside under `name`; say so when they become very many."""
        limit, rank, start = self.args.ddp_timeout / 2, self.accelerator.process_index, perf_counter()

        def warn():
            text = f"rank {rank} has been in phase {name} for {limit:.0f} s (step {self.state.global_step})"
            print(f"{text}; the other ranks give up after ddp_timeout, {self.args.ddp_timeout} s", file=sys.stderr)

        watch = threading.Timer(limit, warn)
        watch.daemon = True
        watch.start()
        try:
            yield
        finally:
            watch.cancel()
            if self.model.training:
                self._seconds[name] += perf_counter() - start

    # One rollout

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.stages is None:
            return super()._generate_and_score_completions(inputs)
        if self.model.training:
            # TRL keeps as many rows as the first stage's rollouts have: in later stages old ones would be among them.
            self._logs = _empty()
        rollout = _Rollout(inputs, self.num_generations if self.model.training else self.num_generations_eval)
        with self._phase("rollout"):
            if not self._shares_pictures:
                return super()._generate_and_score_completions(rollout.repeat([dict(row) for row in inputs]))
            # TRL sees no pictures: they reach the generation in `_generate`, the model in `_get_per_token_logps_...`
            # and `_compute_loss`, the rewards in `_calculate_rewards`.
            bare = [{k: v for k, v in row.items() if k not in ("image", "images")} for row in inputs]
            self._rollout = rollout
            try:
                output = super()._generate_and_score_completions([dict(row) for row in rollout.repeat(bare)])
            finally:
                self._rollout = None
        output["prompt"] = rollout.prompt_of_row
        if self.log_multimodal:
            self._logs["images"].extend(gather_object(rollout.repeat([pictures_of(row) for row in inputs])))
        return output

    def _generate(self, prompts: list):
        if self._rollout is None:
            return super()._generate(prompts)
        prompts = prompts[:: self._rollout.group]
        if is_conversational({"prompt": prompts[0]}):
            prompts = [
                prepare_multimodal_messages(prompt, images=pictures_of(row))
                for prompt, row in zip(prompts, self._rollout.prompts, strict=True)
            ]
        *generated, _, tool_images = super()._generate(self._rollout.repeat(prompts))
        return *generated, None, tool_images

    def _tokenize_prompts(self, prompts: list):
        if self._rollout is None:
            return super()._tokenize_prompts(prompts)
        repeat = self._rollout.repeat
        with self._phase("pictures"):
            ids, images, fields = super()._tokenize_prompts(prompts[:: self._rollout.group])
        images = [None] * len(ids) if images is None else images
        self._pictures = Pictures(fields, [len(of_prompt or ()) for of_prompt in images])
        # vLLM gets the pictures themselves
        fields = {} if self.use_vllm else self._pictures.unpadded(self._rollout.prompt_of_row)
        return repeat(ids), repeat(images) if any(images) else None, fields

    def _generate_single_turn(self, *args, **kwargs):
        with self._phase("generation"):
            if self._rollout is None or self.use_vllm:
                completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
            else:
                with self._features.of(self._pictures.order(self._rollout.prompt_of_row)):
                    completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        if self.model.training:
            self._seconds["tokens"] += sum(map(len, completion_ids))
        return completion_ids, logprobs

    def _calculate_rewards(self, inputs, prompts, *args):
        if self._rollout is not None:
            rows = self._rollout.repeat(self._rollout.prompts)
            inputs = [{**row, **of_row} for row, of_row in zip(rows, inputs, strict=True)]
        if is_conversational({"prompt": prompts[0]}):
            prefix = generation_prefix(self.processing_class, **self.chat_template_kwargs)
            inputs = [{**row, "generation_prefix": prefix} for row in inputs]
        with self._phase("rewards"):
            return super()._calculate_rewards(inputs, prompts, *args)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        # TRL passes the first stage's micro-batch; longer stages have fewer rows in the same memory.
        if batch_size is not None and self.stages is not None and self.model.training:
            batch_size = self._rows
        if self.stages is None or self._rollout is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs
            )
        rows, length = input_ids.shape
        chunks = []
        for first in range(0, rows, batch_size or rows):
            chunk = slice(first, min(first + (batch_size or rows), rows))
            prompts = self._rollout.prompt_of_row[chunk]
            pictures = self._pictures.padded(prompts, length - logits_to_keep, length, input_ids.device)
            with self._features.of(self._pictures.order(prompts)):
                chunks.append(
                    super()._get_per_token_logps_and_entropies(
                        model, input_ids[chunk], attention_mask[chunk], logits_to_keep, **{**kwargs, **pictures}
                    )
                )
        logps, entropies, aux_losses = zip(*chunks, strict=True)
        return (
            torch.cat(logps),
            None if entropies[0] is None else torch.cat(entropies),
            None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
        )

    def _compute_loss(self, model, inputs):
        if "prompt" in inputs:
            prompt_length, completion_length = inputs["prompt_ids"].size(1), inputs["completion_ids"].size(1)
            pictures = self._pictures.padded(
                inputs["prompt"], prompt_length, prompt_length + completion_length, inputs["prompt_ids"].device
            )
            with self._features.of(self._pictures.order(inputs["prompt"])):
                return super()._compute_loss(model, {**inputs, **pictures})
        return super()._compute_loss(model, inputs)

    # Logs

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
            if not self.model.training:
                logs["eval_max_completion_length"] = self.max_completion_length
                logs["eval_temperature"], logs["eval_top_p"] = self.args.eval_temperature, self.args.eval_top_p
            elif self._seconds["rollout"]:
                logs.update(self._clock())
        if self.log_completions:
            # wandb's tables refuse messages whose parts have different keys, as pictures and text have.
            self._logs["prompt"] = deque(map(_as_text, self._logs["prompt"]), self._logs["prompt"].maxlen)
        super().log(logs, start_time)

    def _clock(self) -> dict[str, float]:
        """Where this process' time went since the last row of the log, and tokens generated on it per second."""
        now = perf_counter()
        spent = Counter(self._seconds)
        self._seconds.clear()
        self._seconds["logged"] = now
        clock = {f"time/{name}": spent[name] for name in ("rollout", "generation", "pictures", "rewards")}
        if spent["logged"]:
            clock["time/host_share"] = (spent["pictures"] + spent["rewards"]) / (now - spent["logged"])
        clock["tokens_per_second"] = spent["tokens"] / spent["generation"] if spent["generation"] else 0.0
        return clock


def _empty() -> dict[str, Any]:
    """TRL's buffers for the table of completions."""
    single = {name: deque() for name in ("images", "prompt", "completion", "advantages")}
    return {**single, "rewards": defaultdict(deque), "extra": defaultdict(deque)}


def _as_text(messages: list[dict[str, Any]] | str) -> list[dict[str, str]] | str:
    """Messages with their parts joined, `<image>` where a picture stands."""
    if isinstance(messages, str):
        return messages

    def text(content) -> str:
        parts = [] if isinstance(content, str) else content
        return "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts) or content

    return [{"role": message["role"], "content": text(message["content"])} for message in messages]


def guard_pictures(generation: Any, image_token_id: int | None) -> None:
    """
    Make `generation`, TRL's [`VLLMGeneration`], right for prompts with pictures.

    - vLLM expands each image placeholder itself. In colocate mode TRL 1.16 hands it prompts that are expanded already,
      and the model sees every image token twice: they are collapsed here, and what vLLM makes of them must be the
      trainer's prompts again.
    - vLLM keeps what the vision tower made of a picture when new weights arrive (huggingface/trl#7198): the next pass
      over the data would see through an old tower.
    - Image tokens can't be sampled: in the policy's forward pass one would claim a picture's features.

    Raises (when it generates):
        `RuntimeError`: vLLM's prompts are not the trainer's.
    """
    if image_token_id is None:
        return
    bias = dict(generation.generation_kwargs.get("logit_bias") or {})
    generation.generation_kwargs = {**generation.generation_kwargs, "logit_bias": {**bias, image_token_id: -100.0}}
    generate, sync_weights = generation.generate, generation.sync_weights

    def synced():
        sync_weights()
        if generation.mode == "colocate":
            generation.llm.llm_engine.reset_encoder_cache()
        elif generation.accelerator.is_main_process:
            client = generation.vllm_client
            client.session.post(f"{client.base_url}/reset_encoder_cache").raise_for_status()

    generation.sync_weights = synced
    if generation.mode != "colocate":
        return

    def guarded(prompts, images, *args, **kwargs):
        if images is None:
            return generate(prompts, images, *args, **kwargs)
        made = generate([collapse_runs(ids, image_token_id) for ids in prompts], images, *args, **kwargs)
        for ours, theirs in zip(prompts, made[0], strict=True):
            if ours != list(theirs):
                counts = ours.count(image_token_id), list(theirs).count(image_token_id)
                raise RuntimeError(
                    f"vLLM sees another prompt than the trainer: {len(theirs)} tokens, {counts[1]} of pictures, "
                    f"against {len(ours)} and {counts[0]}. Do both resize pictures alike? `use_vllm: false` works too."
                )
        return made

    generation.generate = guarded


def check_server(info: Mapping[str, Any], max_model_length: int | None) -> None:
    """Raise `RuntimeError` when the vLLM server that says `info` of itself is not the one that the recipe expects."""
    served, mode = (info["model_config"].get(key) for key in ("max_model_len", "logprobs_mode"))
    if max_model_length is not None and served is not None and served < max_model_length:
        raise RuntimeError(
            f"the vLLM server has --max-model-len {served}, `vllm_max_model_length` is {max_model_length}: longer "
            "completions would fail. `recipe plan` prints the server's command."
        )
    if mode not in (None, "processed_logprobs"):
        raise RuntimeError(f"the vLLM server has --logprobs-mode {mode}; TRL needs processed_logprobs.")


def collapse_runs(ids: list[int], token_id: int) -> list[int]:
    """`ids` with every run of `token_id` made one."""
    return [token for i, token in enumerate(ids) if token != token_id or i == 0 or ids[i - 1] != token_id]
