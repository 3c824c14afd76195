"""How fast this machine runs frozen layers: their products, forward and backward, and what is between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.engine.fused import native
from trimtab.engine.fused.formats import Want, Weight, quantise_weight
from trimtab.machine import median_seconds
from trimtab.models import keep_float32_products

# torch's own product; those of fused layers in their two formats; bitsandbytes' layers.
Product = Literal["stock", "float32", "int8", "8bit", "4bit"]
# Tokens of a batch, and sides of the layer's weight.
_TOKENS, _INNER, _OUTER = 512, 576, 1536
# Buffers that values go through one after the other, more than caches hold.
_BUFFERS = 32

# A forward and its backward: what enters [tokens, inner] and the gradient [tokens, outer] -> output, input gradient.
Pass = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def measure_rate(product: Product) -> float:
    """GFLOP/s, a multiply-add counted as two, over a product and its gradient."""
    run = build_pass(product, torch.randn(_OUTER, _INNER))
    values, grad = torch.randn(_TOKENS, _INNER), torch.randn(_TOKENS, _OUTER)
    return 4 * _TOKENS * _INNER * _OUTER / median_seconds(partial(run, values, grad)) / 1e9


def measure_elementwise_seconds() -> float:
    """Of one value through a sigmoid, read from memory and written there."""
    values, results = (torch.randn(_BUFFERS, _TOKENS, _OUTER) for _ in range(2))

    def run() -> None:
        for source, target in zip(values, results, strict=True):
            torch.sigmoid(source, out=target)

    return median_seconds(run) / values.numel()


def build_pass(product: Product, weight: Tensor) -> Pass:
    """Through a layer of `weight` [outer, inner]; torch's own where a product of ours has no kernels here."""
    if product in ("8bit", "4bit"):
        return partial(_through_layer, _quantised_layer(weight, product))
    if product == "int8" and native.has_int8():
        return _through_kernels(Weight((weight,), int8=quantise_weight(weight)), rounded=True)
    if product == "float32" and native.is_available():
        return _through_kernels(Weight((weight,), tiles=native.lay_out(weight)), rounded=False)
    return lambda values, grad: (values @ weight.t(), grad @ weight)


def _through_kernels(weight: Weight, *, rounded: bool) -> Pass:
    scale = weight.int8.column_scale if weight.int8 else None

    def run(values: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows = native.rows_of(values, Want(not rounded, rounded))
        return native.linear(rows, weight), native.linear_backward(
            native.rows_of(grad, Want(not rounded, rounded, scale)), weight
        )

    return run


def _quantised_layer(weight: Tensor, product: Product) -> nn.Module:
    quantised: Any = import_module("bitsandbytes.nn")
    outer, inner = weight.shape
    if product == "8bit":
        layer = quantised.Linear8bitLt(inner, outer, bias=False, has_fp16_weights=False)
        layer.weight = quantised.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = quantised.Linear4bit(inner, outer, bias=False, compute_dtype=torch.float32)
        layer.weight = quantised.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer.to("cpu")
    keep_float32_products(layer)
    evaluated: nn.Module = layer.eval()
    return evaluated


def _through_layer(layer: nn.Module, values: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    values = values.detach().requires_grad_()
    output = layer(values)
    (gradient,) = torch.autograd.grad(output, values, grad)
    return output.detach(), gradient
