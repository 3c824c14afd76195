"""Texts, or pairs of texts, to tokens of which the head reads one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.data import Row
from trimtab.errors import RowError
from trimtab.tasks.examples import EncodedRows, Example
from trimtab.tasks.heads import pools_last_token


def encode_texts(
    rows: Sequence[Row], labels: Sequence[Any], tokenizer: Any, model: Any, max_length_tokens: int
) -> EncodedRows:
    """Tokenise rows, cut to `max_length_tokens`, and mark the pooled token of each.

    Pairs are the tokenizer's own; where it would only string the two together, `pair_separator` stands between them.
    Of a pair that is too long the longer text is cut.

    A decoder is read at the last token that is not padding, exactly as transformers does
    (a text may end with the padding token itself); an encoder at its first token.

    Raises:
        RowError: a text that gives no token.
    """
    texts = [row.text for row in rows]
    pairs = [row.text_pair or "" for row in rows] if rows and rows[0].text_pair is not None else None
    separator = pair_separator(tokenizer) if pairs else None
    if separator is not None:
        texts, pairs = [f"{row.text}{separator}{row.text_pair}" for row in rows], None
    encoded = tokenizer(texts, pairs, truncation=False, return_attention_mask=False, verbose=False)
    full_lengths = list(map(len, encoded["input_ids"]))
    truncated = sum(length > max_length_tokens for length in full_lengths)
    if truncated and separator is not None:
        texts = [text if length <= max_length_tokens else _shorten(row, separator, tokenizer, max_length_tokens)
                 for row, text, length in zip(rows, texts, full_lengths, strict=True)]  # fmt: skip
    if truncated:
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length_tokens, return_attention_mask=False)
    types = encoded.get("token_type_ids")
    reads_last, pad_token_id = pools_last_token(model), model.config.pad_token_id
    examples = []
    for i, (row, ids) in enumerate(zip(rows, encoded["input_ids"], strict=True)):
        if not ids:
            raise RowError(row.id, f"the tokenizer gives no token for {row.text[:40]!r}; remove the row")
        pooled = 0
        if reads_last:
            pooled = max((k for k, token in enumerate(ids) if token != pad_token_id), default=0)
        examples.append(Example(ids, types[i] if types else None, [pooled], [labels[i]]))
    return EncodedRows(examples, list(range(len(rows))), truncated)


def pair_separator(tokenizer: Any) -> str | None:
    """What stands between two texts for a tokenizer that marks no border of its own; None for one that does.

    The tokenizer's separator, if it has one, else a line break (as between the parts of GPT-3's tasks; Brown et al.
    2020, appendix G), else the end of text, where line breaks give no token.
    """
    if tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False):
        return None
    blank = tokenizer("a b")["input_ids"]
    known = (mark for mark in (tokenizer.sep_token, "\n", tokenizer.eos_token) if mark)
    return next((mark for mark in known if tokenizer(f"a{mark}b")["input_ids"] != blank), None)


def _shorten(row: Row, separator: str, tokenizer: Any, most: int) -> str:
    """A pair as one text of about `most` tokens: the longer of the two loses its end first."""
    both = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (row.text, row.text_pair))
    first, second = both
    border = tokenizer(separator, add_special_tokens=False)["input_ids"]
    room = max(0, most - len(border) - tokenizer.num_special_tokens_to_add(pair=False))
    of_second = min(len(second), max(room // 2, room - len(first)))
    return separator.join(map(tokenizer.decode, (first[: room - of_second], second[:of_second])))
