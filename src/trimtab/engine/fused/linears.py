"""Frozen linears that read one input, computed as one product, with their LoRA parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from trimtab.engine.fused.formats import Product, Rows, Want

# A module of kernels: `plain` or `native`.
Kernels = ModuleType


class Adapter(NamedTuple):
    """The LoRA part of the columns `start` to `stop` of a group."""

    start: int
    stop: int
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scaling: float
    dropout: float


class Kept(NamedTuple):
    """What the backward of a group's LoRA parts needs."""

    inputs: Tensor
    small: Tensor
    keep: Tensor | None
    scale: float  # of the masks
    lora_a: Tensor
    lora_b: Tensor  # with both scales applied


class InputGradient(NamedTuple):
    """Gradient of a group's input: the product, and what comes back through dropout masks."""

    product: Product
    dropped: Tensor | None
    keep: Tensor | None


class NotPlainError(Exception):
    """An adapter that is not plain LoRA: peft's own forward has to run."""


class LinearGroup:
    """y = x W^T + b (+ LoRA): the weights [columns, inputs] of several layers on top of each other.

    The layers are the children `names` of `parent`, looked up again whenever adapters change. Their
    own weights become views of the group's, so nothing is held twice.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        self.parent, self.names = parent, names
        bases = [_base_of(getattr(parent, name)) for name in names]
        weights = [base.weight.detach() for base in bases]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.stops = list(accumulate(map(len, weights)))
        if len(bases) > 1:
            for base, part in zip(bases, self.weight.split(list(map(len, weights))), strict=True):
                base.weight = nn.Parameter(part, requires_grad=False)
        biases = [base.bias for base in bases]
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self.quantised: Tensor | None = None
        self.column_scale: Tensor | None = None
        self.adapters: list[Adapter] = []

    def quantise(self) -> None:
        """Also hold the weight as int8, with one scale a column of the product."""
        scale = self.weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127.0
        self.quantised = (self.weight / scale).round_().to(torch.int8)
        self.column_scale = scale.squeeze(1)

    def find_adapters(self) -> None:
        """Read the LoRA parts that peft has put around the layers, as they stand.

        Raises:
            NotPlainError: something else than plain LoRA is around a layer.
        """
        self.adapters = []
        start = 0
        for name, stop in zip(self.names, self.stops, strict=True):
            adapter = _adapter_of(getattr(self.parent, name), start, stop)
            if adapter is not None:
                self.adapters.append(adapter)
            start = stop
        if len({adapter.dropout for adapter in self.adapters}) > 1:
            raise NotPlainError

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for adapter in self.adapters for parameter in (adapter.lora_a, adapter.lora_b)]

    @property
    def wants(self) -> Want:
        """Formats of the input that the forward reads."""
        return Want(self.quantised is None or bool(self.adapters), self.quantised is not None)

    @property
    def wants_gradient(self) -> Want:
        """Formats of the output's gradient that the backward reads."""
        return Want(self.quantised is None or bool(self.adapters), self.quantised is not None, self.column_scale)

    def forward(self, rows: Rows, kernels: Kernels) -> tuple[Product, Kept | None]:
        kept = self._adapt(rows.values, kernels) if self.adapters and rows.values is not None else None
        if self.quantised is None:
            assert rows.values is not None
            values = rows.values @ self.weight.t()
            if kept is not None:
                values.addmm_(kept.small, kept.lora_b)
            return Product(values, bias=self.bias), kept
        assert rows.quantised is not None
        values = torch._int_mm(rows.quantised, self.quantised.t())
        delta = None if kept is None else kept.small @ kept.lora_b
        return Product(values, rows.scale, self.column_scale, self.bias, delta), kept

    def _adapt(self, values: Tensor, kernels: Kernels) -> Kept:
        """Every adapter's inner product at once: A as a block diagonal matrix where masks differ."""
        keep, scale = None, 1.0
        if self.adapters[0].dropout > 0:
            keep, scale = kernels.keep_mask(
                (len(values), len(self.adapters), values.shape[1]), self.adapters[0].dropout
            )
        parts = [adapter.lora_a.detach() for adapter in self.adapters]
        lora_a = torch.cat(parts) if keep is None else torch.block_diag(*parts)  # type: ignore[no-untyped-call]
        lora_b = values.new_zeros(lora_a.shape[0], len(self.weight))
        row = 0
        for adapter in self.adapters:
            rank = adapter.lora_a.shape[0]
            torch.mul(adapter.lora_b.detach().t(), adapter.scaling * scale,
                      out=lora_b[row : row + rank, adapter.start : adapter.stop])  # fmt: skip
            row += rank
        inputs = values if keep is None else kernels.drop(values, keep)
        return Kept(inputs, inputs @ lora_a.t(), keep, scale, lora_a, lora_b)

    def backward(self, grad: Rows, kept: Kept | None, needs_input: bool) -> tuple[InputGradient | None, list[Tensor]]:
        """Gradients of the input and of the adapters' parameters, in `parameters`' order."""
        found: list[Tensor] = []
        small = None
        if kept is not None:
            assert grad.values is not None
            small = grad.values @ kept.lora_b.t()
            found = self._adapter_gradients(grad.values, kept, small)
        if not needs_input:
            return None, found
        if self.quantised is None:
            assert grad.values is not None
            product = Product(grad.values @ self.weight)
        else:
            assert grad.quantised is not None
            product = Product(torch._int_mm(grad.quantised, self.quantised), grad.scale)
        if kept is None or small is None:
            return InputGradient(product, None, None), found
        back = small @ kept.lora_a
        if kept.keep is None:
            return InputGradient(product._replace(delta=back), None, None), found
        return InputGradient(product, back, kept.keep), found

    def _adapter_gradients(self, grad: Tensor, kept: Kept, small: Tensor) -> list[Tensor]:
        by_a = small.t() @ kept.inputs
        by_b = kept.small.t() @ grad
        found = []
        row = 0
        for number, adapter in enumerate(self.adapters):
            rank, width = adapter.lora_a.shape
            column = 0 if kept.keep is None else number * width
            found.append(by_a[row : row + rank, column : column + width])
            found.append(by_b[row : row + rank, adapter.start : adapter.stop].t() * (adapter.scaling * kept.scale))
            row += rank
        return found


def _base_of(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _adapter_of(layer: Any, start: int, stop: int) -> Adapter | None:
    """The LoRA part of `layer`; None where it has none, or has it switched off or merged."""
    if not isinstance(layer, BaseTunerLayer):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            raise NotPlainError
        return None
    if not isinstance(layer, PeftLinear) or layer.lora_variant or len(layer.active_adapters) > 1:
        raise NotPlainError
    if layer.disable_adapters or layer.merged or not layer.active_adapters:
        return None
    name = layer.active_adapters[0]
    if name not in layer.lora_A:
        return None
    lora_a, lora_b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if (
        lora_b.bias is not None
        or type(dropout) not in (nn.Dropout, nn.Identity)
        or lora_a.weight.dtype != torch.float32
    ):
        raise NotPlainError
    if any(parameter.requires_grad for parameter in layer.base_layer.parameters()):
        raise NotPlainError
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Adapter(start, stop, lora_a.weight, lora_b.weight, float(layer.scaling[name]), rate)
