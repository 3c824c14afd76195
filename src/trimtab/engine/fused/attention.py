"""Attention within each text of a pack, in torch: the plain twin of the kernels of the same names.

In bfloat16 what enters a product is rounded; sums, the softmax and its gradient are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.engine.attention import attend
from trimtab.engine.fused.formats import Heads


def attention_forward(projected: Tensor, starts: Tensor, heads: Heads, bfloat16: bool = False) -> tuple[Tensor, Tensor]:
    """What each text attends to, and what the backward needs of each softmax.

    Args:
        projected: [tokens, (heads + 2 key heads) x dim], rotated.
        starts: first token of each text, then the number of tokens.

    Returns:
        [tokens, heads x dim], and [tokens, heads, 2].
    """
    sums = projected.new_zeros(len(projected), heads.shape.query, 2)  # the backward here does without them
    attend_to = _attend_rounded if bfloat16 else _attend
    return torch.cat([attend_to(text, heads) for text in _texts(projected, starts)]), sums


def attention_backward(
    grad: Tensor, projected: Tensor, sums: Tensor, starts: Tensor, heads: Heads, bfloat16: bool = False
) -> Tensor:
    """Gradient of `projected` from that of what was attended."""
    find = _gradient_rounded if bfloat16 else _gradient
    texts = zip(_texts(grad, starts), _texts(projected, starts), strict=True)
    return torch.cat([find(by_text, text, heads) for by_text, text in texts])


def _gradient(grad: Tensor, text: Tensor, heads: Heads) -> Tensor:
    leaf = text.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(_attend(leaf, heads), leaf, grad)[0]


def _texts(rows: Tensor, starts: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, starts.diff().tolist())


def _split(text: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    """Queries, keys and values [1, heads, tokens, dim]."""
    query, key_value, dim = heads.shape
    return torch.split(text.view(1, len(text), -1, dim).transpose(1, 2), [query, key_value, key_value], 1)


def _attend(text: Tensor, heads: Heads) -> Tensor:
    parts = _split(text, heads)
    attended = attend(*parts, causal=heads.causal, scaling=heads.scaling, window=heads.window, softcap=None)
    return attended.transpose(1, 2).reshape(len(text), -1)


def _attend_rounded(text: Tensor, heads: Heads) -> Tensor:
    _, _, value, exponentials = _exponentials_rounded(text, heads)
    attended = _rounded(exponentials) @ value / exponentials.sum(-1, keepdim=True)
    return attended.transpose(0, 1).reshape(len(text), -1)


def _gradient_rounded(grad: Tensor, text: Tensor, heads: Heads) -> Tensor:
    query, key, value, exponentials = _exponentials_rounded(text, heads)
    by_out = _rounded(grad.view(len(text), -1, heads.shape.dim).transpose(0, 1))
    weights = exponentials / exponentials.sum(-1, keepdim=True)
    by_weights = by_out @ value.mT
    along = (weights * by_weights).sum(-1, keepdim=True)
    by_scores = _rounded(weights * (by_weights - along) * heads.scaling)
    by_key, by_value = (
        part.view(heads.shape.key_value, -1, *part.shape[1:]).sum(1)
        for part in (by_scores.mT @ query, _rounded(weights).mT @ by_out)
    )
    return torch.cat([by_scores @ key, by_key, by_value]).transpose(0, 1).reshape(len(text), -1)


def _exponentials_rounded(text: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rounded queries, keys and values [query heads, tokens, dim], and e^(score - largest), zero where masked."""
    query, key, value = (part[0] for part in _split(text, heads))
    key, value = (
        _rounded(part).repeat_interleave(heads.shape.query // heads.shape.key_value, 0) for part in (key, value)
    )
    scores = _rounded(query * heads.scaling) @ key.mT
    ahead = torch.arange(len(text)) - torch.arange(len(text)).unsqueeze(1)  # of each query, how far a key lies
    window = len(text) if heads.window is None else heads.window
    sees = (ahead.abs() < window) & (ahead <= 0 if heads.causal else ahead.new_ones((), dtype=torch.bool))
    scores = scores.masked_fill(~sees, -torch.inf)
    return _rounded(query), key, value, (scores - scores.amax(-1, keepdim=True)).exp()


def _rounded(values: Tensor) -> Tensor:
    return values.bfloat16().float()
