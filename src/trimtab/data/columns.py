"""Which column is which, and labels as numbers with names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from trimtab.data.reading import Table
from trimtab.data.rows import Row
from trimtab.errors import DataError, suggest
from trimtab.progress import Progress

_TEXT_NAMES = ("text", "sentence", "review", "content", "body", "message", "comment", "tweet", "document",
               "question", "title")  # fmt: skip
_LABEL_NAMES = ("label", "labels", "category", "class", "target", "sentiment", "topic", "rating", "y")


@dataclass(frozen=True)
class Columns:
    text: str
    text_pair: str | None
    label: str
    group: str | None


def find_columns(
    table: Table,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    group: str | None,
    progress: Progress,
) -> Columns:
    """Named columns are checked; missing ones are found by name, and the guess is noted.

    Raises:
        DataError: a named column is not there, or none of the usual names is.
    """
    for flag, name in (("text", text), ("text-pair", text_pair), ("label", label), ("group", group)):
        if name is not None and name not in table.columns:
            raise DataError(
                f"{table.source}: no column {name!r}{suggest(name, table.columns)}; "
                f"its columns are: {', '.join(table.columns)} (set --{flag}-column)"
            )
    return Columns(
        text or _guess(table, "text", _TEXT_NAMES, progress),
        text_pair,
        label or _guess(table, "label", _LABEL_NAMES, progress),
        group,
    )


def _guess(table: Table, what: str, usual: tuple[str, ...], progress: Progress) -> str:
    lowered = {column.lower(): column for column in table.columns}
    for name in usual:
        if name in lowered:
            progress.note(f"{what} column: {lowered[name]!r} (by its name; --{what}-column chooses another)")
            return lowered[name]
    raise DataError(
        f"{table.source}: no column looks like the {what}; "
        f"its columns are: {', '.join(table.columns)}; name one with --{what}-column"
    )


def name_of_label(value: Any) -> str | None:
    """A label's name: text as it stands, whole numbers without a point; None where it is missing."""
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def label_names(table: Table, columns: Columns) -> list[str]:
    """Every label in `table`, whole numbers in their order, else sorted as text.

    Raises:
        DataError: labels are missing, there is one class only, or nearly as many as rows.
    """
    counts: Counter[str] = Counter()
    missing: list[int] = []
    for index, row in enumerate(table.rows):
        name = name_of_label(row.get(columns.label))
        if name is None:
            missing.append(index)
        else:
            counts[name] += 1
    if missing:
        _refuse_missing(table, columns, missing)
    if len(counts) < 2:
        only = next(iter(counts))
        raise DataError(
            f"{table.source}: column {columns.label!r} holds one class only ({only!r}); there is nothing to learn"
        )
    if len(counts) > len(table.rows) // 2:
        raise DataError(
            f"{table.source}: {len(counts)} classes in {len(table.rows)} rows: each class needs at least two "
            f"rows; is {columns.label!r} the label column? (set --label-column)"
        )
    return sorted(counts, key=lambda name: (0, int(name), "") if _is_int(name) else (1, 0, name))


def _is_int(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _refuse_missing(table: Table, columns: Columns, missing: list[int]) -> None:
    raise DataError(
        f"{table.place(missing[0])}: the label in column {columns.label!r} is missing or empty "
        f"({len(missing)} of {len(table.rows)} rows, this is the first); fill or remove these rows"
    )


def to_rows(table: Table, split: str, columns: Columns, names: list[str]) -> list[Row]:
    """Typed rows with ids and label numbers.

    Raises:
        DataError: a text is missing, a label is missing, or one that train does not know.
    """
    numbers = {name: number for number, name in enumerate(names)}
    rows: list[Row] = []
    missing = [i for i, row in enumerate(table.rows) if name_of_label(row.get(columns.label)) is None]
    if missing:
        _refuse_missing(table, columns, missing)
    for index, row in enumerate(table.rows):
        name = name_of_label(row[columns.label]) or ""
        if name not in numbers:
            raise DataError(
                f"{table.place(index)}: label {name!r} does not occur in the training rows "
                f"({', '.join(names[:10])}{', …' if len(names) > 10 else ''});"
                " add such rows to train, or remove it here"
            )
        text = _text_of(table, index, columns.text)
        pair = _text_of(table, index, columns.text_pair) if columns.text_pair else None
        group = None if columns.group is None else str(row.get(columns.group))
        rows.append(Row(f"{split}:{table.lines[index]}", text, pair, numbers[name], group))
    return rows


def _text_of(table: Table, index: int, column: str) -> str:
    value = table.rows[index].get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{table.place(index)}: no text in column {column!r} (found {value!r}); fill or remove the row")
    return value
