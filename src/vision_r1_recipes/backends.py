"""
What writes the completions of an evaluation: transformers, vLLM in this process, or any OpenAI-compatible server.

A request is `(sample, attempt, index)`: which of a question's samples, which try at it, and the row. A completion is
`{completion, tokens, truncated}`: its text, its length with the end-of-turn token, and whether that token is missing.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import find_adapter_config_file

from .data import generation_prefix
from .recipe import RecipeError, check_keys


Request = tuple[int, int, int]
Keep = Callable[[list[tuple[Request, dict[str, Any]]]], None]  # called with what is finished, a batch at a time


def load_model(path: str, dtype: str = "auto", **kwargs) -> PreTrainedModel:
    """
    A checkpoint or, over its base and merged, a LoRA adapter: a folder or a Hub id.

    Raises:
        `RecipeError`: it can't be read, or does not hold all weights (transformers would draw the others at random).
    """
    base = path
    try:
        adapter = find_adapter_config_file(path)
        if adapter:
            base = PeftConfig.from_pretrained(path).base_model_name_or_path
            if not base:
                raise ValueError("its adapter_config.json has no base_model_name_or_path")
        model, info = AutoModelForImageTextToText.from_pretrained(
            base, dtype=dtype, output_loading_info=True, **kwargs
        )
        wrong = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
        if wrong:
            raise ValueError(f"{len(wrong)} weights are missing or have another shape, for example {wrong[0]}")
        if adapter:
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
    except Exception as error:
        over = f", a LoRA adapter, over its base {base}" if base != path else ""
        raise RecipeError(f"can't load the model {path}{over}: {type(error).__name__}: {error}") from error
    if "device_map" not in kwargs:
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def set_sampling(
    model: PreTrainedModel, processor: ProcessorMixin, max_new_tokens: int, temperature: float, top_p: float
) -> dict[str, Any]:
    """
    Make this the whole of `model.generation_config`, and return it.

    The config saved with the model is replaced, not updated: Qwen2.5-VL's carries a repetition penalty of 1.05 and a
    temperature of 1e-6, and `generate` fills every field that is not given from it. Only its end-of-turn tokens stay.
    """
    sampling = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        "temperature": temperature or 1.0,
        "top_p": top_p if temperature > 0 else 1.0,
        "top_k": 0,  # off; `None` would mean 50
        "repetition_penalty": 1.0,
        "suppress_tokens": [model.config.image_token_id],  # as in training
        "eos_token_id": _ends(processor, model.generation_config),
        "pad_token_id": processor.tokenizer.pad_token_id,
        "bos_token_id": processor.tokenizer.bos_token_id,
        "use_cache": True,
    }
    model.generation_config = GenerationConfig(**sampling, disable_compile=True)
    return sampling


def _ends(processor: ProcessorMixin, config: GenerationConfig) -> list[int]:
    """The tokens that end a turn."""
    ends = config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return list(dict.fromkeys([processor.tokenizer.eos_token_id, *ends]))


def _prompts(processor: ProcessorMixin, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return processor.apply_chat_template([row["prompt"] for row in rows], tokenize=False, add_generation_prompt=True)


def _seed(seed: int, request: Request) -> int:
    """Of one request, so that it draws the same whichever are in its batch."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {request}".encode(), digest_size=4).digest()) >> 1


class Backend:
    """
    Args:
        model (`str`): Checkpoint; for a server, the name that it knows.
        processor (`ProcessorMixin`): Its chat template and bounds on pictures are used.
        max_length (`int`): Most tokens of a prompt and its completion together.
        dtype (`str`): Of the weights.
        max_new_tokens (`int`), temperature (`float`), top_p (`float`), seed (`int`): Sampling.
        batch_size (`int`, *optional*): See the backends.
        args (`dict`): What only this backend knows.
    """

    default_batch_size: int
    sampling: dict[str, Any]  # every field that was in force
    dtype: str

    @staticmethod
    def identity(batch_size: int, args: Mapping[str, Any]) -> dict[str, Any]:
        """What of these the samples depend on."""
        return {"backend_args": dict(args)}

    @classmethod
    def check(cls, model: str, args: Mapping[str, Any]) -> None:
        """Raise [`RecipeError`] for what can't work, before anything is loaded."""

    def generate(self, rows: Dataset, requests: Sequence[Request], keep: Keep) -> None:
        """Answer all `requests`, those for prompts of similar length together, in an order that they decide alone."""
        raise NotImplementedError

    def state(self) -> Any:
        """JSON that `restore` takes, so that what is left can be answered as if nothing had come between."""

    def restore(self, state: Any) -> None:
        pass


