"""Batches whose texts ask for different adapters: who asks for which, while one forward runs for all.

The plain twin is a forward for each adapter's texts alone. LoRA layers ask `current_mix` (`lora`, `fused.linears`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.engine.batches import Batch

# Units of one adapter that are multiplied together.
_CHUNK = 32


class Chunks(NamedTuple):
    """Units put in groups of one adapter each, so that one batched product serves all adapters."""

    adapters: Tensor  # [chunks], which adapter a chunk is of
    units: Tensor  # [chunks x size], the unit at each place; where a chunk is not full, any
    places: Tensor  # [units], where each unit lies


@dataclass(frozen=True)
class Mix:
    """Which adapter each unit asks for: each token of a pack, or each row of a padded batch."""

    names: list[str]
    numbers: Tensor  # [units], places among the names

    @cached_property
    def shares(self) -> list[Tensor]:
        """The units of each adapter."""
        return [(self.numbers == number).nonzero().squeeze(1) for number in range(len(self.names))]

    @cached_property
    def chunks(self) -> Chunks:
        counts = torch.bincount(self.numbers, minlength=len(self.names))
        by_adapter = -(-counts // _CHUNK)
        order = self.numbers.argsort(stable=True)
        first_unit, first_chunk = counts.cumsum(0) - counts, by_adapter.cumsum(0) - by_adapter
        asked = self.numbers[order]
        slots = first_chunk[asked] * _CHUNK + torch.arange(len(order), device=order.device) - first_unit[asked]
        units = order.new_zeros(int(by_adapter.sum()) * _CHUNK)
        units[slots] = order
        places = torch.empty_like(order)
        places[order] = slots
        return Chunks(torch.arange(len(counts), device=order.device).repeat_interleave(by_adapter), units, places)


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
    """What a batch asks for.

    Args:
        adapters: the one that each text of the encoded data asks for.
    """
    mix = mix_of_rows([adapters[row] for row in batch.rows], batch.input_ids.device)
    if batch.runs is None:
        return mix
    lengths = torch.tensor([run.length for run in batch.runs for _ in range(run.texts)], device=mix.numbers.device)
    return Mix(mix.names, mix.numbers.repeat_interleave(lengths))


def mix_of_rows(adapters: Sequence[str], device: torch.device) -> Mix:
    """What a padded batch asks for, whose rows are in the order of `adapters`."""
    names = sorted(set(adapters))
    numbers = {name: number for number, name in enumerate(names)}
    return Mix(names, torch.tensor([numbers[name] for name in adapters], device=device))


def multiply_chunks(inputs: Tensor, factors: Sequence[Tensor], mix: Mix) -> Tensor:
    """Each unit [units, columns] times its own adapter's factors, one after the other: [adapters, in, out] each."""
    chunks = mix.chunks
    values = inputs.index_select(0, chunks.units).view(len(chunks.adapters), _CHUNK, -1)
    for factor in factors:
        values = torch.bmm(values, factor.index_select(0, chunks.adapters))
    return values.flatten(0, 1).index_select(0, chunks.places)
