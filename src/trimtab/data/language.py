"""Rows for language modelling: plain texts, prompts with completions, and chats."""

from __future__ import annotations

from trimtab.data.columns import TEXT_NAMES, Columns, Named, check_named, group_of, guess, look_for, text_of
from trimtab.data.reading import Table
from trimtab.data.rows import Row
from trimtab.errors import DataError
from trimtab.progress import Progress

PROMPT_NAMES = ("prompt", "instruction", "question", "input")
_COMPLETION_NAMES = ("completion", "response", "answer", "output")
_MESSAGES_NAMES = ("messages", "conversations", "conversation")
_ROLES = ("system", "user", "assistant", "tool")


class LanguageReader:
    """Chats where there are any, else prompts with completions, else plain texts."""

    has_labels = False

    def find_columns(self, table: Table, named: Named, progress: Progress) -> Columns:
        text, completion, messages, group = (named.get(name) for name in ("text", "completion", "messages", "group"))
        check_named(table, text=text, completion=completion, messages=messages, group=group)
        found = messages or (None if text or completion else look_for(table, _MESSAGES_NAMES))
        if found:
            if not messages:
                progress.note(f"chats in column {found!r} (by its name; --messages-column chooses another)")
            return Columns(found, group=group, messages=found)
        learnt = completion or (None if text else look_for(table, _COMPLETION_NAMES))
        prompt = text or (look_for(table, PROMPT_NAMES) if learnt else None)
        if learnt and prompt and learnt != prompt:
            if not (completion and text):
                progress.note(
                    f"prompts in column {prompt!r}, completions in {learnt!r}: only the completions are learnt"
                )
            return Columns(prompt, group=group, completion=learnt)
        return Columns(text or guess(table, "text", TEXT_NAMES, progress), group=group)

    def label_names(self, table: Table, columns: Columns) -> list[str]:
        return []

    def rows(self, table: Table, split: str, columns: Columns, names: list[str]) -> list[Row]:
        rows = []
        for index in range(len(table.rows)):
            number, group = f"{split}:{table.lines[index]}", group_of(table, index, columns)
            if columns.messages:
                messages = messages_of(table, index, columns.messages)
                text = "\n".join(message["content"] for message in messages if message["role"] == "assistant")
                rows.append(Row(number, text, group=group, messages=messages))
            else:
                completion = text_of(table, index, columns.completion) if columns.completion else None
                rows.append(Row(number, text_of(table, index, columns.text), group=group, completion=completion))
        return rows


def messages_of(table: Table, index: int, column: str) -> list[dict[str, str]]:
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
