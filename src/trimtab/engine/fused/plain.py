"""The plain twins of the C++ kernels, in torch: the reference that tests hold the kernels against.

Each stands for a matrix product, or for one pass over memory between two. `native` has the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.engine.fused.attention import attention_backward as attention_backward
from trimtab.engine.fused.attention import attention_forward as attention_forward
from trimtab.engine.fused.formats import INT8_OFFSET, Adapter, HeadShape, LowRank, Masks, Rotary, Rows, Want, Weight


def _rows(values: Tensor, want: Want) -> Rows:
    """Symmetric int8 with one scale a row, the rounding of LLM.int8() (Dettmers et al. 2022, section 2.1)."""
    if not want.quantised:
        return Rows(values)
    scaled = values if want.column_scale is None else values * want.column_scale
    largest = scaled.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    quantised = (scaled * (127.0 / largest)).round() + INT8_OFFSET
    return Rows(values if want.values else None, quantised.to(torch.uint8), largest * (1.0 / 127.0))


def has_bfloat16() -> bool:
    return False  # rounding here only takes time


def rows_of(values: Tensor, want: Want) -> Rows:
    return _rows(values, want)


def lora_forward(values: Tensor, adapters: Sequence[Adapter], columns: int, masks: Masks) -> LowRank:
    """dropout(values) A^T of each adapter, with a mask of its own, and B over all columns, with all scales in it."""
    keep = _keep(len(values), len(adapters), values.shape[1], masks)
    small = [(values * keep[:, number]) @ adapter.a.t() for number, adapter in enumerate(adapters)]
    wide = [F.pad(_scaled_b(part, masks).t(), (part.start, columns - part.stop)) for part in adapters]
    return LowRank(torch.cat(small, 1), torch.cat(wide))


def lora_backward(
    values: Tensor, adapters: Sequence[Adapter], low_rank: LowRank, masks: Masks, grad: Tensor, needs_input: bool,
    addend: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
    """Gradients of each adapter's A and B and, where needed and with `addend` added, of `values`.

    Args:
        low_rank: what the forward gave.
        grad: the gradient of the product [tokens, columns] to which that was added.
    """
    keep = _keep(len(values), len(adapters), values.shape[1], masks)
    smalls = low_rank.small.chunk(len(adapters), 1)
    found = []
    delta = torch.zeros_like(values) if addend is None else addend
    for number, (adapter, small) in enumerate(zip(adapters, smalls, strict=True)):
        part = grad[:, adapter.start : adapter.stop]
        by_small = part @ _scaled_b(adapter, masks)
        found += [by_small.t() @ (values * keep[:, number]), part.t() @ small * (adapter.scaling * masks.scale)]
        delta = delta + by_small @ adapter.a * keep[:, number]
    return found, delta if needs_input else None


def _scaled_b(adapter: Adapter, masks: Masks) -> Tensor:
    return adapter.b * (adapter.scaling * masks.scale)


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


def lay_out(values: Tensor) -> None:
    """A weight is read as it is."""


def linear(
    rows: Rows,
    weight: Weight,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    addend: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """rows W^T + bias + low_rank + addend, in int8 where the weight has that; into `out`, if there is one."""
    if weight.int8 is None:
        assert rows.values is not None
        product = rows.values @ weight.values.t()
    else:
        product = _multiply_int8(rows, _rounded(weight).t()) * weight.int8.column_scale
    if low_rank is not None:
        product = product + low_rank.small @ low_rank.b
    product = product + sum(part for part in (bias, addend) if part is not None)
    return product if out is None else out.copy_(product)


def linear_backward(rows: Rows, weight: Weight, addend: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """rows W + addend, into `out`, if there is one; in int8, the weight's scales are in the rows already."""
    if weight.int8 is None:
        assert rows.values is not None
        product = rows.values @ weight.values
    else:
        product = _multiply_int8(rows, _rounded(weight))
    product = product if addend is None else product + addend
    return product if out is None else out.copy_(product)


