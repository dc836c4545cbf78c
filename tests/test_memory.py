"""The estimate of memory is held against what the tiny model really allocates."""

import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache
from trl import ModelConfig

from vision_r1_recipes import memory
from vision_r1_recipes.preflight import KNOWN_MODELS


@pytest.fixture(scope="module")
def config(toy):
    return AutoConfig.from_pretrained(toy / "model")


@pytest.fixture(scope="module")
def model(toy):
    return AutoModelForImageTextToText.from_pretrained(toy / "model", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "name, billions", [("3B", 3.754622976), ("7B", 8.292166656), ("32B", 33.452718336), ("72B", 73.410777344)]
)
def test_parameters_are_those_of_the_released_models(name, billions):
    config = AutoConfig.from_pretrained(KNOWN_MODELS / f"Qwen2.5-VL-{name}-Instruct")
    assert memory.Model.of(config, ModelConfig(), False).parameters == round(billions * 1e9)


def test_what_is_trained(config, model):
    everything = sum(p.numel() for p in model.parameters())
    vision = sum(p.numel() for p in model.model.visual.parameters())
    assert memory.Model.of(config, ModelConfig(), False).trained == everything
    assert memory.Model.of(config, ModelConfig(), True).trained == everything - vision


def test_an_adapter(config, toy):
    from peft import get_peft_model

    from vision_r1_recipes.trainers import lora_config

    arguments = ModelConfig(model_name_or_path=str(toy / "model"), use_peft=True, lora_r=8)
    adapted = get_peft_model(AutoModelForImageTextToText.from_pretrained(toy / "model"), lora_config(arguments))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert memory.Model.of(config, arguments, False).trained == trained


def test_weights_gradients_optimizer(config, model):
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    moments = sum(
        v.nbytes for state in optimizer.state.values() for k, v in state.items() if k in ("exp_avg", "exp_avg_sq")
    )
    held = memory.states(memory.Model.of(config, ModelConfig(), False), 1, 0, reference=True)
    weights = sum(p.nbytes for p in model.parameters())
    assert held == {
        **{"weights": weights, "gradients": weights, "optimizer": moments, "reference": weights, "gathered": 0.0}
    }
    model.zero_grad()


def test_states_are_shared_out(config):
    counts = memory.Model.of(config, ModelConfig(), False)
    whole = memory.states(counts, 1, 3, reference=True)
    for stage, shared in enumerate([(), ("optimizer",), ("optimizer", "gradients"), tuple(whole)]):
        if stage:
            held = memory.states(counts, 4, stage, reference=True)
            for name in ("weights", "gradients", "optimizer", "reference"):
                assert held[name] == whole[name] / (4 if name in shared else 1), (stage, name)


def test_cache(config, model):
    cache = DynamicCache(config=config.get_text_config())
    with torch.no_grad():
        model(input_ids=torch.arange(50)[None], past_key_values=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.Model.of(config, ModelConfig(), False).cache * 50 == held


def test_activations(config, model):
    """Of one decoder layer: what autograd keeps for the backward pass."""
    language, text, tokens = model.model.language_model, config.get_text_config(), 256
    weights = {p.data_ptr() for p in language.layers[0].parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    states = torch.randn(1, tokens, text.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = language.rotary_emb(states, torch.arange(tokens)[None, None].expand(3, 1, tokens))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = language.layers[0](states, attention_mask=None, position_embeddings=positions)
    assert out is not None
    counts = memory.Model.of(config, ModelConfig(), False)
    without = SimpleNamespace(gradient_checkpointing=False)
    estimate = memory.update(counts, 1, 0, tokens, without)["activations"] / counts.layers
    assert sum(kept.values()) == pytest.approx(estimate, rel=0.35)


def test_gpus_beyond_the_kv_heads_hold_copies(config):
    args = SimpleNamespace(
        **{"use_vllm": True, "vllm_mode": "colocate", "vllm_enable_sleep_mode": True, "beta": 0.0},
        **{"gradient_checkpointing": True, "vllm_gpu_memory_utilization": 0.5},
    )
    fits, counts = [], memory.Model.of(config, ModelConfig(), False)
    for parallel in (1, 2, 4):  # the toy has 2 KV heads
        args.vllm_tensor_parallel_size = parallel
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "VisionGRPOConfig", SimpleNamespace)
            text = "\n".join(memory.describe(counts, args, [(1, 8, 8)], 1_000_000, 8))
        fits.append(int(re.search(r"= ([\d,]+) sequences", text)[1].replace(",", "")))
    assert fits[1] == pytest.approx(2 * fits[0], abs=2) and fits[2] == pytest.approx(fits[1], abs=2)
