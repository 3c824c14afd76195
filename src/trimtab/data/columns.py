"""Which column is which, labels as numbers with names, and tables as typed rows."""

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


_PROMPT_NAMES = ("prompt", "instruction", "question", "input")
_COMPLETION_NAMES = ("completion", "response", "answer", "output")
_MESSAGES_NAMES = ("messages", "conversations", "conversation")
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Columns:
    """Names of columns; those that a task or a table has not are None."""

    text: str
    text_pair: str | None = None
    label: str | None = None
    group: str | None = None
    completion: str | None = None
    messages: str | None = None


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
    _check_named(table, text=text, text_pair=text_pair, label=label, group=group)
    return Columns(
        text or _guess(table, "text", _TEXT_NAMES, progress),
        text_pair,
        label or _guess(table, "label", _LABEL_NAMES, progress),
        group,
    )


def find_language_columns(
    table: Table,
    text: str | None,
    completion: str | None,
    messages: str | None,
    group: str | None,
    progress: Progress,
) -> Columns:
    """Columns for language modelling: chats, else prompts with completions, else plain texts.

    Raises:
        DataError: a named column is not there, or none of the usual names is.
    """
    _check_named(table, text=text, completion=completion, messages=messages, group=group)
    found = messages or (None if text or completion else _look_for(table, _MESSAGES_NAMES))
    if found:
        if not messages:
            progress.note(f"chats in column {found!r} (by its name; --text-column chooses another)")
        return Columns(found, group=group, messages=found)
    learnt = completion or (None if text else _look_for(table, _COMPLETION_NAMES))
    prompt = text or (_look_for(table, _PROMPT_NAMES) if learnt else None)
    if learnt and prompt and learnt != prompt:
        if not (completion and text):
            progress.note(f"prompts in column {prompt!r}, completions in {learnt!r}: only the completions are learnt")
        return Columns(prompt, group=group, completion=learnt)
    return Columns(text or _guess(table, "text", _TEXT_NAMES, progress), group=group)


def _look_for(table: Table, names: tuple[str, ...]) -> str | None:
    lowered = {column.lower(): column for column in table.columns}
    return next((lowered[name] for name in names if name in lowered), None)


def _check_named(table: Table, **named: str | None) -> None:
    for flag, name in named.items():
        if name is not None and name not in table.columns:
            raise DataError(
                f"{table.source}: no column {name!r}{suggest(name, table.columns)}; "
                f"its columns are: {', '.join(table.columns)} (set --{flag.replace('_', '-')}-column)"
            )


def _guess(table: Table, what: str, usual: tuple[str, ...], progress: Progress) -> str:
    found = _look_for(table, usual)
    if found:
        progress.note(f"{what} column: {found!r} (by its name; --{what}-column chooses another)")
        return found
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
        name = name_of_label(row.get(str(columns.label)))
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
    missing = [i for i, row in enumerate(table.rows) if name_of_label(row.get(str(columns.label))) is None]
    if missing:
        _refuse_missing(table, columns, missing)
    for index, row in enumerate(table.rows):
        name = name_of_label(row[str(columns.label)]) or ""
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


def to_language_rows(table: Table, split: str, columns: Columns) -> list[Row]:
    """Typed rows for language modelling.

    Raises:
        DataError: a text or completion is missing, or a chat is not a list of turns.
    """
    rows = []
    for index, row in enumerate(table.rows):
        number = f"{split}:{table.lines[index]}"
        group = None if columns.group is None else str(row.get(columns.group))
        if columns.messages:
            messages = _messages_of(table, index, columns.messages)
            text = "\n".join(message["content"] for message in messages if message["role"] == "assistant")
            rows.append(Row(number, text, group=group, messages=messages))
        else:
            completion = _text_of(table, index, columns.completion) if columns.completion else None
            rows.append(Row(number, _text_of(table, index, columns.text), group=group, completion=completion))
    return rows


def _messages_of(table: Table, index: int, column: str) -> list[dict[str, str]]:
    """The turns of a chat, as `role` and `content`, whichever of the two usual spellings they have."""
    value = table.rows[index].get(column)
    place = f"{table.place(index)}: column {column!r}"
    if not isinstance(value, list) or not value:
        raise DataError(f"{place} holds no list of turns (found {str(value)[:60]!r}); fix or remove the row")
    messages = []
    for number, turn in enumerate(value, 1):
        turn = turn if isinstance(turn, dict) else {}
        role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
        role = {"human": "user", "gpt": "assistant"}.get(str(role), role)
        if role not in _ROLES or not isinstance(content, str) or not content:
            raise DataError(
                f"{place}, turn {number}: needs a role ({', '.join(_ROLES)}) and content; found {str(turn)[:60]!r}"
            )
        messages.append({"role": str(role), "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{place} has no turn of the assistant, so there is nothing to learn; fix or remove the row")
    return messages


def _text_of(table: Table, index: int, column: str) -> str:
    value = table.rows[index].get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{table.place(index)}: no text in column {column!r} (found {value!r}); fill or remove the row")
    return value
