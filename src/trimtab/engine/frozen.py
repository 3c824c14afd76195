"""Frozen linear layers behind one class, so that a number format is chosen in one place.

`freeze_linears` runs after peft has attached its layers: every linear (and GPT-2's `Conv1D`)
whose weight does not train is replaced, inside `base_layer` too. Names and shapes stay, so peft
reads, saves and merges as before. Which layers compute in what is for `lower_precision`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.engine.fused import native
from trimtab.engine.fused.formats import Want, Weight, quantise_weight
from trimtab.engine.memory import give_back_mapped_pages

NumberFormat = Literal["float32", "bfloat16", "float16", "int8"]


class FrozenLinear(nn.Module):
    """y = x W^T + b with a weight that never trains.

    `weight` keeps the layout of the layer it replaces: [out, in] of `nn.Linear`, or [in, out] of
    `Conv1D` (`fan_in_fan_out`). Only the input's gradient is computed, and no input is saved for it.
    In another `number_format` than the weight's own it multiplies a copy of the weight, in both directions.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, fan_in_fan_out: bool) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.fan_in_fan_out = fan_in_fan_out
        self.in_features, self.out_features = weight.shape if fan_in_fan_out else weight.shape[::-1]
        self.number_format: NumberFormat = "float32"
        self._lowered: Weight | Tensor | None = None

    @property
    def by_columns(self) -> Tensor:
        """The weight as [out, in], whichever way it is stored."""
        return self.weight.t() if self.fan_in_fan_out else self.weight

    def can_compute_in(self, number_format: NumberFormat) -> bool:
        if number_format != "int8":
            return True
        on_cpu = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        return on_cpu and native.is_available() and not any(side % 4 for side in self.weight.shape)

    def compute_in(self, number_format: NumberFormat) -> None:
        """Multiply in this format from now on; the weight itself stays as it is."""
        self.number_format = number_format
        self._lowered = None if number_format == "float32" else lower_weight(self.by_columns.detach(), number_format)
        if self._lowered is not None:
            give_back_mapped_pages(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        if self._lowered is None:
            return F.linear(input, self.by_columns, self.bias)
        rows = input.reshape(-1, input.shape[-1])
        result: Tensor = _LoweredProduct.apply(rows, self._lowered, self.bias)  # type: ignore[no-untyped-call]
        return result.view(*input.shape[:-1], -1)  # out here, since AdaLoRA adds to it in place

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def lower_weight(values: Tensor, number_format: NumberFormat) -> Weight | Tensor:
    """A weight [out, in] as products in `number_format` read it."""
    if number_format == "int8":
        return Weight((values,), int8=quantise_weight(values))
    return values.to(getattr(torch, number_format))


def multiply(rows: Tensor, weight: Weight | Tensor, bias: Tensor | None) -> Tensor:
    """rows [tokens, in] W^T + bias in the weight's format, as float32."""
    if isinstance(weight, Weight):
        return native.linear(native.rows_of(rows.contiguous(), Want(False, True)), weight, bias)
    output = (rows.to(weight.dtype) @ weight.t()).to(rows.dtype)
    return output if bias is None else output.add_(bias)


def multiply_backward(grad: Tensor, weight: Weight | Tensor) -> Tensor:
    """The rows' gradient, from that of the product [tokens, out]."""
    if isinstance(weight, Weight):
        assert weight.int8 is not None
        return native.linear_backward(
            native.rows_of(grad.contiguous(), Want(False, True, weight.int8.column_scale)), weight
        )
    return (grad.to(weight.dtype) @ weight).to(grad.dtype)


class _LoweredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Weight | Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return multiply(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return multiply_backward(grad, ctx.weight), None, None


def _is_frozen(layer: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def freeze_linears(model: nn.Module) -> int:
    """Replace every frozen linear of `model` in place; returns how many."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from transformers.pytorch_utils import Conv1D

    replaced = 0
    for parent in list(model.modules()):
        if isinstance(parent, TrainableTokensLayer):  # a head tied to trained embeddings: peft asks for its very class
            continue
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, Conv1D) and _is_frozen(child):
                layer: Any = child
                setattr(parent, name, FrozenLinear(layer.weight, layer.bias, type(child) is Conv1D))
                replaced += 1
    return replaced


def thaw_linears(model: nn.Module) -> None:
    """Give `model` its stock linears back, with the same weights: peft puts adapters around no others."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is FrozenLinear:
                with torch.device("meta"):
                    stock: Any = (
                        Conv1D(child.out_features, child.in_features)
                        if child.fan_in_fan_out
                        else nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                    )
                stock.weight, stock.bias = child.weight, child.bias
                setattr(parent, name, stock)


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
