"""How rows travel between matrix products and the kernels that stand between those."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Product(NamedTuple):
    """A matrix product [tokens, columns]: values x row_scale x column_scale + bias + delta."""

    values: Tensor
    row_scale: Tensor | None = None  # [tokens, 1]; None where values are float32 already
    column_scale: Tensor | None = None  # [columns]
    bias: Tensor | None = None  # [columns]
    delta: Tensor | None = None  # [tokens, columns], float32


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
