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

from trimtab.engine.fused.formats import Adapter, LowRank, Masks, Rows, Want, Weight, draw_masks, quantise_weight
from trimtab.engine.memory import give_back_mapped_pages, own_pages
from trimtab.engine.mixed import Mix, multiply_chunks

# A module of kernels: `plain` or `native`.
Kernels = ModuleType


class Kept(NamedTuple):
    """What the backward of a group's LoRA parts needs."""

    adapters: tuple[Adapter, ...]
    inputs: Tensor
    low_rank: LowRank
    masks: Masks


class _MixedPart(NamedTuple):
    """What each adapter adds to a product's columns `start` to `stop`: x a b, zeros where it has no part there."""

    start: int
    stop: int
    a: Tensor  # [adapters, inputs, rank]
    b: Tensor  # [adapters, rank, stop - start]


class _Mixed(NamedTuple):
    mix: Mix
    parts: list[_MixedPart]


class NotPlainError(Exception):
    """An adapter that is not plain LoRA: peft's own forward has to run."""


class LinearGroup:
    """y = x W^T + b (+ LoRA): the weights [columns, inputs] of several layers on top of each other.

    The layers are the children `names` of `parent`, looked up again whenever adapters change.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str], kernels: Kernels, name: str | None = None) -> None:
        self.parent, self.names, self.kernels = parent, names, kernels
        self.name = name or "+".join(names)  # tells it from the other groups of its layer
        bases = [_base_of(getattr(parent, name)) for name in names]
        if len({base.bias is None for base in bases}) > 1:
            raise AttributeError(f"only some of {', '.join(names)} have a bias")
        self.weight = Weight(tuple(base.weight.detach() for base in bases))
        self.stops = list(accumulate(map(len, self.weight.parts)))
        biases = [base.bias for base in bases]
        self.bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self.adapters: tuple[Adapter, ...] = ()
        self.mixed: _Mixed | None = None

    @property
    def can_quantise(self) -> bool:
        return not any(side % 4 for side in self.weight.shape)

    def quantise(self) -> None:
        """Compute with int8 from now on: the weight has one scale a column of the product, rows one each.

        Raises:
            ValueError: the weight's sides cannot be divided by 4.
        """
        with own_pages():
            self.weight = Weight(self.weight.parts, int8=quantise_weight(self.weight.values))
        give_back_mapped_pages(*self.weight.parts)

    def use_float32(self) -> None:
        if self.weight.int8 is not None:
            self.weight = Weight(self.weight.parts)

    def release(self) -> None:
        """Give back what the weight was laid out in for float32; a forward makes it again."""
        self.weight = self.weight._replace(tiles=None)

    def find_adapters(self) -> None:
        """Read the LoRA parts that peft has put around the layers, as they stand.

        Raises:
            NotPlainError: something else than plain LoRA is around a layer.
        """
        adapters = []
        start = 0
        for name, part, stop in zip(self.names, self.weight.parts, self.stops, strict=True):
            layer = getattr(self.parent, name)
            if _base_of(layer).weight.data_ptr() != part.data_ptr():
                raise NotPlainError  # someone gave the layer another weight
            adapter = _active_adapter_of(layer, start, stop)
            if adapter is not None:
                adapters.append(adapter)
            start = stop
        if len({(adapter.dropout, len(adapter.a)) for adapter in adapters}) > 1:
            raise NotPlainError
        self.adapters = tuple(adapters)

    def mix(self, mix: Mix | None) -> None:
        """Give each token of the next pass its own adapter; None, to go back to the active one.

        Raises:
            NotPlainError: an adapter that is not plain LoRA.
        """
        self.mixed = None
        if mix is None:
            return
        parts = []
        start = 0
        for layer_name, stop in zip(self.names, self.stops, strict=True):
            layer = getattr(self.parent, layer_name)
            found = [_adapter_of(layer, name, start, stop) for name in mix.names]
            if any(found):
                parts.append(_MixedPart(start, stop, *_stack(found)))
            start = stop
        self.mixed = _Mixed(mix, parts) if parts else None

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for adapter in self.adapters for parameter in (adapter.a, adapter.b)]

    @property
    def wants(self) -> Want:
        """Formats of the input that the forward reads."""
        return Want(
            self.weight.int8 is None or bool(self.adapters) or self.mixed is not None, self.weight.int8 is not None
        )

    @property
    def wants_gradient(self) -> Want:
        """Formats of the output's gradient that the backward reads."""
        if self.weight.int8 is None:
            return Want(True, False)
        return Want(bool(self.adapters), True, self.weight.int8.column_scale)

    def forward(self, rows: Rows, addend: Tensor | None = None) -> tuple[Tensor, Kept | None]:
        """The product + addend."""
        if self.weight.int8 is None and self.weight.tiles is None:  # not held beside int8
            with own_pages():
                self.weight = self.weight._replace(tiles=self.kernels.lay_out(self.weight.values))
            if self.weight.tiles is not None:
                give_back_mapped_pages(*self.weight.parts)
        if self.mixed is not None:
            return self._forward_mixed(rows, addend, self.mixed), None
        assert rows.values is not None or not self.adapters
        kept = self._adapt(rows.values) if self.adapters and rows.values is not None else None
        low_rank = None if kept is None else kept.low_rank
        return self.kernels.linear(rows, self.weight, self.bias, low_rank, addend), kept

    def _forward_mixed(self, rows: Rows, addend: Tensor | None, mixed: _Mixed) -> Tensor:
        """The product, to which each token adds what its own adapter says."""
        assert rows.values is not None
        output: Tensor = self.kernels.linear(rows, self.weight, self.bias, None, addend)
        for start, stop, a, b in mixed.parts:
            output[:, start:stop] += multiply_chunks(rows.values, (a, b), mixed.mix)
        return output

    def _adapt(self, values: Tensor) -> Kept:
        masks = draw_masks(self.adapters[0].dropout)
        low_rank = self.kernels.lora_forward(values, self.adapters, self.weight.shape[0], masks)
        return Kept(self.adapters, values, low_rank, masks)

    def backward(
        self, grad: Rows, kept: Kept | None, needs_input: bool = True, addend: Tensor | None = None
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of the input, + addend, and of the adapters' parameters, in `parameters`' order."""
        found: list[Tensor] = []
        if kept is not None:
            adapters, inputs, low_rank, masks = kept
            found, addend = self.kernels.lora_backward(
                inputs, adapters, low_rank, masks, grad.values, needs_input, addend
            )
        return (self.kernels.linear_backward(grad, self.weight, addend) if needs_input else None), found


def _base_of(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _stack(adapters: Sequence[Adapter | None]) -> tuple[Tensor, Tensor]:
    """A^T and B^T of each, with zeros up to the largest rank."""
    known = [adapter for adapter in adapters if adapter is not None]
    rank = max(len(adapter.a) for adapter in known)
    a = known[0].a.new_zeros(len(adapters), rank, known[0].a.shape[1])
    b = known[0].b.new_zeros(len(adapters), len(known[0].b), rank)
    for number, adapter in enumerate(adapters):
        if adapter is not None:
            a[number, : len(adapter.a)] = adapter.a
            b[number, :, : len(adapter.a)] = adapter.b * adapter.scaling
    return a.transpose(1, 2), b.transpose(1, 2)


def _active_adapter_of(layer: Any, start: int, stop: int) -> Adapter | None:
    """The LoRA part of `layer`; None where it has none, or has it switched off."""
    if not isinstance(layer, BaseTunerLayer):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            raise NotPlainError
        return None
    if len(layer.active_adapters) > 1:
        raise NotPlainError
    if not layer.active_adapters or layer.disable_adapters:
        _adapter_of(layer, "", start, stop)
        return None
    return _adapter_of(layer, layer.active_adapters[0], start, stop)


def _adapter_of(layer: Any, name: str, start: int, stop: int) -> Adapter | None:
    """The LoRA part that `layer` has under this name; None where there is none."""
    if not isinstance(layer, BaseTunerLayer):
        return None
    # The copies that the kernels read do not follow a merge.
    if not isinstance(layer, PeftLinear) or name in layer.lora_variant or layer.merged:
        raise NotPlainError
    if name not in layer.lora_A:
        return None
    lora_a, lora_b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if (
        lora_b.bias is not None
        or type(dropout) not in (nn.Dropout, nn.Identity)
        or lora_a.weight.dtype != torch.float32
        or not (lora_a.weight.is_contiguous() and lora_b.weight.is_contiguous())
    ):
        raise NotPlainError
    if any(parameter.requires_grad for parameter in layer.base_layer.parameters()):
        raise NotPlainError
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Adapter(start, stop, lora_a.weight, lora_b.weight, float(layer.scaling[name]), rate)
