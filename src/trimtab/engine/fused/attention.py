"""Attention within each text of a pack, in torch: the plain twin of the kernels of the same names."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.engine.attention import attend
from trimtab.engine.fused.formats import Heads


def attention_forward(projected: Tensor, starts: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """What each text attends to, and what the backward needs of each softmax.

    Args:
        projected: [tokens, (heads + 2 key heads) x dim], rotated.
        starts: first token of each text, then the number of tokens.

    Returns:
        [tokens, heads x dim], and [tokens, heads, 2].
    """
    sums = projected.new_zeros(len(projected), heads.shape.query, 2)  # the backward here does without them
    return torch.cat([_attend(text, heads) for text in _texts(projected, starts)]), sums


def attention_backward(grad: Tensor, projected: Tensor, sums: Tensor, starts: Tensor, heads: Heads) -> Tensor:
    """Gradient of `projected` from that of what was attended."""
    found: list[Tensor] = []
    for text, by_text in zip(_texts(projected, starts), _texts(grad, starts), strict=True):
        leaf = text.detach().requires_grad_()
        with torch.enable_grad():
            found += torch.autograd.grad(_attend(leaf, heads), leaf, by_text)
    return torch.cat(found)


def _texts(rows: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, starts.diff().tolist())


def _attend(text: Tensor, heads: Heads) -> Tensor:
    query, key_value, dim = heads.shape
    parts = torch.split(text.view(1, len(text), -1, dim).transpose(1, 2), [query, key_value, key_value], 1)
    attended = attend(*parts, causal=heads.causal, scaling=heads.scaling, window=heads.window, softcap=None)
    return attended.transpose(1, 2).reshape(len(text), -1)