def _multiply_int8(rows: Rows, integers: Tensor) -> Tensor:
    assert rows.quantised is not None
    assert rows.scale is not None
    return ((rows.quantised.double() - INT8_OFFSET) @ integers).float() * rows.scale  # float64 sums them exactly


def _rounded(weight: Weight) -> Tensor:
    assert weight.int8 is not None
    return (weight.values / weight.int8.column_scale.unsqueeze(1)).round().double()


def rms_norm(values: Tensor, weight: Tensor, eps: float, want: Want) -> tuple[Tensor, Rows]:
    """1 / the root mean square [tokens, 1], and the normed rows."""
    inverse = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return inverse, _rows(values * inverse * weight, want)


def rms_norm_backward(
    grad_residual: Tensor, grad: Tensor, values: Tensor, inverse: Tensor, weight: Tensor, want: Want
) -> Rows:
    """Gradient of `values` from that of the normed rows and of the residual."""
    normed = values * inverse
    scaled = grad * weight
    return _rows(grad_residual + inverse * (scaled - normed * (normed * scaled).mean(-1, keepdim=True)), want)


def layer_norm(values: Tensor, weight: Tensor, bias: Tensor, eps: float, want: Want) -> tuple[Tensor, Tensor, Rows]:
    """The mean and 1 / the deviation [tokens, 1], and the normed rows."""
    mean = values.mean(-1, keepdim=True)
    centred = values - mean
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return mean, inverse, _rows(centred * inverse * weight + bias, want)


def layer_norm_backward(
    grad: Tensor, values: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, want: Want
) -> Rows:
    """Gradient of `values` from that of the normed rows."""
    normed = (values - mean) * inverse
    scaled = grad * weight
    values = inverse * (scaled - scaled.mean(-1, keepdim=True) - normed * (normed * scaled).mean(-1, keepdim=True))
    return _rows(values, want)


def swiglu(gate_up: Tensor, want: Want) -> Rows:
    """silu(gate) x up (Shazeer 2020); gate and up lie side by side."""
    gate, up = gate_up.chunk(2, -1)
    return _rows(gate * torch.sigmoid(gate) * up, want)


def swiglu_backward(grad: Tensor, gate_up: Tensor, want: Want) -> Rows:
    gate, up = gate_up.chunk(2, -1)
    sigmoid = torch.sigmoid(gate)
    by_gate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    return _rows(torch.cat([by_gate, grad * gate * sigmoid], -1), want)


def gelu(inner: Tensor, want: Want) -> Rows:
    return _rows(F.gelu(inner), want)


def gelu_backward(grad: Tensor, inner: Tensor, want: Want) -> Rows:
    cumulative = 0.5 * (1 + torch.erf(inner * 0.5**0.5))
    density = torch.exp(-0.5 * inner.square()) * 0.3989422804014327
    return _rows(grad * (cumulative + inner * density), want)


def _rotate(heads: Tensor, rotary: Rotary, direction: int) -> Tensor:
    """Rotary positions (Su et al. 2021, section 3.4.2) on [tokens, heads, dim], the halves being the pairs."""
    first, second = heads.chunk(2, -1)
    cos, sin = rotary.cos.unsqueeze(1), rotary.sin.unsqueeze(1) * direction
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotate_heads(projected: Tensor, rotary: Rotary | None, shape: HeadShape) -> Tensor:
    """Projected rows [tokens, heads x dim], their query and key heads rotated by position."""
    return _rotate_all(projected, rotary, shape, 1)


def rotate_heads_backward(grad: Tensor, rotary: Rotary | None, shape: HeadShape, want: Want) -> Rows:
    return _rows(_rotate_all(grad, rotary, shape, -1), want)


def _rotate_all(rows: Tensor, rotary: Rotary | None, shape: HeadShape, direction: int) -> Tensor:
    if rotary is None:
        return rows
    turned = (shape.query + shape.key_value) * shape.dim
    heads = rows[:, :turned].view(len(rows), -1, shape.dim)
    return torch.cat([_rotate(heads, rotary, direction).flatten(1), rows[:, turned:]], 1)
