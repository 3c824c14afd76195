"""Rows with something to say of the whole text: one label, several, or a number."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from trimtab.data.columns import TEXT_NAMES, Columns, Named, check_named, group_of, guess, text_of
from trimtab.data.reading import Table
from trimtab.data.rows import Row
from trimtab.errors import DataError
from trimtab.progress import Progress

_LABEL_NAMES = ("label", "labels", "category", "class", "target", "sentiment", "topic", "rating", "y")
_SEVERAL_NAMES = ("labels", "tags", "topics", "categories", *_LABEL_NAMES)
_VALUE_NAMES = ("score", "value", "target", "rating", "similarity", *_LABEL_NAMES)
# What stands between the labels of one cell.
_SEPARATORS = re.compile(r"\s*[;|,]\s*")


class _Reader:
    """Columns of texts, pairs of texts and labels; what a label is, is for the kinds below."""

    has_labels = True
    usual_names: tuple[str, ...] = _LABEL_NAMES

    def find_columns(self, table: Table, named: Named, progress: Progress) -> Columns:
        text, pair, label, group = (named.get(name) for name in ("text", "text_pair", "label", "group"))
        check_named(table, text=text, text_pair=pair, label=label, group=group)
        return Columns(
            text or guess(table, "text", TEXT_NAMES, progress),
            pair,
            label or guess(table, "label", self.usual_names, progress),
            group,
        )

    def _row(self, table: Table, split: str, columns: Columns, index: int, **said: Any) -> Row:
        text = text_of(table, index, columns.text)
        pair = text_of(table, index, columns.text_pair) if columns.text_pair else None
        group = group_of(table, index, columns)
        return Row(f"{split}:{table.lines[index]}", text, pair, group=group, **said)


class ClassReader(_Reader):
    """One label a text."""

    def label_names(self, table: Table, columns: Columns) -> list[str]:
        """Every label in `table`, whole numbers in their order, else sorted as text.

        Raises:
            DataError: labels are missing, there is one class only, or nearly as many as rows.
        """
        labels = _named_labels(table, columns)
        counts = Counter(labels)
        if len(counts) < 2:
            raise DataError(
                f"{table.source}: column {columns.label!r} holds one class only ({labels[0]!r}); "
                "there is nothing to learn"
            )
        if len(counts) > len(table.rows) // 2:
            raise DataError(
                f"{table.source}: {len(counts)} classes in {len(table.rows)} rows: each class needs at least two "
                f"rows; is {columns.label!r} the label column? (set --label-column, or --task regression)"
            )
        return in_order(counts)

    def rows(self, table: Table, split: str, columns: Columns, names: list[str]) -> list[Row]:
        labels = _named_labels(table, columns)
        numbers = {name: number for number, name in enumerate(names)}
        return [self._row(table, split, columns, index, label=_number_of(table, index, name, numbers))
                for index, name in enumerate(labels)]  # fmt: skip


class SeveralReader(_Reader):
    """Any number of labels a text: a list, or one cell with `;`, `|` or `,` between them; none is allowed."""

    usual_names = _SEVERAL_NAMES

    def label_names(self, table: Table, columns: Columns) -> list[str]:
        counts = Counter(name for index in range(len(table.rows)) for name in _several(table, index, columns))
        if len(counts) < 2:
            raise DataError(
                f"{table.source}: column {columns.label!r} holds {len(counts)} different labels; several are needed "
                "(a list, or labels with ; between them)"
            )
        if len(counts) > len(table.rows):
            raise DataError(
                f"{table.source}: {len(counts)} labels in {len(table.rows)} rows; is {columns.label!r} the label "
                "column? (set --label-column)"
            )
        return in_order(counts)

    def rows(self, table: Table, split: str, columns: Columns, names: list[str]) -> list[Row]:
        numbers = {name: number for number, name in enumerate(names)}
        rows = []
        for index in range(len(table.rows)):
            found = {_number_of(table, index, name, numbers) for name in _several(table, index, columns)}
            rows.append(self._row(table, split, columns, index, labels=sorted(found)))
        return rows


class ValueReader(_Reader):
    """A number a text."""

    usual_names = _VALUE_NAMES

    def label_names(self, table: Table, columns: Columns) -> list[str]:
        values = {_value(table, index, columns) for index in range(len(table.rows))}
        if len(values) < 2:
            raise DataError(f"{table.source}: column {columns.label!r} holds one value only; there is nothing to learn")
        return []

    def rows(self, table: Table, split: str, columns: Columns, names: list[str]) -> list[Row]:
        return [self._row(table, split, columns, index, value=_value(table, index, columns))
                for index in range(len(table.rows))]  # fmt: skip


def name_of_label(value: Any) -> str | None:
    """A label's name: text as it stands, whole numbers without a point; None where it is missing."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def in_order(names: Iterable[str]) -> list[str]:
    """Whole numbers in their order, then all else as text."""
    return sorted(names, key=lambda name: (0, int(name), "") if _is_int(name) else (1, 0, name))


def _is_int(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _named_labels(table: Table, columns: Columns) -> list[str]:
    """The label of every row.

    Raises:
        DataError: some are missing (how many, and the first).
    """
    labels = [name_of_label(row.get(columns.label or "")) for row in table.rows]
    missing = [index for index, name in enumerate(labels) if name is None]
    if missing:
        raise DataError(
            f"{table.place(missing[0])}: the label in column {columns.label!r} is missing or empty "
            f"({len(missing)} of {len(labels)} rows, this is the first); fill or remove these rows"
        )
    return [name for name in labels if name is not None]


def _several(table: Table, index: int, columns: Columns) -> list[str]:
    value = table.rows[index].get(columns.label or "")
    parts = value if isinstance(value, list) else _SEPARATORS.split(str("" if value is None else value))
    return [name for part in parts if (name := name_of_label(part)) is not None]


def _value(table: Table, index: int, columns: Columns) -> float:
    found = table.rows[index].get(columns.label or "")
    try:
        value = float(found)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(
            f"{table.place(index)}: column {columns.label!r} holds {found!r} where a number is needed; "
            "fix or remove the row"
        )
    return value


def _number_of(table: Table, index: int, name: str, numbers: dict[str, int]) -> int:
    if name not in numbers:
        names = list(numbers)
        raise DataError(
            f"{table.place(index)}: label {name!r} does not occur in the training rows "
            f"({', '.join(names[:10])}{', …' if len(names) > 10 else ''});"
            " add such rows to train, or remove it here"
        )
    return numbers[name]
