"""Frozen linear layers behind one class, so that a precision is chosen in one place.

`freeze_linears` runs after peft has attached its layers: every linear (and GPT-2's `Conv1D`)
whose weight does not train is replaced, inside `base_layer` too. Names and shapes stay, so peft
reads, saves and merges as before.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class FrozenLinear(nn.Module):
    """y = x W^T + b with a weight that never trains.

    `weight` keeps the layout of the layer it replaces: [out, in] of `nn.Linear`, or [in, out] of
    `Conv1D` (`fan_in_fan_out`). Only the input's gradient is computed, and no input is saved for it.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, fan_in_fan_out: bool) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.fan_in_fan_out = fan_in_fan_out
        self.in_features, self.out_features = weight.shape if fan_in_fan_out else weight.shape[::-1]

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.t() if self.fan_in_fan_out else self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _is_frozen(layer: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def freeze_linears(model: nn.Module) -> int:
    """Replace every frozen linear of `model` in place; returns how many."""
    from transformers.pytorch_utils import Conv1D

    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, Conv1D) and _is_frozen(child):
                layer: Any = child
                setattr(parent, name, FrozenLinear(layer.weight, layer.bias, type(child) is Conv1D))
                replaced += 1
    return replaced


def set_adapter_training(model: nn.Module, training: bool) -> None:
    """Switch the adapters' own dropout; the frozen base and the head stay in eval mode.

    A base without dropout is faster and its activations repeat, so they can be cached.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.eval()
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = training  # what transformers asks; the layer's own parts stay in eval mode
        if isinstance(layer, BaseTunerLayer):
            layer.training = training
            for name, child in layer.named_children():
                if name != "base_layer":
                    child.train(training)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
