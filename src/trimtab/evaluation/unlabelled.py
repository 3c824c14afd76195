"""Rows without labels, and what a model's outputs say of them, by task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.data.columns import TEXT_NAMES
from trimtab.data.language import messages_of
from trimtab.data.reading import Table
from trimtab.data.rows import Row
from trimtab.errors import DataError, suggest
from trimtab.tasks.classification import probabilities_of
from trimtab.tasks.examples import EncodedRows
from trimtab.tasks.multilabel import marginals_of

_TEXT_NAMES = (*TEXT_NAMES, "source", "input", "prompt")
_WORD_NAMES = ("tokens", "words")
_MESSAGES_NAMES = ("messages", "conversations", "conversation")
_ANSWERING = ("assistant", "gpt")

# What is said of a row: its prediction, and probabilities where there are some.
Record = dict[str, Any]


class Said(list[Record]):
    """What is said of rows, and how many of them were cut at the length limit."""

    truncated = 0


def row_without_label(
    task: str, record: Mapping[str, Any], place: str, text_column: str | None, pair_column: str | None
) -> Row:
    """A row without a label: what stands in its place is never read."""
    words = next((record[name] for name in (text_column, *_WORD_NAMES) if name is not None and name in record), None)
    if task == "token_classification" and isinstance(words, list) and words:
        return Row(place, " ".join(map(str, words)), words=list(map(str, words)), labels=[0] * len(words))
    text = text_in(record, place, text_column)
    pair = text_in(record, place, pair_column) if pair_column else None
    words = text.split()
    return Row(place, " ".join(words) if task == "token_classification" else text, text_pair=pair, completion=text,
               value=0.0, words=words, labels=[0] * len(words) if task == "token_classification" else None)  # fmt: skip


def text_in(record: Mapping[str, Any], place: str, column: str | None) -> str:
    if column is None:
        lowered = {name.lower(): name for name in record}
        column = next((lowered[name] for name in _TEXT_NAMES if name in lowered), None)
        if column is None:
            raise DataError(f"{place}: no column looks like a text ({', '.join(record)}); name it: --text-column")
    if column not in record:
        raise DataError(f"{place}: no column {column!r}{suggest(column, record)}; its columns are: {', '.join(record)}")
    value = record[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: no text in column {column!r} (found {value!r}); fill or remove the row")
    return value


def prompt_in(record: Mapping[str, Any], place: str, column: str | None) -> str | list[dict[str, str]]:
    """The text of a row, or its chat up to the answer that is to be written.

    Raises:
        DataError: neither is there, or a turn without role or content.
    """
    if column is None:
        column = next((name for name in _MESSAGES_NAMES if isinstance(record.get(name), list)), None)
    if column is None or not isinstance(record.get(column), list):
        return text_in(record, place, column)
    turns = list(record[column])
    if turns and isinstance(turns[-1], Mapping) and (turns[-1].get("role") or turns[-1].get("from")) in _ANSWERING:
        turns.pop()
    if not turns:
        raise DataError(f"{place}: column {column!r} holds no turn to answer; fill or remove the row")
    source, _, line = place.rpartition(":")
    # Chats to learn from end with an answer, and are refused without one.
    answered = Table(source, [{column: [*turns, {"role": "assistant", "content": "-"}]}], [int(line)])
    return messages_of(answered, 0, column)[:-1]


def _say_class(outputs: Tensor, encoded: EncodedRows, rows: Sequence[Row], names: Sequence[str]) -> list[Record]:
    shares = probabilities_of(outputs)
    return [{"prediction": names[place], "probabilities": dict(zip(names, row, strict=True))}
            for place, row in zip(shares.argmax(-1).tolist(), shares.tolist(), strict=True)]  # fmt: skip


def _say_labels(outputs: Tensor, encoded: EncodedRows, rows: Sequence[Row], names: Sequence[str]) -> list[Record]:
    said = []
    for row in marginals_of(outputs).tolist():
        shares = dict(zip(names, row, strict=True))
        said.append({"prediction": [name for name in names if shares[name] > 0.5], "probabilities": shares})
    return said


def _say_value(outputs: Tensor, encoded: EncodedRows, rows: Sequence[Row], names: Sequence[str]) -> list[Record]:
    return [{"prediction": value} for value in outputs[:, 0].tolist()]


def _say_tags(outputs: Tensor, encoded: EncodedRows, rows: Sequence[Row], names: Sequence[str]) -> list[Record]:
    """A tag a word, and that tag's probability; null for words past the length limit."""
    likeliest = probabilities_of(outputs).max(-1)
    lengths = [len(example.labels) for example in encoded.examples]
    by_row = (torch.split(part, lengths) for part in (likeliest.indices, likeliest.values))
    said = []
    for row, places, shares in zip(rows, *by_row, strict=True):
        words = row.words or []
        cut = [None] * (len(words) - len(places))
        tags = [names[place] for place in places.tolist()]
        said.append({"words": words, "prediction": [*tags, *cut], "probabilities": [*shares.tolist(), *cut]})
    return said


_Say = Callable[[Tensor, EncodedRows, Sequence[Row], Sequence[str]], list[Record]]


def _counted(say: _Say) -> Callable[[Tensor, EncodedRows, Sequence[Row], Sequence[str]], Said]:
    def counted(outputs: Tensor, encoded: EncodedRows, rows: Sequence[Row], names: Sequence[str]) -> Said:
        said = Said(say(outputs, encoded, rows, names))
        said.truncated = encoded.truncated
        return said

    return counted


# (outputs [positions, columns], what was encoded, rows, label names).
SAY = {
    "classification": _counted(_say_class),
    "multilabel": _counted(_say_labels),
    "regression": _counted(_say_value),
    "token_classification": _counted(_say_tags),
}
