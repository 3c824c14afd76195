"""Classification: texts to tokens and one label each, cross-entropy, and probabilities.

How a stock classification model turns pooled states into logits is in `heads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.data import Row
from trimtab.errors import DataError
from trimtab.tasks.examples import Batch, EncodedRows, Example, Forward
from trimtab.tasks.heads import pools_last_token


class Classification:
    """One label a text; the head reads one token of it."""

    name = "classification"
    peft_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    has_probe = True

    def encode(self, rows: Sequence[Row], tokenizer: Any, model: Any, max_length_tokens: int) -> EncodedRows:
        return encode_rows(rows, tokenizer, max_length_tokens, pools_last_token(model), model.config.pad_token_id)

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        return classification_loss(forward.logits(batch), batch.labels)

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        """Logits [texts, classes]."""
        return forward.logits(batch)

    def summarise(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """Figures to validate by; the highest `score` is best."""
        accuracy = float((outputs.argmax(-1) == labels).double().mean())
        return {"loss": float(classification_loss(outputs, labels)), "accuracy": accuracy, "score": accuracy}


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
        examples.append(Example(ids, types[i] if types else None, [pooled], [row.label]))
    return EncodedRows(examples, list(range(len(rows))), truncated)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of `logits` [rows, classes] against `labels` [rows]."""
    return F.cross_entropy(logits.float(), labels)


def probabilities_of(logits: Tensor) -> Tensor:
    """Softmax in float64, so that stored probabilities keep the logits' precision."""
    return torch.softmax(logits.double(), dim=-1)
