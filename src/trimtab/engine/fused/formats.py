"""How rows travel between matrix products and the kernels that stand between those."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.engine.lora import DROPOUT_LEVELS


class Product(NamedTuple):
    """A matrix product [tokens, columns]: values x row_scale x column_scale + bias + delta."""

    values: Tensor
    row_scale: Tensor | None = None  # [tokens, 1]; None where values are float32 already
    column_scale: Tensor | None = None  # [columns]
    bias: Tensor | None = None  # [columns]
    delta: Tensor | None = None  # [tokens, columns], float32

    @property
    def is_plain(self) -> bool:
        """Whether the values are the product, with nothing to apply or add."""
        return all(part is None for part in self[1:])


class Rows(NamedTuple):
    """Rows [tokens, columns] on their way into a matrix product, in the formats that it asks for."""

    values: Tensor | None
    quantised: Tensor | None = None  # int8, values ~ quantised x scale
    scale: Tensor | None = None  # [tokens, 1]


class Want(NamedTuple):
    """Formats to return rows in, and the column scale to fold in before they are rounded."""

    values: bool
    quantised: bool
    column_scale: Tensor | None = None


class Masks(NamedTuple):
    """Dropout of a group's adapters: which elements fall follows from the seed, in any kernel alike.

    `dropped` of 65,536 elements fall, and what is kept is to be scaled by `scale`.
    """

    seed: int = 0
    dropped: int = 0

    @property
    def scale(self) -> float:
        return DROPOUT_LEVELS / (DROPOUT_LEVELS - self.dropped)


def draw_masks(dropout: float) -> Masks:
    """Masks at rate `dropout`, seeded by torch's generator."""
    dropped = min(round(dropout * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)
    return Masks(int(torch.randint(1 << 32, ())), dropped) if dropped else Masks()


class HeadShape(NamedTuple):
    """Heads of a projected row: queries, then keys, then values, each `dim` wide."""

    query: int
    key_value: int
    dim: int


class Rotary(NamedTuple):
    """Cosines and sines [tokens, dim / 2] of rotary positions."""

    cos: Tensor
    sin: Tensor


class Heads(NamedTuple):
    """How a family attends; a window counts the tokens that a query sees on a side, itself among them."""

    shape: HeadShape
    scaling: float
    causal: bool
    window: int | None = None
