"""Which frozen linears outside of fused layers compute in a lower precision: those whose error stays within bounds.

Any build and any method that calls its base layers is served; fused layers have their own (`fused.precision`).
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engine.frozen import FrozenLinear, NumberFormat, lower_weight, multiply, multiply_backward
from trimtab.engine.fused.formats import Weight
from trimtab.engine.fused.precision import MEASURED_ROWS, GroupError, cosine

# Rows and repetitions with which a format is held against float32.
_TIMED_TOKENS = 512
_TIMED_RUNS = 5

# A numbered layer's own linears; peft's wrapper is no part of their names.
_IN_LAYER = re.compile(r"\.(\d+)\.(.+?)(\.base_layer)?$")


def lower_linears(model: nn.Module, number_format: NumberFormat, run: Callable[[], None]) -> list[GroupError]:
    """Let every frozen linear of `model` compute in `number_format` whose error in one pass stays within bounds.

    Returns all errors, of those linears that the pass called.

    Args:
        run: one forward, and one backward where it trains, on a batch of real rows.
    """
    places = {place: layer for place, layer in linears_by_place(model).items() if layer.can_compute_in(number_format)}
    seen: dict[tuple[int, str], list[Tensor]] = {}
    handles = [layer.register_forward_hook(_record(seen, place)) for place, layer in places.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    errors = []
    for (number, name), (inputs, *gradient) in seen.items():
        layer = places[number, name]
        lowered, exact = lower_weight(layer.by_columns.detach(), number_format), layer.by_columns
        output = cosine(multiply(inputs, lowered, None), inputs @ exact.t())
        by_input = cosine(multiply_backward(gradient[0], lowered), gradient[0] @ exact) if gradient else None
        errors.append(GroupError(number, name, output, by_input))
        if errors[-1].is_within_bounds:
            layer.compute_in(number_format)
    return errors


def linears_by_place(model: nn.Module) -> dict[tuple[int, str], FrozenLinear]:
    """The frozen linears of numbered layers, by the layer's number and the name within it.

    A decoder that answers an encoder has layers of the same numbers, so its names say whose they are.
    """
    has_two_stacks = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    found = {}
    for name, module in model.named_modules():
        match = _IN_LAYER.search(name)
        if match and isinstance(module, FrozenLinear):
            stack = "decoder." if has_two_stacks and "decoder." in name[: match.start()] + "." else ""
            found[int(match[1]), stack + match[2]] = module
    return found


def _record(seen: dict[tuple[int, str], list[Tensor]], place: tuple[int, str]) -> Callable[..., None]:
    def keep_gradient(grad: Tensor) -> None:
        seen[place].append(grad.reshape(-1, grad.shape[-1])[:MEASURED_ROWS].clone())

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows = inputs[0].detach()
        seen[place] = [rows.reshape(-1, rows.shape[-1])[:MEASURED_ROWS].clone()]
        if output.requires_grad:
            output.register_hook(keep_gradient)  # type: ignore[no-untyped-call]

    return hook


def measure_gain(model: nn.Module, number_format: NumberFormat) -> float:
    """How many times as fast the first layer's linears multiply in `number_format` as in float32, rounding included."""
    generator = torch.Generator().manual_seed(0)
    plain = lowered = 0.0
    for weight in _first_layer(model):
        if number_format == "int8" and any(side % 4 for side in weight.shape):
            continue
        rows = torch.randn(_TIMED_TOKENS, weight.shape[1], generator=generator).to(weight.device)
        plain += _seconds(rows, weight)
        lowered += _seconds(rows, lower_weight(weight, number_format))
    return plain / lowered if lowered else 0.0


def _first_layer(model: nn.Module) -> Iterator[Tensor]:
    """The weights [out, in] of the linears in the layer of the lowest number."""
    from transformers.pytorch_utils import Conv1D

    found: dict[int, list[Tensor]] = {}
    for name, module in model.named_modules():
        if (match := _IN_LAYER.search(name)) and isinstance(module, (nn.Linear, Conv1D, FrozenLinear)):
            weight = module.weight.detach()
            is_transposed = isinstance(module, Conv1D) or getattr(module, "fan_in_fan_out", False)
            found.setdefault(int(match[1]), []).append(weight.t() if is_transposed else weight)
    yield from found[min(found)] if found else ()


def _seconds(rows: Tensor, weight: Weight | Tensor) -> float:
    """Of one product: the median after one run to warm up."""
    seconds: list[float] = []
    for _ in range(1 + _TIMED_RUNS):
        started = time.perf_counter()
        multiply(rows, weight, None)
        if rows.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
