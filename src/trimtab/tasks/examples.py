"""Encoded rows: what the tokens of every task look like to the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One sequence: the head reads the states at `positions`, and shall say `labels` there, one each."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    positions: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class EncodedRows:
    """`rows[i]` is the number of the row that `examples[i]` comes from: a long text may be several examples."""

    examples: list[Example]
    rows: list[int]
    truncated: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.examples))

    def __add__(self, other: EncodedRows) -> EncodedRows:
        first = max(self.rows, default=-1) + 1
        rows = [*self.rows, *(first + row for row in other.rows)]
        return EncodedRows([*self.examples, *other.examples], rows, self.truncated + other.truncated)

    def first(self, rows: int) -> EncodedRows:
        """The examples of the first `rows` rows."""
        count = sum(row < rows for row in self.rows)
        return EncodedRows(self.examples[:count], self.rows[:count], self.truncated)


class Batch(Protocol):
    """What a task reads of a batch: `labels` [positions], for all its texts."""

    @property
    def labels(self) -> Tensor: ...


class Forward(Protocol):
    """What a task reads of a model's forward."""

    model: Any

    def states(self, batch: Any) -> Tensor:
        """[positions, hidden] that the head reads."""
        ...

    def logits(self, batch: Any) -> Tensor:
        """[positions, classes] of the model's own head."""
        ...
