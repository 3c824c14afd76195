"""Attention within each text of a pack, forward and backward, close to the cost of its products.

Short texts go through batched products with the heads that share a key stacked as rows of one
matrix: nothing is repeated for grouped queries, and twice as fast here as the tiled kernel of
torch, which longer texts use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.engine.attention import Run, attend, window_mask
from trimtab.engine.fused.formats import HeadShape

# Up to this many tokens the probabilities of a text are small enough to keep.
_SHORT = 128


QueryKeyValue = tuple[Tensor, Tensor, Tensor]


class Heads(NamedTuple):
    """How a family attends."""

    shape: HeadShape
    scaling: float
    causal: bool
    window: int | None = None


@dataclass(frozen=True)
class Layout:
    """A pack's texts, and where each (token, head) lies in attention's order, for query heads and key heads.

    Attention's order is (run, text, key head, query head of that key, position).
    """

    runs: Sequence[Run]
    tokens: int
    back: tuple[Tensor, Tensor]


def make_layout(runs: Sequence[Run], shape: HeadShape, device: torch.device) -> Layout:
    tokens = torch.arange(sum(run.texts * run.length for run in runs))
    query, key = (_order(tokens, runs, heads, shape.key_value) for heads in (shape.query, shape.key_value))
    return Layout(runs, len(tokens), (query.argsort().to(device), key.argsort().to(device)))


def _order(tokens: Tensor, runs: Sequence[Run], heads: int, key_heads: int) -> Tensor:
    """Rows (token x heads + head) in attention's order."""
    rows = tokens[:, None] * heads + torch.arange(heads)
    sizes = [run.texts * run.length for run in runs]
    return torch.cat([
        part.view(run.texts, run.length, key_heads, -1).permute(0, 2, 3, 1).reshape(-1)
        for part, run in zip(torch.split(rows, sizes), runs, strict=True)
    ])  # fmt: skip


@lru_cache(maxsize=512)
def _bias(length: int, groups: int, window: int | None, causal: bool) -> Tensor | None:
    """[groups x length, length] to be added to the scores, or None where every token sees every other."""
    if not causal and (window is None or window >= length):
        return None
    allowed = window_mask(length, window or length, causal, torch.device("cpu"))
    return torch.zeros(length, length).masked_fill(~allowed, float("-inf")).repeat(groups, 1)


def attention_forward(qkv: QueryKeyValue, layout: Layout, heads: Heads) -> tuple[Tensor, Any]:
    """What each text attends to, and what the backward needs.

    Args:
        qkv: [tokens x query heads, dim], and the same for key and value heads, in attention's order.

    Returns:
        [tokens x query heads, dim] in attention's order.
    """
    output = torch.empty_like(qkv[0])
    saved = []
    for run, q, k, v, out in _by_run(layout, heads, *qkv, output):
        if run.length > _SHORT:
            saved.append(_long_forward(q, k, v, out, run, heads))
            continue
        bias = _bias(run.length, heads.shape.query // heads.shape.key_value, heads.window, heads.causal)
        if bias is None:
            scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=heads.scaling)
        else:
            scores = torch.baddbmm(bias.to(q.device), q, k.transpose(1, 2), alpha=heads.scaling)
        probabilities = scores.softmax(-1)
        torch.bmm(probabilities, v, out=out)
        saved.append(probabilities)
    return output, saved


def attention_backward(grad: Tensor, qkv: QueryKeyValue, saved: Any, layout: Layout, heads: Heads) -> QueryKeyValue:
    """Gradients of query, key and value, in attention's order."""
    grads = torch.empty_like(qkv[0]), torch.empty_like(qkv[1]), torch.empty_like(qkv[2])
    runs = _by_run(layout, heads, *qkv, grad, *grads)
    for kept, (run, q, k, v, g, grad_q, grad_k, grad_v) in zip(saved, runs, strict=True):
        if run.length > _SHORT:
            _long_backward(g, kept, (grad_q, grad_k, grad_v), run, heads)
            continue
        torch.bmm(kept.transpose(1, 2), g, out=grad_v)
        scores = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), kept, -1, kept.dtype)
        torch.baddbmm(grad_q, scores, k, beta=0, alpha=heads.scaling, out=grad_q)
        torch.baddbmm(grad_k, scores.transpose(1, 2), q, beta=0, alpha=heads.scaling, out=grad_k)
    return grads


def _by_run(layout: Layout, heads: Heads, *tensors: Tensor) -> Any:
    """Each run with views [texts x key heads, rows, dim] of the tensors."""
    start = 0
    for run in layout.runs:
        tokens = run.texts * run.length
        views = []
        for tensor in tensors:
            count = len(tensor) // layout.tokens
            part = tensor[start * count : (start + tokens) * count]
            views.append(part.view(run.texts * heads.shape.key_value, -1, heads.shape.dim))
        yield run, *views
        start += tokens


def _long_forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor, run: Run, heads: Heads) -> Any:
    parts = [part.view(run.texts, -1, run.length, heads.shape.dim).detach().requires_grad_() for part in (q, k, v)]
    with torch.enable_grad():
        attended = attend(*parts, causal=heads.causal, scaling=heads.scaling, window=heads.window, softcap=None)
    out.copy_(attended.detach().view_as(out))
    return parts, attended


def _long_backward(grad: Tensor, kept: Any, outs: tuple[Tensor, ...], run: Run, heads: Heads) -> None:
    parts, attended = kept
    found = torch.autograd.grad(attended, parts, grad.view_as(attended))
    for out, part in zip(outs, found, strict=True):
        out.copy_(part.reshape(out.shape))
