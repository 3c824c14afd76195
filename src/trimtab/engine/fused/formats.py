"""How rows and frozen weights lie in memory between matrix products and the kernels around those."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 64  # rows and columns of the squares in which the compiled kernels hold a weight
# Dropout compares 16 random bits an element with a threshold, so rates come in steps of 2^-16.
DROPOUT_LEVELS = 1 << 16
INT8_OFFSET = 128  # added to int8, so that rows are unsigned, as the processor's products ask for


class Rows(NamedTuple):
    """Rows [tokens, columns] on their way into a matrix product, in the formats that it asks for."""

    values: Tensor | None
    quantised: Tensor | None = None  # uint8, values ~ (quantised - INT8_OFFSET) x scale
    scale: Tensor | None = None  # [tokens, 1]


class Want(NamedTuple):
    """Formats to return rows in, and the column scale to fold in before they are rounded."""

    values: bool
    quantised: bool
    column_scale: Tensor | None = None


class Weight(NamedTuple):
    """A frozen weight [columns, inputs], and what the kernels compute from in float32 or in int8."""

    parts: tuple[Tensor, ...]  # the weights of layers that read one input, on top of each other
    tiles: Tensor | None = None  # the values, as [columns / TILE, inputs / TILE, TILE, TILE]
    int8: Int8Weight | None = None

    @property
    def values(self) -> Tensor:
        """The whole; where there are several parts, a fresh copy."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(map(len, self.parts)), self.parts[0].shape[1]


class Int8Weight(NamedTuple):
    """values ~ int8 x column_scale; the one rounding serves both directions, laid out once for each."""

    column_scale: Tensor  # [columns]; the memory behind it goes on with zeros to a whole tile, which kernels read
    forward: Panels
    backward: Panels


class Panels(NamedTuple):
    """int8 [columns, inner] as [columns / TILE, inner / 4, TILE, 4], and the sum of each column, padded."""

    values: Tensor
    sums: Tensor  # int32

    @classmethod
    def of(cls, integers: Tensor) -> Panels:
        padded = F.pad(integers, (0, 0, 0, -len(integers) % TILE))
        parts = padded.view(len(padded) // TILE, TILE, -1, 4)
        return cls(parts.transpose(1, 2).contiguous(), padded.sum(1, dtype=torch.int32))


def tile(values: Tensor) -> Tensor:
    """`values` [columns, inputs] in squares, with zeros where these hang over."""
    columns, inputs = values.shape
    padded = F.pad(values, (0, -inputs % TILE, 0, -columns % TILE))
    return padded.view(-(-columns // TILE), TILE, -1, TILE).transpose(1, 2).contiguous()


def quantise_weight(values: Tensor) -> Int8Weight:
    """One scale a column of the product, the rounding of LLM.int8() (Dettmers et al. 2022, section 2.1).

    Raises:
        ValueError: inputs or columns cannot be divided by 4.
    """
    if values.shape[0] % 4 or values.shape[1] % 4:
        raise ValueError(f"int8 products take multiples of 4, not a weight of {tuple(values.shape)}")
    scale = values.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127.0
    integers = (values / scale).round_().to(torch.int8).contiguous()
    padded_scale = F.pad(scale.squeeze(1), (0, -len(scale) % TILE))
    return Int8Weight(padded_scale[: len(scale)], Panels.of(integers), Panels.of(integers.t().contiguous()))


class LowRank(NamedTuple):
    """small [tokens, rank] b [rank, columns], which a product adds."""

    small: Tensor
    b: Tensor


class Adapter(NamedTuple):
    """The LoRA part of a product's columns `start` to `stop`: scaling dropout(x) a^T b^T is added."""

    start: int
    stop: int
    a: Tensor  # [rank, inputs]
    b: Tensor  # [stop - start, rank]
    scaling: float
    dropout: float


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