class Transformers(Backend):
    """`batch_size` questions at once, another size draws other samples; `args` are those of `from_pretrained`."""

    default_batch_size = 16

    @staticmethod
    def identity(batch_size, args):
        return {"batch_size": batch_size, "backend_args": dict(args)}

    def __init__(self, model, processor, *, dtype, max_new_tokens, temperature, top_p, batch_size, args, **_):
        self.model, self.processor, self.batch_size = load_model(model, dtype, **args), processor, batch_size
        self.sampling = set_sampling(self.model, processor, max_new_tokens, temperature, top_p)
        self.dtype = str(self.model.dtype)

    def generate(self, rows, requests, keep):
        for _, group in groupby(requests, key=lambda request: request[:2]):
            group = list(group)
            for first in range(0, len(group), self.batch_size):
                batch = group[first : first + self.batch_size]
                made = complete(self.model, self.processor, [rows[i] for *_, i in batch])
                keep(list(zip(batch, made, strict=True)))

    def state(self):
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]
        return [base64.b64encode(state.numpy().tobytes()).decode() for state in states]

    def restore(self, state):
        cpu, *cuda = (torch.frombuffer(bytearray(base64.b64decode(part)), dtype=torch.uint8) for part in state)
        torch.set_rng_state(cpu)
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda)


