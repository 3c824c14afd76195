"""Rows in, what an adapter says of them or writes after them out: streamed, so memory does not grow with the rows."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from trimtab.adapters import LoadedAdapter
from trimtab.data.reading import stream_file
from trimtab.engine.frozen import NumberFormat
from trimtab.errors import DataError, StudyError
from trimtab.evaluation.unlabelled import Record, row_without_label, text_in
from trimtab.generation import Sampling
from trimtab.progress import Progress, Silent
from trimtab.runs import parse_jsonl, write_file

OutputFormat = Literal["jsonl", "csv", "parquet"]
# Rows that are held at once.
ROWS_AT_ONCE = 512
_PROMPTS_AT_ONCE = 16
STREAM = "-"


def predict_records(
    adapter: LoadedAdapter,
    records: Iterable[tuple[Record, int]],
    source: str,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    precision: NumberFormat = "float32",
    progress: Progress | None = None,
) -> Iterator[Record]:
    """Each record with what the adapter says of it: `prediction`, and `probabilities` where it has some.

    Args:
        records: cells by column, and the line that they came from.
        source: what errors call them.
        text_column, text_pair_column: if missing, those that the adapter was trained on; else found by name.
        precision: of the frozen layers; in int8 those compute whose error on the first rows is within bounds.

    Raises:
        DataError: a record without a text (with its line).
        StudyError: a language model, which writes and says no label.
    """
    task = adapter.scorer.task
    if not adapter.predicts:
        raise StudyError(f"{adapter.path} is a {task.name} adapter, which writes texts: try `trimtab generate`")
    listener, done = progress or Silent(), 0
    columns = adapter.facts.get("columns", {})
    pair_column = text_pair_column or columns.get("text_pair")
    stream = iter(records)
    while chunk := list(itertools.islice(stream, ROWS_AT_ONCE)):
        text_column = text_column or _found_in(chunk[0][0], columns.get("text"))
        rows = [
            row_without_label(task.name, record, f"{source}:{line}", text_column, pair_column) for record, line in chunk
        ]
        if not done and precision != "float32":
            adapter.compute_in(precision, rows, listener)
        for (record, _), said in zip(chunk, adapter.predict_rows(rows), strict=True):
            yield record | said
        done += len(chunk)
        listener.advance(done, done, "rows")


def generate_records(
    adapter: LoadedAdapter,
    records: Iterable[tuple[Record, int]],
    source: str,
    *,
    text_column: str | None = None,
    sampling: Sampling | None = None,
    is_chat: bool | None = None,
    compare: bool = False,
    progress: Progress | None = None,
) -> Iterator[Record]:
    """Each record with what the adapter writes after its text, as `generated`; and the base, as `base`, to `compare`.

    Raises:
        DataError: a record without a text (with its line).
        AdapterError: an adapter that writes nothing.
    """
    listener, done = progress or Silent(), 0
    stream = iter(records)
    while chunk := list(itertools.islice(stream, _PROMPTS_AT_ONCE)):
        text_column = text_column or _found_in(chunk[0][0], adapter.facts.get("columns", {}).get("text"))
        prompts = [text_in(record, f"{source}:{line}", text_column) for record, line in chunk]
        tuned = adapter.generate(prompts, sampling, is_chat=is_chat)
        base: list[str] = []
        if compare:
            with adapter.disable():
                base = adapter.generate(prompts, sampling, is_chat=is_chat)
        for place, (record, _) in enumerate(chunk):
            yield record | {"generated": tuned[place]} | ({"base": base[place]} if compare else {})
        done += len(chunk)
        listener.advance(done, done, "prompts")


def _found_in(record: Record, column: str | None) -> str | None:
    return column if column in record else None


def read_records(source: str, stdin: IO[str] | None = None) -> Iterator[tuple[Record, int]]:
    """The rows of a file, or of standard input: JSON objects, or a plain text a line.

    Raises:
        DataError, SourceError: as for training data, with file and line.
    """
    if source != STREAM:
        yield from stream_file(Path(source).expanduser())
        return
    lines = stdin or sys.stdin
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise DataError("standard input holds no rows; give a text on each line, or JSON objects")
    whole = itertools.chain([first], lines)
    if first.lstrip().startswith("{"):
        yield from parse_jsonl(whole, Path("stdin"))
    else:
        yield from (({"text": line.rstrip("\n")}, number) for number, line in enumerate(whole, 1) if line.strip())


def write_records(records: Iterable[Record], out: str, output_format: OutputFormat | None = None) -> int:
    """Write records to a file, whole or not at all, or to standard output; returns how many.

    Args:
        output_format: told by the file's name, if missing; CSV has a column for each probability.

    Raises:
        DataError: a format that is not known by its name.
    """
    if out == STREAM:
        return _WRITERS[output_format or "jsonl"](records, sys.stdout)
    path = Path(out).expanduser()
    found = output_format or path.suffix.removeprefix(".").lower()
    if found not in _WRITERS:
        raise DataError(f"{out}: format not known by its name; use {', '.join(_WRITERS)}, or --format")
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        if found == "parquet":
            count = _write_parquet(records, temporary)
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            count = _WRITERS[found](records, file)

    write_file(path, write)
    return count


def _write_jsonl(records: Iterable[Record], file: IO[str]) -> int:
    count = 0
    for record in records:
        count += 1
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if file is sys.stdout:
            file.flush()
    return count


def _write_csv(records: Iterable[Record], file: IO[str]) -> int:
    writer, count = None, 0
    for record in map(_flatten, records):
        count += 1
        if writer is None:
            writer = csv.DictWriter(file, list(record), extrasaction="ignore")
            writer.writeheader()
        writer.writerow(record)
    return count


def _flatten(record: Record) -> Record:
    """Cells for a table: lists as JSON, a column for each probability."""
    cells = {name: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
             for name, value in record.items() if name != "probabilities"}  # fmt: skip
    return cells | {f"probability_{name}": share for name, share in record.get("probabilities", {}).items()}


def _write_parquet(records: Iterable[Record], path: Any) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream, count, writer = map(_flatten, records), 0, None
    try:
        while chunk := list(itertools.islice(stream, ROWS_AT_ONCE)):
            table = pa.Table.from_pylist(chunk, schema=writer.schema if writer else None)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            count += len(chunk)
    finally:
        if writer:
            writer.close()
    return count


_WRITERS: dict[str, Callable[[Iterable[Record], Any], int]] = {
    "jsonl": _write_jsonl,
    "csv": _write_csv,
    "parquet": _write_parquet,
}
