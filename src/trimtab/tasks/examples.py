"""Encoded rows: what the tokens of every task look like to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimtab.tasks.token_loss import LanguageHead


@dataclass(frozen=True)
class Example:
    """One sequence: the head reads the states at `positions`, and shall say `labels` there, one each.

    A label is a number of a class or token, a value, or a list of yes (1.0) and no (0.0). Where an encoder
    reads `input_ids` and a decoder `decoder_input_ids`, positions are the decoder's.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    positions: list[int]
    labels: list[Any]
    decoder_input_ids: list[int] | None = None
    reference: float | None = None  # log-probability of all labels under another model, where one is asked for

    def __len__(self) -> int:
        return len(self.input_ids) + len(self.decoder_input_ids or ())


@dataclass(frozen=True)
class EncodedRows:
    """`rows[i]` is the number of the row that `examples[i]` comes from: a long text may be several examples.

    So many neighbours as `together` stay in one batch, since the loss is about all of them.
    """

    examples: list[Example]
    rows: list[int]
    truncated: int
    together: int = 1

    @cached_property
    def labels(self) -> NDArray[Any]:
        """[positions], or [positions, columns]: every label, in the examples' order."""
        return np.array([label for example in self.examples for label in example.labels])

    @cached_property
    def label_tensor(self) -> Tensor:
        """`labels` as the loss takes them: values and yes or no in float32."""
        return torch.tensor(self.labels.tolist())

    @property
    def tokens(self) -> int:
        return sum(map(len, self.examples))

    def __add__(self, other: EncodedRows) -> EncodedRows:
        first = max(self.rows, default=-1) + 1
        rows = [*self.rows, *(first + row for row in other.rows)]
        return EncodedRows([*self.examples, *other.examples], rows, self.truncated + other.truncated, self.together)

    def take(self, places: Sequence[int]) -> EncodedRows:
        """The rows `places`, of data with an example a row."""
        assert self.together == 1
        return EncodedRows([self.examples[place] for place in places], list(range(len(places))), self.truncated)

    def sample(self, positions: int) -> EncodedRows:
        """Rows drawn at random with so many positions at most, or all rows if they have no more.

        A row of each class, or with and without each label, is among them, whatever positions those take.
        """
        if len(self.labels) <= positions:
            return self
        drawn = np.random.default_rng(0).permutation(len(self.examples))
        sizes = np.array([len(self.examples[place].labels) for place in drawn])
        labels = np.array([label for place in drawn for label in self.examples[place].labels])
        needed = np.unique(np.repeat(np.arange(len(drawn)), sizes)[_first_of_each(labels)])
        order = np.concatenate([needed, np.delete(np.arange(len(drawn)), needed)])
        count = max(len(needed), 1, np.searchsorted(np.cumsum(sizes[order]), positions, side="right"))
        return self.take(drawn[order[:count]].tolist())

    def first(self, rows: int) -> EncodedRows:
        """The examples of the first `rows` rows."""
        count = sum(row < rows for row in self.rows)
        return EncodedRows(self.examples[:count], self.rows[:count], self.truncated, self.together)


def _first_of_each(labels: NDArray[Any]) -> NDArray[Any]:
    """The first place of each class, or with and without each label; none of values."""
    if labels.ndim > 1:
        return np.concatenate([labels.argmax(0), labels.argmin(0)])
    if np.issubdtype(labels.dtype, np.integer):
        return np.unique(labels, return_index=True)[1]
    return np.array([], dtype=np.int64)


class Batch(Protocol):
    """What a task reads of a batch: `labels` [positions], for all its texts, and how many belong to each text.

    `rows` are the places of the texts in the encoded data, `references` [texts] their examples' own.
    """

    @property
    def labels(self) -> Tensor: ...

    @property
    def positions_by_text(self) -> list[int]: ...

    @property
    def rows(self) -> list[int]: ...

    @property
    def references(self) -> Tensor | None: ...


class Forward(Protocol):
    """What a task reads of a model's forward."""

    model: Any

    def states(self, batch: Any) -> Tensor:
        """[positions, hidden] that the head reads."""
        ...

    def logits(self, batch: Any) -> Tensor:
        """[positions, classes] of the model's own head."""
        ...

    def head(self) -> LanguageHead:
        """What turns states into losses, where the model is one of language."""
        ...