@torch.no_grad()
def complete(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One completion per row by `model.generation_config`; all in one batch, padded on the left."""
    inputs = processor(
        text=_prompts(processor, rows),
        images=[row["images"] for row in rows],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    generated = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    ends = set(model.generation_config.eos_token_id)
    prefix, made = generation_prefix(processor), []
    for ids in generated.tolist():
        tokens = next((k for k, token in enumerate(ids, 1) if token in ends), None)
        text = prefix + processor.tokenizer.decode(ids[:tokens], skip_special_tokens=True)
        made.append({"completion": text, "tokens": len(ids[:tokens]), "truncated": tokens is None})
    return made


class VLLM(Backend):
    """
    `batch_size` requests between two notes of progress; `args` are those of vLLM's `LLM`. Pictures are kept within the
    bounds of the saved processor, whichever are asked for.
    """

    default_batch_size = 512

    @staticmethod
    def identity(batch_size, args):
        return {"batch_size": batch_size, "backend_args": dict(args)}

    @classmethod
    def check(cls, model, args):
        if find_adapter_config_file(model):
            raise RecipeError(f"{model} is a LoRA adapter: export it first, vLLM takes whole models here.")
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            hint = "install the extra `vllm` in an environment of its own."
            raise RecipeError(f"`backend`: vllm: {error}; {hint}") from None

    def __init__(
        self, model, processor, *, max_length, dtype, max_new_tokens, temperature, top_p, seed, batch_size, args
    ):
        from vllm import LLM

        self.processor, self.batch_size, self.seed = processor, batch_size, seed
        try:
            saved = GenerationConfig.from_pretrained(model)
        except OSError:  # it has none
            saved = GenerationConfig()
        self.llm = LLM(model, **{"dtype": dtype, "max_model_len": max_length, "seed": seed, **args})
        self.dtype = str(self.llm.llm_engine.model_config.dtype)
        self.sampling = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p if temperature else 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": _ends(processor, saved),
            # As in training.
            "logit_bias": {processor.tokenizer.convert_tokens_to_ids(processor.image_token): -100.0},
        }

    def generate(self, rows, requests, keep):
        from vllm import SamplingParams

        prefix = generation_prefix(self.processor)
        for first in range(0, len(requests), self.batch_size):
            batch = requests[first : first + self.batch_size]
            asked = [rows[i] for *_, i in batch]
            prompts = [
                {"prompt": text, "multi_modal_data": {"image": row["images"]}}
                for text, row in zip(_prompts(self.processor, asked), asked, strict=True)
            ]
            sampling = [SamplingParams(**self.sampling, seed=_seed(self.seed, request)) for request in batch]
            made = []
            for output in self.llm.generate(prompts, sampling, use_tqdm=False):
                (written,) = output.outputs
                text = prefix + self.processor.tokenizer.decode(written.token_ids, skip_special_tokens=True)
                truncated = written.finish_reason != "stop"
                made.append({"completion": text, "tokens": len(written.token_ids), "truncated": truncated})
            keep(list(zip(batch, made, strict=True)))


class OpenAI(Backend):
    """
    `batch_size` requests at a time; `args` are `base_url` and the other keys of
    [`~vision_r1_recipes.bridge.endpoint.EndpointConfig`]. Unless `extra_body` says otherwise, every request switches
    off a repetition penalty and a top-k that vLLM and SGLang would take from the model's generation_config.
    """

    default_batch_size = 64
    dtype = "the server's"

    @staticmethod
    def identity(batch_size, args):
        return {"backend_args": {key: args[key] for key in ("extra_body",) if key in args}}

    @classmethod
    def check(cls, model, args):
        cls.config(model, args, max_tokens=1, temperature=0.0, top_p=1.0, concurrency=1)

    @staticmethod
    def config(model, args, **more):
        from .bridge.endpoint import NOT_INHERITED, EndpointConfig

        given = {"extra_body": NOT_INHERITED, **args}
        own = ("model", "concurrency", "temperature", "top_p", "max_tokens", "serve")
        check_keys(dict(args), [f.name for f in fields(EndpointConfig) if f.name not in own], "backend_args.")
        if "base_url" not in args:
            raise RecipeError("`backend_args` needs `base_url`, for example {base_url: http://localhost:8000/v1}.")
        config = EndpointConfig(model=model, **more, **given)
        if problems := config.problems("backend_args"):
            raise RecipeError("\n".join(problems))
        config.key()
        return config

    def __init__(self, model, processor, *, max_new_tokens, temperature, top_p, seed, batch_size, args, **_):
        sampling = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p if temperature else 1.0}
        self.endpoint = self.config(model, args, concurrency=batch_size, **sampling)
        self.sampling = {**sampling, "extra_body": self.endpoint.extra_body}
        self.processor, self.seed = processor, seed

    def generate(self, rows, requests, keep):
        asyncio.run(self._generate(rows, requests, keep))

    async def _generate(self, rows, requests, keep):
        from .bridge.endpoint import Endpoint
        from .bridge.steps import Generation, Rejected

        endpoint = Endpoint(self.endpoint, parse=Generation.whole)
        prefix, waiting, refused = generation_prefix(self.processor), iter(requests), []

        async def work() -> None:
            for request in waiting:
                messages = await asyncio.to_thread(_messages, rows[request[-1]])
                try:
                    written, _ = await endpoint.generate(str(request), messages, seed=_seed(self.seed, request))
                except Rejected as error:
                    refused.append(
                        (request, {"completion": "", "tokens": 0, "truncated": False, "refused": str(error)})
                    )
                    continue
                text = written.text if written.text.startswith("<think>") else prefix + written.text
                truncated = written.finish_reason != "stop"
                # Not every server counts.
                tokens = written.completion_tokens or len(self.processor.tokenizer.encode(written.text))
                made = {"completion": text, "tokens": tokens, "truncated": truncated}
                keep([*refused, (request, made)])  # others are answered: those refused before were so by themselves
                refused.clear()

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(self.endpoint.concurrency, len(requests))):
                    tasks.create_task(work())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await endpoint.client.close()
        if refused:
            keep(refused)


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The prompt with its pictures, resized as a local model would get them, as PNGs."""
    pictures = iter(row["images"])

    def part(content: Mapping[str, Any]) -> dict[str, Any]:
        if content["type"] != "image":
            return dict(content)
        file = io.BytesIO()
        next(pictures).save(file, "png")
        return {"type": "image", "image": {"bytes": file.getvalue(), "path": None}}

    return [{**turn, "content": [part(content) for content in turn["content"]]} for turn in row["prompt"]]


BACKENDS: dict[str, type[Backend]] = {"transformers": Transformers, "vllm": VLLM, "openai": OpenAI}
