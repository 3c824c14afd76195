"""Rows of two texts, of which the second is to be written: sources and targets."""

from __future__ import annotations

from trimtab.data.columns import TEXT_NAMES, Columns, Named, check_named, group_of, guess, text_of
from trimtab.data.reading import Table
from trimtab.data.rows import Row
from trimtab.errors import DataError
from trimtab.progress import Progress

_SOURCE_NAMES = ("source", "input", "prompt", "article", "dialogue", *TEXT_NAMES)
_TARGET_NAMES = ("target", "output", "summary", "highlights", "translation", "answer", "completion", "response")


class AnswerReader:
    """A source and a target in each row."""

    has_labels = False

    def find_columns(self, table: Table, named: Named, progress: Progress) -> Columns:
        text, target, group = (named.get(name) for name in ("text", "target", "group"))
        check_named(table, text=text, target=target, group=group)
        text = text or guess(table, "text", _SOURCE_NAMES, progress)
        target = target or guess(table, "target", _TARGET_NAMES, progress)
        if text == target:
            raise DataError(f"{table.source}: source and target are both column {text!r}; name two columns")
        return Columns(text, group=group, target=target)

    def label_names(self, table: Table, columns: Columns) -> list[str]:
        return []

    def rows(self, table: Table, split: str, columns: Columns, names: list[str]) -> list[Row]:
        return [
            Row(
                f"{split}:{table.lines[index]}",
                text_of(table, index, columns.text),
                group=group_of(table, index, columns),
                completion=text_of(table, index, columns.target or ""),
            )
            for index in range(len(table.rows))
        ]
