"""Classification: texts to tokens and one label each, cross-entropy, and probabilities.

How a stock classification model turns pooled states into logits is in `heads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.data import Row
from trimtab.errors import DataError


@dataclass(frozen=True)
class Example:
    """One encoded row. `pooled` is the position of the token whose state the head reads."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    pooled: int
    label: int

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class EncodedRows:
    examples: list[Example]
    truncated: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.examples))


def encode_rows(
    rows: Sequence[Row], tokenizer: Any, max_length_tokens: int, pools_last: bool, pad_token_id: int | None
) -> EncodedRows:
    """Tokenise rows, cut to `max_length_tokens`, and mark the pooled token of each.

    A decoder is read at the last token that is not padding, exactly as transformers does
    (a text may end with the padding token itself); an encoder at its first token.

    Raises:
        DataError: a text that gives no token.
    """
    texts = [row.text for row in rows]
    pairs = [row.text_pair for row in rows] if rows and rows[0].text_pair is not None else None
    encoded = tokenizer(texts, pairs, truncation=False, return_attention_mask=False, verbose=False)
    full_lengths = list(map(len, encoded["input_ids"]))
    truncated = sum(length > max_length_tokens for length in full_lengths)
    if truncated:
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length_tokens, return_attention_mask=False)
    types = encoded.get("token_type_ids")
    examples = []
    for i, (row, ids) in enumerate(zip(rows, encoded["input_ids"], strict=True)):
        if not ids:
            raise DataError(f"row {row.id}: the tokenizer gives no token for {row.text[:40]!r}; remove the row")
        pooled = 0
        if pools_last:
            pooled = max((k for k, token in enumerate(ids) if token != pad_token_id), default=0)
        examples.append(Example(ids, types[i] if types else None, pooled, row.label))
    return EncodedRows(examples, truncated)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of `logits` [rows, classes] against `labels` [rows]."""
    return F.cross_entropy(logits.float(), labels)


def probabilities_of(logits: Tensor) -> Tensor:
    """Softmax in float64, so that stored probabilities keep the logits' precision."""
    return torch.softmax(logits.double(), dim=-1)
