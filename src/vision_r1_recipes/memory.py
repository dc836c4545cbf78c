"""
What a run needs of each GPU's memory, estimated `[ours]` from the recipe and the model's configuration.

An estimate: it knows nothing of fragmentation, and no GPU run has been held against it. It is there to say which part
is the large one, and which number to change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from trl import ModelConfig

from .configs import VisionGRPOConfig, VisionSFTConfig


BYTES = 2  # of a weight, gradient or activation: bf16
OPTIMIZER = 12  # bytes of a trained weight in DeepSpeed's optimizer: fp32 copy and AdamW's two moments
# Bytes of a logit in a backward pass. GRPO: bf16 value, gradient, log-softmax, entropy. SFT: cross-entropy in fp32.
GRPO_LOGIT, SFT_LOGIT = 8, 10
# Vectors of the hidden and of the MLP's size that one decoder layer keeps for its backward pass, for each token.
HIDDEN_VECTORS, MLP_VECTORS = 8, 4
RESERVE = 4e9  # CUDA context, NCCL, allocator
SERVING = 2e9  # activations and graphs of vLLM
GB = 1e9


@dataclass(frozen=True)
class Model:
    """Numbers of parameters, and sizes."""

    parameters: int
    trained: int
    adapter: bool  # trained as LoRA: the reference is the model without it
    layer: int  # of one decoder layer
    embedding: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    cache: int  # bytes of a token in the KV cache
    kv_heads: int  # vLLM can spread the cache over so many GPUs, more hold copies

    @classmethod
    def of(cls, config: PreTrainedConfig, model: ModelConfig, freeze_vision: bool) -> Model:
        """Count without weights. With LoRA every linear layer of the language model has an adapter."""
        with torch.device("meta"):
            empty = AutoModelForImageTextToText.from_config(config)
        language, text = empty.model.language_model, config.get_text_config()
        parameters = trained = sum(p.numel() for p in empty.parameters())
        if model.use_peft:
            linear = [module for module in language.modules() if isinstance(module, torch.nn.Linear)]
            trained = model.lora_r * sum(module.in_features + module.out_features for module in linear)
        elif freeze_vision:
            trained -= sum(p.numel() for p in empty.get_encoder(modality="image").parameters())
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return cls(
            parameters=parameters,
            trained=trained,
            adapter=model.use_peft,
            layer=sum(p.numel() for p in language.layers[0].parameters()),
            embedding=text.vocab_size * text.hidden_size,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
            kv_heads=text.num_key_value_heads,
            cache=2 * text.num_hidden_layers * text.num_key_value_heads * head * BYTES,
        )


def states(model: Model, world_size: int, zero_stage: int, reference: bool) -> dict[str, float]:
    """Bytes on each GPU that are there all the time, by what they are."""
    share = [world_size if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    optimizer = OPTIMIZER if zero_stage else 2 * BYTES  # without DeepSpeed AdamW's moments are bf16, as the weights
    return {
        "weights": BYTES * model.parameters / share[0],
        "gradients": BYTES * model.trained / share[1],
        "optimizer": optimizer * model.trained / share[2],
        "reference": BYTES * model.parameters / share[0] if reference else 0.0,
        "gathered": BYTES * (2 * model.layer + model.embedding) if zero_stage == 3 else 0.0,
    }


def update(
    model: Model, rows: int, prompt: int, completion: int, args: VisionSFTConfig | VisionGRPOConfig
) -> dict[str, float]:
    """Bytes of the forward and backward pass of one micro-batch; logits are made for `completion` tokens."""
    tokens = rows * (prompt + completion)
    layer = BYTES * tokens * (HIDDEN_VECTORS * model.hidden + MLP_VECTORS * model.intermediate)
    inputs = BYTES * tokens * model.hidden * model.layers
    if getattr(args, "activation_offloading", False):
        inputs = 0
    logit = GRPO_LOGIT if isinstance(args, VisionGRPOConfig) else SFT_LOGIT
    return {
        "activations": inputs + layer if args.gradient_checkpointing else layer * model.layers,
        "logits": logit * rows * completion * model.vocabulary,
    }


def describe(
    model: Model,
    args: VisionSFTConfig | VisionGRPOConfig,
    micro_batches: Sequence[tuple[int, int, int]],
    longest: int | None,
    world_size: int,
    zero_stage: int = 3,
    gpu_memory: float = 80,
) -> list[str]:
    """
    The estimate as text.

    Args:
        micro_batches (`list[tuple[int, int, int]]`):
            `(rows, prompt tokens, completion tokens)` of a full micro-batch, for each stage.
        longest (`int`, *optional*):
            Tokens of the longest sequence that vLLM has to hold.
        gpu_memory (`float`, *optional*, defaults to `80`):
            Of one GPU, in GB.
    """
    grpo = isinstance(args, VisionGRPOConfig)
    held = states(model, world_size, zero_stage, grpo and args.beta != 0 and not model.adapter)
    passes = [update(model, *batch, args) for batch in micro_batches]
    worst = max(range(len(passes)), key=lambda i: sum(passes[i].values()))
    rows, prompt, completion = micro_batches[worst]
    base = sum(held.values()) + RESERVE
    serving, needs = 0.0, {}
    spread = f"ZeRO-{zero_stage} over {world_size}" if zero_stage else f"a copy on each of {world_size}"
    lines = [
        f"memory of each GPU, estimated, {spread}, in GB of {gpu_memory:g}:",
        f"  always: {_list(held)}, reserve {RESERVE / GB:.1f}",
        f"  update: {_list(passes[worst])} ({rows} x {prompt + completion:,} tokens"
        + (f", stage {worst + 1})" if len(passes) > 1 else ")"),
    ]
    if grpo and args.use_vllm and args.vllm_mode == "colocate":
        serving = args.vllm_gpu_memory_utilization * gpu_memory * GB
        parallel = args.vllm_tensor_parallel_size
        weights = BYTES * model.parameters / parallel
        cache = serving - weights - SERVING
        each = model.cache / min(parallel, model.kv_heads) * (longest or 0)
        fits = f"{max(cache, 0) / each:,.0f}" if each else "?"
        lines.append(
            f"  vLLM: {serving / GB:.1f} = weights {weights / GB:.1f} (over {parallel}), its own {SERVING / GB:.1f}, "
            f"KV cache {cache / GB:.1f} = {fits} sequences of {longest or 0:,} tokens"
        )
        if cache < each:
            lines.append("  warning: no longest sequence fits: raise vllm_gpu_memory_utilization")
        needs["rollout"] = base + serving
    asleep = not serving or args.vllm_enable_sleep_mode
    needs["update"] = base + sum(passes[worst].values()) + (0 if asleep else serving)
    bound = max(needs, key=needs.__getitem__)
    parts = {**held, **(passes[worst] if bound == "update" else {"vLLM": serving})}
    lines.append(
        f"  {', '.join(f'{name} {need / GB:.1f}' for name, need in needs.items())}; the {bound} bounds, its largest "
        f"part: {max(parts, key=parts.__getitem__)}"
    )
    if needs[bound] > gpu_memory * GB:
        lines.append(f"  warning: over {gpu_memory:g} GB; recipes/README.md says what to change, in which order")
    return lines


def _list(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {value / GB:.1f}" for name, value in parts.items() if value)
