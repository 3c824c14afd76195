"""Rows without labels, and what a model's outputs say of them, by task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.data.columns import TEXT_NAMES
from trimtab.data.rows import Row
from trimtab.errors import DataError, suggest
from trimtab.tasks.classification import probabilities_of
from trimtab.tasks.examples import EncodedRows
from trimtab.tasks.multilabel import marginals_of

_TEXT_NAMES = (*TEXT_NAMES, "source", "input", "prompt")
_WORD_NAMES = ("tokens", "words")

# What is said of a row: its prediction, and probabilities where there are some.
Record = dict[str, Any]


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
    """A tag a word; null for words past the length limit."""
    parts = torch.split(outputs.argmax(-1), [len(example.labels) for example in encoded.examples])
    said = []
    for row, part in zip(rows, parts, strict=True):
        words, tags = row.words or [], [names[place] for place in part.tolist()]
        said.append({"words": words, "prediction": [*tags, *[None] * (len(words) - len(tags))]})
    return said


# (outputs [positions, columns], what was encoded, rows, label names).
SAY: dict[str, Callable[[Tensor, EncodedRows, Sequence[Row], Sequence[str]], list[Record]]] = {
    "classification": _say_class,
    "multilabel": _say_labels,
    "regression": _say_value,
    "token_classification": _say_tags,
}
