"""The plain twins of `kernels.cpp`, in torch: the reference that tests hold the kernels against.

Each stands for one pass over memory between two matrix products. `native` has the same functions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.engine.fused.attention import attention_backward as attention_backward
from trimtab.engine.fused.attention import attention_forward as attention_forward
from trimtab.engine.fused.formats import HeadShape, Masks, Product, Rotary, Rows, Want


def _value_of(product: Product) -> Tensor:
    values = product.values
    if product.row_scale is not None:
        values = values.float() * product.row_scale
        if product.column_scale is not None:
            values = values * product.column_scale
    if product.bias is not None:
        values = values + product.bias
    return values if product.delta is None else values + product.delta


def _rows(values: Tensor, want: Want) -> Rows:
    """Symmetric int8 with one scale a row, the rounding of LLM.int8() (Dettmers et al. 2022, section 2.1)."""
    if not want.quantised:
        return Rows(values)
    scaled = values if want.column_scale is None else values * want.column_scale
    largest = scaled.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    quantised = (scaled * (127.0 / largest)).round().to(torch.int8)
    return Rows(values if want.values else None, quantised, largest * (1.0 / 127.0))


def rows_of(values: Tensor, want: Want) -> Rows:
    return _rows(values, want)


def lora_forward(values: Tensor, lora_a: Tensor, adapters: int, masks: Masks) -> Tensor:
    """[tokens, adapters x rank]: dropout(values) A^T, each adapter with a mask of its own, not scaled.

    `lora_a` is [adapters x rank, columns].
    """
    masked = values.unsqueeze(1) * _keep(len(values), adapters, values.shape[1], masks)
    return torch.einsum("tmi,mri->tmr", masked, lora_a.view(adapters, -1, values.shape[1])).flatten(1)


def lora_backward(
    values: Tensor, lora_a: Tensor, adapters: int, by_small: Tensor, masks: Masks, needs_input: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `lora_a` and, where needed, of `values`."""
    keep = _keep(len(values), adapters, values.shape[1], masks)
    grad = by_small.view(len(values), adapters, -1)
    by_a = torch.einsum("tmr,tmi->mri", grad, values.unsqueeze(1) * keep).flatten(0, 1)
    if not needs_input:
        return by_a, None
    return by_a, (torch.einsum("tmr,mri->tmi", grad, lora_a.view(adapters, -1, values.shape[1])) * keep).sum(1)


def _keep(tokens: int, adapters: int, columns: int, masks: Masks) -> Tensor:
    """[tokens, adapters, columns] of ones and zeros, by the hash of the compiled kernels."""
    start = _hash(torch.arange(tokens * adapters) + masks.seed)
    bits = _hash(start.view(tokens, adapters, 1) + torch.arange(columns))
    return ((bits & 0xFFFF) >= masks.dropped).float()


def _hash(x: Tensor) -> Tensor:
    """The 32-bit finaliser of MurmurHash3 (Appleby 2011), in 64-bit integers."""
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


def add_product(residual: Tensor | None, product: Product) -> Tensor:
    values = _value_of(product)
    return values if residual is None else values + residual


def add_rms_norm(
    residual: Tensor, product: Product | None, weight: Tensor, eps: float, want: Want
) -> tuple[Tensor, Tensor, Rows]:
    """residual + product, 1 / its root mean square [tokens, 1], and the normed rows."""
    total = residual if product is None else residual + _value_of(product)
    inverse = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return total, inverse, _rows(total * inverse * weight, want)


def rms_norm_backward(
    grad_residual: Tensor,
    grad: Product,
    total: Tensor,
    inverse: Tensor,
    weight: Tensor,
    want: Want,
) -> Rows:
    """Gradient of `total` from that of the normed rows and of the residual."""
    normed = total * inverse
    scaled = _value_of(grad) * weight
    values = grad_residual + inverse * (scaled - normed * (normed * scaled).mean(-1, keepdim=True))
    return _rows(values, want)


def add_layer_norm(
    residual: Tensor, product: Product, weight: Tensor, bias: Tensor, eps: float, want: Want
) -> tuple[Tensor, Tensor, Tensor, Rows]:
    """residual + product, its mean and 1 / its deviation [tokens, 1], and the normed rows."""
    total = residual + _value_of(product)
    mean = total.mean(-1, keepdim=True)
    centred = total - mean
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return total, mean, inverse, _rows(centred * inverse * weight + bias, want)


def layer_norm_backward(
    grad_residual: Tensor,
    grad: Product | None,
    total: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    want: Want,
) -> Rows:
    """Gradient of `total` from that of the normed rows: residual + product."""
    normed = (total - mean) * inverse
    values = grad_residual if grad is None else grad_residual + _value_of(grad)
    scaled = values * weight
    values = inverse * (scaled - scaled.mean(-1, keepdim=True) - normed * (normed * scaled).mean(-1, keepdim=True))
    return _rows(values, want)


def swiglu(gate_up: Product, want: Want) -> Rows:
    """silu(gate) x up (Shazeer 2020); gate and up lie side by side."""
    gate, up = _value_of(gate_up).chunk(2, -1)
    return _rows(gate * torch.sigmoid(gate) * up, want)


def swiglu_backward(grad: Product, gate_up: Product, want: Want) -> Rows:
    gate, up = _value_of(gate_up).chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    value = _value_of(grad)
    by_gate = value * up * sigmoid * (1 + gate * (1 - sigmoid))
    return _rows(torch.cat([by_gate, value * gate * sigmoid], -1), want)


def gelu(inner: Product, want: Want) -> Rows:
    return _rows(F.gelu(_value_of(inner)), want)


def gelu_backward(grad: Product, inner: Product, want: Want) -> Rows:
    x = _value_of(inner)
    cumulative = 0.5 * (1 + torch.erf(x * 0.5**0.5))
    density = torch.exp(-0.5 * x.square()) * 0.3989422804014327
    return _rows(_value_of(grad) * (cumulative + x * density), want)


def _rotate(heads: Tensor, rotary: Rotary, direction: int) -> Tensor:
    """Rotary positions (Su et al. 2021, section 3.4.2) on [tokens, heads, dim], the halves being the pairs."""
    first, second = heads.chunk(2, -1)
    cos, sin = rotary.cos.unsqueeze(1), rotary.sin.unsqueeze(1) * direction
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotate_heads(projected: Product, rotary: Rotary | None, shape: HeadShape) -> Tensor:
    """Projected rows [tokens, heads x dim], their query and key heads rotated by position."""
    return _rotate_all(_value_of(projected), rotary, shape, 1)


def rotate_heads_backward(grad: Tensor, rotary: Rotary | None, shape: HeadShape, want: Want) -> Rows:
    return _rows(_rotate_all(grad, rotary, shape, -1), want)


def _rotate_all(rows: Tensor, rotary: Rotary | None, shape: HeadShape, direction: int) -> Tensor:
    if rotary is None:
        return rows
    turned = (shape.query + shape.key_value) * shape.dim
    heads = rows[:, :turned].view(len(rows), -1, shape.dim)
    return torch.cat([_rotate(heads, rotary, direction).flatten(1), rows[:, turned:]], 1)
