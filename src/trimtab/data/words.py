"""Rows of words with a tag each."""

from __future__ import annotations

from collections import Counter
from typing import Any

from trimtab.data.columns import Columns, Named, check_named, group_of, guess
from trimtab.data.labels import in_order, name_of_label
from trimtab.data.reading import Table
from trimtab.data.rows import Row
from trimtab.errors import DataError
from trimtab.progress import Progress

_WORD_NAMES = ("tokens", "words", "text", "sentence")
_TAG_NAMES = ("ner_tags", "tags", "labels", "pos_tags", "label")


class TagReader:
    """A list of words, or words with blanks between them, and as many tags."""

    has_labels = True

    def find_columns(self, table: Table, named: Named, progress: Progress) -> Columns:
        text, label, group = (named.get(name) for name in ("text", "label", "group"))
        check_named(table, text=text, label=label, group=group)
        words = text or guess(table, "text", _WORD_NAMES, progress)
        return Columns(words, label=label or guess(table, "label", _TAG_NAMES, progress), group=group)

    def label_names(self, table: Table, columns: Columns) -> list[str]:
        counts = Counter(tag for index in range(len(table.rows)) for tag in _pair(table, index, columns)[1])
        if len(counts) < 2:
            raise DataError(f"{table.source}: column {columns.label!r} holds one tag only; there is nothing to learn")
        # A tag that begins an entity may be the only one of its kind: what goes on with it can be missing in train.
        return in_order(counts)

    def rows(self, table: Table, split: str, columns: Columns, names: list[str]) -> list[Row]:
        numbers = {name: number for number, name in enumerate(names)}
        rows = []
        for index in range(len(table.rows)):
            words, tags = _pair(table, index, columns)
            strange = next((tag for tag in tags if tag not in numbers), None)
            if strange is not None:
                raise DataError(
                    f"{table.place(index)}: tag {strange!r} does not occur in the training rows "
                    f"({', '.join(names[:10])}{', …' if len(names) > 10 else ''});"
                    " add such rows to train, or remove it here"
                )
            rows.append(
                Row(f"{split}:{table.lines[index]}", " ".join(words), group=group_of(table, index, columns),
                    words=words, labels=[numbers[tag] for tag in tags])
            )  # fmt: skip
        return rows


def _pair(table: Table, index: int, columns: Columns) -> tuple[list[str], list[str]]:
    """Words and tags of a row.

    Raises:
        DataError: none, missing ones, or not as many of the one as of the other.
    """
    row = table.rows[index]
    words, tags = _list_of(row.get(columns.text)), _list_of(row.get(columns.label or ""))
    if not words or None in words:
        raise DataError(
            f"{table.place(index)}: column {columns.text!r} holds no list of words (found "
            f"{str(row.get(columns.text))[:60]!r}); fill or remove the row"
        )
    if len(words) != len(tags):
        raise DataError(
            f"{table.place(index)}: {len(words)} words and {len(tags)} tags; each word needs one: fix or remove it"
        )
    if None in tags:
        raise DataError(f"{table.place(index)}: word {tags.index(None) + 1} has no tag; fix or remove the row")
    return [str(word) for word in words], [str(tag) for tag in tags]


def _list_of(value: Any) -> list[str | None]:
    parts = value if isinstance(value, list) else str("" if value is None else value).split()
    return [name_of_label(part) for part in parts]
