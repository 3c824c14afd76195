"""One example, and the file in the run folder that keeps examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trimtab.runs import read_jsonl, write_jsonl


@dataclass(frozen=True)
class Row:
    """`label` indexes the label names; `id` is `split:number` as in the source, from 1."""

    id: str
    text: str
    text_pair: str | None
    label: int
    group: str | None


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    write_jsonl(path, map(asdict, rows))


def read_rows(path: Path) -> list[Row]:
    return [Row(**row) for row in read_jsonl(path)]
