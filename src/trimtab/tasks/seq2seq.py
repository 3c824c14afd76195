"""Sequence to sequence: an encoder reads the source, a decoder writes the target (T5, mT5, BART families)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.data import Row
from trimtab.errors import RowError
from trimtab.tasks.examples import EncodedRows, Example
from trimtab.tasks.next_token import NextToken, end_text


class Seq2Seq(NextToken):
    """Teacher forcing: each token of the target is predicted from the source and the true tokens before it."""

    name = "seq2seq"
    peft_type = "SEQ_2_SEQ_LM"
    auto_class = "AutoModelForSeq2SeqLM"
    writes_answers = True

    def encode(self, rows: Sequence[Row], tokenizer: Any, model: Any, max_length_tokens: int) -> EncodedRows:
        """Sources and targets are cut to `max_length_tokens` each.

        Raises:
            RowError: a source or target that gives no token.
        """
        start = model.config.decoder_start_token_id
        examples, truncated = [], 0
        for row in rows:
            source: list[int] = tokenizer(row.text, verbose=False)["input_ids"]
            target = end_text(tokenizer(text_target=row.completion, verbose=False)["input_ids"], tokenizer)
            if not source or len(target) < 2:
                lacking = row.completion if source else row.text
                raise RowError(row.id, f"the tokenizer gives no token for {lacking!r:.42}; remove the row")
            truncated += len(source) > max_length_tokens or len(target) > max_length_tokens
            source, target = (cut_ids(ids, max_length_tokens) for ids in (source, target))
            examples.append(Example(source, None, list(range(len(target))), target, [start, *target[:-1]]))
        return EncodedRows(examples, list(range(len(rows))), truncated)


def cut_ids(ids: list[int], most: int) -> list[int]:
    """At most `most` tokens, of which the last is that of the whole: most often the end of the text."""
    return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]


def longest_target(encoded: EncodedRows) -> int:
    """Tokens of the longest target, its end included: as many as an answer may have."""
    return max(len(example.labels) for example in encoded.examples)
