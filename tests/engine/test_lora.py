"""Fast LoRA linears against peft's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from trimtab.engine.frozen import freeze_linears
from trimtab.engine.lora import FastLoraLinear, draw_keep_mask, speed_up_lora

IDS = torch.arange(14).view(2, 7)


def make_model(kind: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        base: Any = LlamaModel(LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                           num_key_value_heads=2, intermediate_size=48,
                                           vocab_size=50))  # fmt: skip
        targets = ["q_proj", "v_proj", "down_proj"]
    else:
        base = GPT2Model(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16,
                                    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))  # fmt: skip
        targets = ["c_attn", "c_proj"]
    settings = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "init_lora_weights": False} | settings
    return get_peft_model(base, LoraConfig(target_modules=targets, fan_in_fan_out=kind == "gpt2", **settings))


def output_and_gradients(model: Any) -> list[Tensor]:
    model.zero_grad()
    states = model(input_ids=IDS).last_hidden_state
    (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum().backward()
    return [states, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("frozen", [False, True])
def test_equals_peft(kind: str, frozen: bool) -> None:
    plain = make_model(kind)
    fast = copy.deepcopy(plain)
    if frozen:
        freeze_linears(fast)
    assert speed_up_lora(fast) == len([m for m in plain.modules() if type(m) is PeftLinear]) > 0
    assert_equal(output_and_gradients(fast), output_and_gradients(plain))


def test_equals_peft_given_the_same_dropped_elements() -> None:
    model = make_model(lora_dropout=0.3)
    speed_up_lora(model)
    layer: Any = next(m for m in model.modules() if isinstance(m, FastLoraLinear))
    x = torch.randn(2, 7, 32, requires_grad=True)
    inputs = [x, layer.lora_A.default.weight, layer.lora_B.default.weight]
    state = torch.get_rng_state()
    y = layer(x)
    y_grad = torch.randn_like(y)
    torch.set_rng_state(state)
    assert torch.equal(layer(x), y)
    torch.set_rng_state(state)
    keep, scale = draw_keep_mask(torch.Size((14, 32)), 0.3, x.device)
    assert 0 < int(keep.sum()) < keep.numel()
    dropped = x * keep.view(2, 7, 32) * scale
    change = layer.lora_B.default(layer.lora_A.default(dropped))
    twin = layer.base_layer(x) + change * layer.scaling["default"]
    ours, theirs = torch.autograd.grad(y, inputs, y_grad), torch.autograd.grad(twin, inputs, y_grad)
    for a, b in zip((y, *ours), (twin, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    assert not torch.allclose(layer(x), y)  # another mask
    layer.eval()
    torch.testing.assert_close(layer(x), PeftLinear.forward(layer, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_mask_keeps_at_the_rate_everywhere(dropout: float) -> None:
    torch.manual_seed(1)
    keep, scale = draw_keep_mask(torch.Size((3_999, 101)), dropout, torch.device("cpu"))
    assert set(keep.unique().tolist()) == {0, 1}
    assert scale == pytest.approx(1 / (1 - dropout), rel=1e-4)
    kept = keep.float()
    spread = (dropout * (1 - dropout)) ** 0.5
    # Each place in a 64-bit integer, each column, and neighbours: within 5 standard errors.
    flat = kept.flatten()[: 4 * (kept.numel() // 4)].view(-1, 4)
    assert (flat.mean(0) - (1 - dropout)).abs().max() < 5 * spread / len(flat) ** 0.5
    assert (kept.mean(0) - (1 - dropout)).abs().max() < 5 * spread / len(kept) ** 0.5
    centred = flat - (1 - dropout)
    correlation = (centred.t() @ centred / len(flat) / spread**2 - torch.eye(4)).abs()
    assert correlation.fill_diagonal_(0).max() < 5 / len(flat) ** 0.5


def test_other_layers_go_through_peft() -> None:
    plain = make_model(use_dora=True)
    fast = copy.deepcopy(plain)
    speed_up_lora(fast)
    assert_equal(output_and_gradients(fast), output_and_gradients(plain))


def test_peft_switches_merges_and_saves(tmp_path: Path) -> None:
    plain = make_model()
    fast = copy.deepcopy(plain)
    freeze_linears(fast)
    speed_up_lora(fast)
    with torch.no_grad():
        adapted = fast(input_ids=IDS).last_hidden_state
        with fast.disable_adapter(), plain.disable_adapter():
            base = fast(input_ids=IDS).last_hidden_state
            torch.testing.assert_close(base, plain(input_ids=IDS).last_hidden_state)
        assert (base - adapted).abs().max() > 1e-2
        fast.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(plain.unload()), tmp_path).eval()
        torch.testing.assert_close(loaded(input_ids=IDS).last_hidden_state, adapted, rtol=1e-5, atol=1e-5)
        fast.merge_adapter()
        torch.testing.assert_close(fast(input_ids=IDS).last_hidden_state, adapted, rtol=1e-4, atol=1e-4)
        fast.unmerge_adapter()
        torch.testing.assert_close(fast(input_ids=IDS).last_hidden_state, adapted, rtol=1e-4, atol=1e-4)
