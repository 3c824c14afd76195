"""Which column is which: named ones are checked, missing ones found by their usual names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trimtab.data.reading import Table
from trimtab.errors import DataError, suggest
from trimtab.progress import Progress

TEXT_NAMES = ("text", "sentence", "review", "content", "body", "message", "comment", "tweet", "document",
              "question", "title")  # fmt: skip

# Columns that the study names, by what they are for; None where it names none.
Named = Mapping[str, str | None]


@dataclass(frozen=True)
class Columns:
    """Names of columns; those that a task or a table has not are None."""

    text: str
    text_pair: str | None = None
    label: str | None = None
    group: str | None = None
    completion: str | None = None
    target: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    messages: str | None = None

    @property
    def named(self) -> Named:
        """As a study would have named them all."""
        return vars(self)


def check_named(table: Table, **named: str | None) -> None:
    """Refuse names that the table does not have.

    Raises:
        DataError: with the nearest, and all that there are.
    """
    for flag, name in named.items():
        if name is not None and name not in table.columns:
            raise DataError(
                f"{table.source}: no column {name!r}{suggest(name, table.columns)}; "
                f"its columns are: {', '.join(table.columns)} (set --{flag.replace('_', '-')}-column)"
            )


def look_for(table: Table, names: tuple[str, ...]) -> str | None:
    """The first of `names` that the table has, in whichever case."""
    lowered = {column.lower(): column for column in table.columns}
    return next((lowered[name] for name in names if name in lowered), None)


def guess(table: Table, what: str, usual: tuple[str, ...], progress: Progress) -> str:
    """The column that is `what` by its name; says so.

    Raises:
        DataError: none is.
    """
    found = look_for(table, usual)
    if found:
        progress.note(f"{what} column: {found!r} (by its name; --{what}-column chooses another)")
        return found
    raise DataError(
        f"{table.source}: no column looks like the {what}; "
        f"its columns are: {', '.join(table.columns)}; name one with --{what}-column"
    )


def text_of(table: Table, index: int, column: str) -> str:
    """A cell's text.

    Raises:
        DataError: there is none.
    """
    value = table.rows[index].get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{table.place(index)}: no text in column {column!r} (found {value!r}); fill or remove the row")
    return value


def group_of(table: Table, index: int, columns: Columns) -> str | None:
    """A row's group, where rows have groups.

    Raises:
        DataError: this one has none.
    """
    if columns.group is None:
        return None
    value = table.rows[index].get(columns.group)
    if value is None or not str(value).strip():
        raise DataError(
            f"{table.place(index)}: no group in column {columns.group!r}; fill it (a value of its own where a row "
            "belongs to no other), or remove the row"
        )
    return str(value)
