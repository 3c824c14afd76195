"""Frozen layers: the same outputs and gradients as the layers they replace, and peft none the wiser."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from trimtab.engine.frozen import FrozenLinear, freeze_linears, set_adapter_training
from trimtab.methods import METHODS, attach_adapter
from trimtab.study_config import build_study


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Linear(6, 4, bias=False), Conv1D(4, 6)])
def test_outputs_and_input_gradients(layer):
    layer.requires_grad_(False)
    frozen = nn.Sequential(layer)
    freeze_linears(frozen)
    assert isinstance(frozen[0], FrozenLinear)
    plain, ours = torch.randn(5, 6).requires_grad_(), None
    ours = plain.detach().clone().requires_grad_()
    layer(plain).sin().sum().backward()
    frozen(ours).sin().sum().backward()
    torch.testing.assert_close(layer(plain), frozen(ours))
    torch.testing.assert_close(plain.grad, ours.grad)


def test_a_layer_that_trains_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert freeze_linears(model) == 1
    assert type(model[0]) is nn.Linear


IN_LAYERS = [name for name, method in METHODS.items() if method.places != "none" and name != "pissa"]
ON_CONV1D = ["lora", "rslora", "dora", "adalora", "ia3", "vera", "fourierft", "randlora", "vblora"]


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family in ("bert", "llama") for method in IN_LAYERS]
    + [("gpt2", method) for method in ON_CONV1D],
)
def test_every_method_saves_merges_and_computes_as_before(tiny_model, family, method):
    from peft import get_peft_model_state_dict

    plain = attach_adapter(tiny_model(family), build_study({"method": method, "lora_dropout": 0.0}), [])
    frozen = attach_adapter(tiny_model(family), build_study({"method": method, "lora_dropout": 0.0}), [])
    weights = {n: p + torch.randn(p.shape) * 0.02 for n, p in plain.named_parameters() if p.requires_grad}
    for model in (plain, frozen):
        model.load_state_dict(weights, strict=False)
    assert freeze_linears(frozen) > 0
    ids = torch.randint(5, 100, (2, 9))
    for training in (True, False):
        set_adapter_training(frozen, training)
        set_adapter_training(plain, training)
        torch.testing.assert_close(frozen(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
    for model in (plain, frozen):
        model(ids).logits.square().sum().backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in frozen.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)
    assert get_peft_model_state_dict(frozen).keys() == get_peft_model_state_dict(plain).keys()
    before = frozen(ids).logits
    torch.testing.assert_close(frozen.merge_and_unload()(ids).logits, before, atol=1e-4, rtol=1e-4)


def test_only_the_adapters_dropout_is_on(tiny_model):
    model = attach_adapter(tiny_model("bert"), build_study({"lora_dropout": 0.5}), [])
    set_adapter_training(model, True)
    active = [name for name, layer in model.named_modules() if isinstance(layer, nn.Dropout) and layer.training]
    assert active
    assert all("lora_dropout" in name for name in active)
    set_adapter_training(model, False)
    assert not any(layer.training for layer in model.modules())
