"""Texts, or pairs of texts, to tokens of which the head reads one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.data import Row
from trimtab.errors import DataError
from trimtab.tasks.examples import EncodedRows, Example
from trimtab.tasks.heads import pools_last_token


def encode_texts(
    rows: Sequence[Row], labels: Sequence[Any], tokenizer: Any, model: Any, max_length_tokens: int
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
    reads_last, pad_token_id = pools_last_token(model), model.config.pad_token_id
    examples = []
    for i, (row, ids) in enumerate(zip(rows, encoded["input_ids"], strict=True)):
        if not ids:
            raise DataError(f"row {row.id}: the tokenizer gives no token for {row.text[:40]!r}; remove the row")
        pooled = 0
        if reads_last:
            pooled = max((k for k, token in enumerate(ids) if token != pad_token_id), default=0)
        examples.append(Example(ids, types[i] if types else None, [pooled], [labels[i]]))
    return EncodedRows(examples, list(range(len(rows))), truncated)
