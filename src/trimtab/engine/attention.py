"""Attention over packed texts, registered with transformers under one name.

A packed batch is one sequence that holds many texts, ordered by length. Texts of one length lie
side by side, so each such run is a view [texts, heads, length, dim] of the packed tensor: no
padding, no mask, no gather; and no text can see another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMPLEMENTATION = "trimtab_packed"


class Run(NamedTuple):
    """`texts` neighbours in the pack that are `length` tokens long each."""

    texts: int
    length: int


def runs_of(lengths: Sequence[int]) -> list[Run]:
    """Group equal neighbours of `lengths`."""
    runs: list[Run] = []
    for length in lengths:
        if runs and runs[-1].length == length:
            runs[-1] = Run(runs[-1].texts + 1, length)
        else:
            runs.append(Run(1, length))
    return runs


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    packed_runs: Sequence[Run] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **unsupported: Any,
) -> tuple[Tensor, None]:
    """Attention within each text of a pack.

    Args:
        query: [1, heads, tokens, dim]; key and value may have fewer heads (grouped-query attention).
        packed_runs: the texts' lengths, in order; their sum is `tokens`.

    Returns:
        [1, tokens, heads, dim], and no weights.

    Raises:
        NotImplementedError: the lengths did not arrive, or the model asks for what is not done here.
    """
    if packed_runs is None or attention_mask is not None or query.shape[0] != 1:
        raise NotImplementedError("the model did not pass the packed lengths on")
    for name in ("s_aux", "position_bias", "head_mask"):
        if unsupported.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    sizes = [run.texts * run.length for run in packed_runs]
    outputs = [
        attend(*(part.unflatten(2, run).squeeze(0).transpose(0, 1) for part in parts),
                causal=causal, scaling=scaling, window=sliding_window, softcap=softcap)
        .transpose(1, 2).flatten(0, 1)
        for run, *parts in zip(packed_runs, *(torch.split(part, sizes, 2) for part in (query, key, value)), strict=True)
    ]  # fmt: skip
    return torch.cat(outputs).unsqueeze(0), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Plain attention over [texts, heads, length, dim] tensors of one length."""
    length = query.shape[2]
    grouped = key.shape[1] != query.shape[1]
    if softcap is not None:
        return _attend_softcapped(query, key, value, causal, scaling, window, softcap)
    if window is not None and window < length:
        mask = _window_mask(length, window, causal, query.device)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=causal and length > 1, scale=scaling, enable_gqa=grouped
    )


def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """[length, length], True where a query (row) may see a key (column)."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return ((distance >= 0) if causal else (distance > -window)) & (distance < window)


def _attend_softcapped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    scaling: float | None,
    window: int | None,
    softcap: float,
) -> Tensor:
    """Scores squashed to (-softcap, softcap) before the softmax (Gemma 2, section 2)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[2]
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[3] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    allowed = _window_mask(length, window or length, causal, query.device) if causal or window else None
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ value


def register() -> None:
    """Make `IMPLEMENTATION` known to transformers; with no mask of that name, it builds none."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)
