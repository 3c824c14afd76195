"""Rows of a prompt and two answers, one of them preferred: plain texts, or chats that differ in their last turn."""

from __future__ import annotations

from trimtab.data.columns import Columns, Named, check_named, group_of, guess, look_for, text_of
from trimtab.data.language import PROMPT_NAMES, messages_of
from trimtab.data.reading import Table
from trimtab.data.rows import Row
from trimtab.errors import DataError
from trimtab.progress import Progress

_CHOSEN_NAMES = ("chosen", "preferred", "accepted")
_REJECTED_NAMES = ("rejected", "dispreferred", "refused")


class PreferenceReader:
    """A prompt, a chosen and a rejected answer; the prompt may be part of chats."""

    has_labels = False

    def find_columns(self, table: Table, named: Named, progress: Progress) -> Columns:
        text, chosen, rejected, group = (named.get(name) for name in ("text", "chosen", "rejected", "group"))
        check_named(table, text=text, chosen=chosen, rejected=rejected, group=group)
        chosen = chosen or guess(table, "chosen", _CHOSEN_NAMES, progress)
        rejected = rejected or guess(table, "rejected", _REJECTED_NAMES, progress)
        if table.rows and isinstance(table.rows[0].get(chosen), list):
            return Columns(chosen, group=group, messages=chosen, chosen=chosen, rejected=rejected)
        text = text or look_for(table, PROMPT_NAMES) or guess(table, "text", PROMPT_NAMES, progress)
        return Columns(text, group=group, chosen=chosen, rejected=rejected)

    def label_names(self, table: Table, columns: Columns) -> list[str]:
        return []

    def rows(self, table: Table, split: str, columns: Columns, names: list[str]) -> list[Row]:
        read = _read_chats if columns.messages else _read_texts
        rows = []
        for index in range(len(table.rows)):
            row = read(table, index, f"{split}:{table.lines[index]}", columns)
            if row.completion == row.rejected:
                raise DataError(f"{table.place(index)}: chosen and rejected are the same answer; remove the row")
            rows.append(row)
        return rows


def _read_texts(table: Table, index: int, number: str, columns: Columns) -> Row:
    chosen, rejected = (text_of(table, index, column or "") for column in (columns.chosen, columns.rejected))
    group = group_of(table, index, columns)
    return Row(number, text_of(table, index, columns.text), group=group, completion=chosen, rejected=rejected)


def _read_chats(table: Table, index: int, number: str, columns: Columns) -> Row:
    chosen, rejected = (messages_of(table, index, column or "") for column in (columns.chosen, columns.rejected))
    if chosen[:-1] != rejected[:-1] or any(chat[-1]["role"] != "assistant" for chat in (chosen, rejected)):
        raise DataError(
            f"{table.place(index)}: the chats in {columns.chosen!r} and {columns.rejected!r} must be the same up to "
            "their last turn, which is the assistant's; fix or remove the row"
        )
    text = "\n".join(turn["content"] for turn in chosen[:-1])
    return Row(number, text, group=group_of(table, index, columns), completion=chosen[-1]["content"],
               messages=chosen[:-1], rejected=rejected[-1]["content"])  # fmt: skip
