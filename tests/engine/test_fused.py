"""Fused frozen parts against transformers' own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GemmaConfig, GemmaModel, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from trimtab.engine.frozen import freeze_linears
from trimtab.engine.fused import FastRMSNorm, FastSwiGLU, speed_up_frozen_layers

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "vocab_size": 50, "num_key_value_heads": 2,
                         "intermediate_size": 48, "head_dim": 8}  # fmt: skip


def make_model(base: Any, targets: list[str]) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    freeze_linears(model)
    return model.eval()


def output_and_gradients(model: Any) -> list[Tensor]:
    """Of the states, the embedded tokens and every adapter weight."""
    model.zero_grad()
    embedded = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    states = model(inputs_embeds=embedded).last_hidden_state
    (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum().backward()
    assert embedded.grad is not None
    return [states, embedded.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def compare(base: Any, targets: list[str]) -> dict[str, int]:
    plain = make_model(base, targets)
    fast = copy.deepcopy(plain)
    changed = speed_up_frozen_layers(fast)
    ours, theirs = output_and_gradients(fast), output_and_gradients(plain)
    assert len(ours) == len(theirs) > 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    assert sum(speed_up_frozen_layers(fast).values()) == 0  # once is enough
    return changed


def test_llama_equals_stock() -> None:
    assert compare(LlamaModel(LlamaConfig(**SIZES)), ["q_proj", "down_proj"]) == {"rms_norm": 5, "swiglu": 2}


def test_qwen3_norms_of_heads_equal_stock() -> None:
    assert compare(Qwen3Model(Qwen3Config(**SIZES)), ["q_proj"]) == {"rms_norm": 9, "swiglu": 2}


def test_an_adapted_gate_stays() -> None:
    assert compare(LlamaModel(LlamaConfig(**SIZES)), ["q_proj", "gate_proj"])["swiglu"] == 0


def test_other_activations_and_norms_stay() -> None:
    assert compare(LlamaModel(LlamaConfig(**SIZES, hidden_act="gelu")), ["q_proj"])["swiglu"] == 0
    # Gemma scales by 1 + weight.
    assert compare(GemmaModel(GemmaConfig(**SIZES)), ["q_proj"]) == {"rms_norm": 0, "swiglu": 0}


def test_norms_that_train_stay() -> None:
    model = LlamaModel(LlamaConfig(**SIZES))
    assert speed_up_frozen_layers(model) == {"rms_norm": 0, "swiglu": 0}
    model.requires_grad_(False)
    freeze_linears(model)
    assert speed_up_frozen_layers(model) == {"rms_norm": 5, "swiglu": 2}
    assert isinstance(model.norm, FastRMSNorm)
    assert isinstance(model.layers[0].mlp, FastSwiGLU)
    assert type(model.norm).__name__ == "LlamaRMSNorm"
