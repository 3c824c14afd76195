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

from trimtab.engine.fused.formats import Masks, Product, Rows, Want, draw_masks

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

    adapters: tuple[Adapter, ...]
    inputs: Tensor
    small: Tensor
    masks: Masks
    lora_a: Tensor
    lora_b: Tensor  # with all scales applied


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
        if len({base.bias is None for base in bases}) > 1:
            raise AttributeError(f"only some of {', '.join(names)} have a bias")
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
        self.adapters: tuple[Adapter, ...] = ()

    @property
    def name(self) -> str:
        return "+".join(self.names)

    def quantise(self) -> None:
        """Compute with int8 from now on: the weight has one scale a column of the product, rows one each.

        The one copy serves both directions: the input's gradient folds the scales into its rows.
        """
        scale = self.weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127.0
        self.quantised = (self.weight / scale).round_().to(torch.int8)
        self.column_scale = scale.squeeze(1)

    def use_float32(self) -> None:
        self.quantised = self.column_scale = None

    def find_adapters(self) -> None:
        """Read the LoRA parts that peft has put around the layers, as they stand.

        Raises:
            NotPlainError: something else than plain LoRA is around a layer.
        """
        adapters = []
        start = 0
        for name, stop in zip(self.names, self.stops, strict=True):
            layer = getattr(self.parent, name)
            if _base_of(layer).weight.data_ptr() != self.weight[start:].data_ptr():
                raise NotPlainError  # someone gave the layer another weight
            adapter = _adapter_of(layer, start, stop, self.quantised is not None)
            if adapter is not None:
                adapters.append(adapter)
            start = stop
        if len({(adapter.dropout, len(adapter.lora_a)) for adapter in adapters}) > 1:
            raise NotPlainError
        self.adapters = tuple(adapters)

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
        """Every adapter's inner product, and B as a matrix over all columns of the group."""
        masks = draw_masks(self.adapters[0].dropout)
        lora_a = torch.cat([adapter.lora_a.detach() for adapter in self.adapters])
        lora_b = values.new_zeros(len(lora_a), len(self.weight))
        for part, adapter in zip(lora_b.view(len(self.adapters), -1, len(self.weight)), self.adapters, strict=True):
            torch.mul(
                adapter.lora_b.detach().t(), adapter.scaling * masks.scale, out=part[:, adapter.start : adapter.stop]
            )
        return Kept(
            self.adapters,
            values,
            kernels.lora_forward(values, lora_a, len(self.adapters), masks),
            masks,
            lora_a,
            lora_b,
        )

    def backward(
        self, grad: Rows, kept: Kept | None, needs_input: bool, kernels: Kernels
    ) -> tuple[Product | None, list[Tensor]]:
        """Gradients of the input and of the adapters' parameters, in `parameters`' order."""
        found: list[Tensor] = []
        delta = None
        if kept is not None:
            assert grad.values is not None
            by_small = grad.values @ kept.lora_b.t()
            by_a, delta = kernels.lora_backward(
                kept.inputs, kept.lora_a, len(kept.adapters), by_small, kept.masks, needs_input
            )
            found = _by_adapter(kept, by_a, kept.small.t() @ grad.values)
        if not needs_input:
            return None, found
        if self.quantised is None:
            assert grad.values is not None
            return Product(grad.values @ self.weight, delta=delta), found
        assert grad.quantised is not None
        return Product(torch._int_mm(grad.quantised, self.quantised), grad.scale, delta=delta), found


def _by_adapter(kept: Kept, by_a: Tensor, by_b: Tensor) -> list[Tensor]:
    """Each adapter's A and B from the gradients of all."""
    count = len(kept.adapters)
    found = []
    for adapter, a, b in zip(kept.adapters, by_a.chunk(count), by_b.chunk(count), strict=True):
        found += [a, b[:, adapter.start : adapter.stop].t() * (adapter.scaling * kept.masks.scale)]
    return found


def _base_of(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _adapter_of(layer: Any, start: int, stop: int, quantised: bool) -> Adapter | None:
    """The LoRA part of `layer`; None where it has none, or has it switched off or merged."""
    if not isinstance(layer, BaseTunerLayer):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            raise NotPlainError
        return None
    if not isinstance(layer, PeftLinear) or layer.lora_variant or len(layer.active_adapters) > 1:
        raise NotPlainError
    if layer.merged and quantised:  # the int8 copy does not follow a merge
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
