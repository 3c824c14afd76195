"""Batches whose texts ask for different adapters: who asks for which, while one forward runs for all.

The plain twin is a forward for each adapter's texts alone. LoRA layers ask `current_mix` (`lora`, `fused.linears`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.engine.batches import Batch


class Share(NamedTuple):
    """The part of a batch that one adapter serves: places among its tokens where it is packed, else among its rows."""

    adapter: str
    places: Tensor


class Mix(NamedTuple):
    """`units` is the number of tokens, or of padded rows, that the shares together hold."""

    units: int
    shares: list[Share]


_mix: ContextVar[Mix | None] = ContextVar("adapters by text", default=None)


def current_mix() -> Mix | None:
    return _mix.get()


@contextmanager
def mixing(mix: Mix) -> Iterator[None]:
    """Within, each LoRA layer gives each text what its own adapter adds."""
    token = _mix.set(mix)
    try:
        yield
    finally:
        _mix.reset(token)


def mix_of(batch: Batch, adapters: Sequence[str]) -> Mix:
    """The shares of a batch.

    Args:
        adapters: the one that each text of the encoded data asks for.
    """
    asked = [adapters[row] for row in batch.rows]
    names = sorted(set(asked))
    numbers = torch.tensor([names.index(name) for name in asked])
    if batch.runs is not None:
        lengths = [run.length for run in batch.runs for _ in range(run.texts)]
        numbers = numbers.repeat_interleave(torch.tensor(lengths))
    numbers = numbers.to(batch.input_ids.device)
    shares = [Share(name, (numbers == number).nonzero().squeeze(1)) for number, name in enumerate(names)]
    return Mix(len(numbers), shares)


def mix_of_rows(adapters: Sequence[str], device: torch.device) -> Mix:
    """The shares of a padded batch whose rows are in the texts' order, as in generation."""
    names = sorted(set(adapters))
    shares = [Share(name, torch.tensor([row for row, asked in enumerate(adapters) if asked == name], device=device))
              for name in names]  # fmt: skip
    return Mix(len(adapters), shares)
