"""One example, and the file in the run folder that keeps examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.runs import read_jsonl, write_jsonl


@dataclass(frozen=True)
class Row:
    """`id` is `split:number` as in the source, from 1.

    What is to be said of the text depends on the task: `label` indexes the label names; `labels` do, too,
    one for each of `words`, or those that apply to the whole text; `value` is a number. For language models
    `text` is a whole text, or a prompt or source where there is a `completion`; a chat has its `messages` (role and
    content), and what the assistant says as its text. Where an answer was preferred, `completion` is the chosen
    and `rejected` the other one, to the prompt or to the chat so far.
    """

    id: str
    text: str
    text_pair: str | None = None
    label: int = 0
    group: str | None = None
    completion: str | None = None
    messages: list[dict[str, str]] | None = None
    labels: list[int] | None = None
    words: list[str] | None = None
    value: float | None = None
    rejected: str | None = None


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    write_jsonl(path, map(asdict, rows))


def groups_of(rows: Sequence[Row]) -> list[str] | None:
    """The group of each row, where all have one."""
    groups = [row.group for row in rows if row.group is not None]
    return groups if rows and len(groups) == len(rows) else None


def read_rows(path: Path) -> list[Row]:
    return [Row(**row) for row in read_jsonl(path)]
