"""Rows from files and streams, and what is written beside them: JSONL, CSV, Parquet; never all in memory."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

from trimtab.data.reading import ArrivingRows, stream_file
from trimtab.errors import DataError
from trimtab.evaluation.unlabelled import Record
from trimtab.progress import Progress, Silent
from trimtab.runs import write_file

OutputFormat = Literal["jsonl", "csv", "parquet"]
# Rows that are held at once.
ROWS_AT_ONCE = 512
STREAM = "-"


def read_records(source: str, stdin: IO[bytes] | None = None) -> Iterable[tuple[Record, int]]:
    """The rows of a file, or of standard input: JSON objects, or a plain text a line.

    Of a file the first row is read at once, so that one that cannot be used is told before anything is loaded.

    Raises:
        DataError, SourceError: as for training data, with file and line.
    """
    if source == STREAM:
        return ArrivingRows(stdin or sys.stdin.buffer)
    rows = stream_file(Path(source).expanduser(), is_labelled=False)
    return itertools.chain([next(rows)], rows)


def check_output(out: str, output_format: OutputFormat | None = None) -> OutputFormat:
    """The format that records will be written in: told by the file's name, if missing.

    Raises:
        DataError: a format that is not known by its name, or that is no stream of text.
    """
    if out == STREAM and output_format == "parquet":
        raise DataError("Parquet is no stream of text; give a file: --out found.parquet")
    if out == STREAM:
        return output_format or "jsonl"
    found = output_format or Path(out).suffix.removeprefix(".").lower()
    if found not in _WRITERS:
        raise DataError(f"{out}: format not known by its name; use {', '.join(_WRITERS)}, or --format")
    return cast(OutputFormat, found)


def write_records(
    records: Iterable[Record], out: str, output_format: OutputFormat | None = None, progress: Progress | None = None
) -> int:
    """Write records to a file, whole or not at all, or to standard output; returns how many.

    Args:
        output_format: told by the file's name, if missing; CSV and Parquet have a column for each probability.
        progress: told once of columns of the input that these replace.

    Raises:
        DataError: as `check_output`, or columns that the format cannot hold.
    """
    found = check_output(out, output_format)
    if found != "jsonl":
        records = _as_cells(records, progress or Silent())
    if out == STREAM:
        return _WRITERS[found](records, sys.stdout)
    path = Path(out).expanduser()
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


def put_beside(
    records: Sequence[Record], found: Sequence[Record], replaced: set[str], progress: Progress
) -> Iterator[Record]:
    """Each record with what was found; tells the columns that are lost by it, once, and adds them to `replaced`."""
    lost = {name for record, said in zip(records, found, strict=True) for name in record.keys() & said.keys()
            if record[name] != said[name]} - replaced  # fmt: skip
    if lost:
        names = ", ".join(map(repr, sorted(lost)))
        progress.note(f"what the adapter says replaces columns of the input: {names}; rename them to keep both")
        replaced |= lost
    yield from (record | said for record, said in zip(records, found, strict=True))


def _write_jsonl(records: Iterable[Record], file: IO[str]) -> int:
    count = 0
    for record in records:
        count += 1
        file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        if file is sys.stdout:
            file.flush()
    return count


def _write_csv(records: Iterable[Record], file: IO[str]) -> int:
    writer, count = None, 0
    for record in records:
        count += 1
        if writer is None:
            writer = csv.DictWriter(file, list(record))
            writer.writeheader()
        writer.writerow(record)
        if file is sys.stdout:
            file.flush()
    return count


def _as_cells(records: Iterable[Record], progress: Progress) -> Iterator[Record]:
    """Cells for a table, whose columns are those of the first record: lists as JSON, a column for each probability.

    Raises:
        DataError: a record with another column.
    """
    columns: dict[str, None] = {}
    replaced: set[str] = set()
    for number, record in enumerate(records, 1):
        cells: Record = {}
        for name, value in record.items():
            if name == "probabilities" and isinstance(value, dict):
                shares = {f"probability_{label}": share for label, share in value.items()}
                cells = next(put_beside([cells], [shares], replaced, progress))
            else:
                cells[name] = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list) else value
        columns = columns or dict.fromkeys(cells)
        strange = [name for name in cells if name not in columns]
        if strange:
            raise DataError(f"row {number} has a column {strange[0]!r} that the first one lacks; use --format jsonl")
        yield cells


def _write_parquet(records: Iterable[Record], path: Any) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, writer = 0, None
    stream = iter(records)
    try:
        while chunk := list(itertools.islice(stream, ROWS_AT_ONCE)):
            table = pa.Table.from_pylist([dict.fromkeys(chunk[0]) | record for record in chunk])
            if writer is None:  # a column that is empty so far may hold texts later
                fields = [field.with_type(pa.string()) if pa.types.is_null(field.type) else field
                          for field in table.schema]  # fmt: skip
                writer = pq.ParquetWriter(path, pa.schema(fields))
            writer.write_table(_cast(table, writer.schema, count))
            count += len(chunk)
    finally:
        if writer:
            writer.close()
    return count


def _cast(table: Any, schema: Any, rows_before: int) -> Any:
    """The table with the columns' types that were written before.

    Raises:
        DataError: a column whose values these types do not hold.
    """
    import pyarrow as pa

    columns = []
    for field in schema:
        column = table.column(field.name) if field.name in table.column_names else pa.nulls(len(table), field.type)
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(
                f"column {field.name!r} holds {field.type} in the first rows and {column.type} after row "
                f"{rows_before}, which one Parquet column does not hold; use --format jsonl or csv"
            ) from error
    return pa.table(columns, schema=schema)


_WRITERS: dict[str, Callable[[Iterable[Record], Any], int]] = {
    "jsonl": _write_jsonl,
    "csv": _write_csv,
    "parquet": _write_parquet,
}
