"""Rows in, what an adapter says of them or writes after them out: streamed, so memory does not grow with the rows."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

from trimtab.adapters import LoadedAdapter
from trimtab.adapters.files import check_folder
from trimtab.adapters.quick_labels import QuickLabels
from trimtab.data import Row
from trimtab.data.reading import ArrivingRows, stream_file
from trimtab.engine.frozen import NumberFormat
from trimtab.errors import AdapterError, DataError, RowError, StudyError
from trimtab.evaluation.unlabelled import Record, Said, prompt_in, row_without_label, text_in
from trimtab.generation import Prompt
from trimtab.precision import use_float32
from trimtab.progress import Progress, Silent
from trimtab.runs import write_file
from trimtab.sampling import Sampling
from trimtab.tasks import get_task
from trimtab.tasks.causal_lm import CausalLM

OutputFormat = Literal["jsonl", "csv", "parquet"]
# Rows that are held at once.
ROWS_AT_ONCE = 512
_PROMPTS_AT_ONCE = 16
STREAM = "-"


def check_use(folder: Path, *, writes: bool) -> None:
    """Refuse an adapter for what its task does not do, before weights are read.

    What another program saved tells its task only with its base.

    Args:
        writes: whether it is to write texts, or else to say something of rows.

    Raises:
        AdapterError: it is for other things, or damaged.
    """
    name = check_folder(folder).get("task")
    if name is None:
        return
    is_language_model = isinstance(get_task(name), CausalLM)
    if writes and not (is_language_model or get_task(name).writes_answers):
        raise AdapterError(f"{folder} is a {name} adapter, which writes no texts: try `trimtab predict`")
    if not writes and is_language_model:
        raise AdapterError(f"{folder} is a {name} adapter, which writes texts: try `trimtab generate`")


def predict_records(
    adapter: LoadedAdapter,
    records: Iterable[tuple[Record, int]],
    source: str,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    precision: NumberFormat | Literal["auto"] = "float32",
    progress: Progress | None = None,
) -> Iterator[Record]:
    """Each record with what the adapter says of it: `prediction`, and `probabilities` where it has some.

    Columns of the record that have these names are replaced, which is told once; so is how many rows were cut.

    Args:
        records: cells by column, and the line that they came from.
        source: what errors call them.
        text_column, text_pair_column: if missing, those that the adapter was trained on; else found by name.
        precision: of the frozen layers; in int8 those compute whose error on the first rows is within bounds.
            auto: int8 for rows whose label it cannot change, float32 for the others (`QuickLabels`), where that
            is faster; else float32.

    Raises:
        DataError: a record without a text (with its line).
        StudyError: a language model, which writes and says no label.
    """
    task = adapter.scorer.task
    if not adapter.predicts:
        raise StudyError(f"{adapter.path} is a {task.name} adapter, which writes texts: try `trimtab generate`")
    listener, done, cut = progress or Silent(), 0, 0
    columns = adapter.facts.get("columns", {})
    pair_column = text_pair_column or columns.get("text_pair")
    quick: QuickLabels | None = None
    replaced: set[str] = set()
    for chunk in _in_chunks(records, ROWS_AT_ONCE, measured=precision != "float32"):
        text_column = text_column or _found_in(chunk[0][0], columns.get("text"))
        rows = [
            row_without_label(task.name, record, f"{source}:{line}", text_column, pair_column) for record, line in chunk
        ]
        if not done:
            quick = _use_precision(adapter, precision, rows, listener)
        found = (quick or adapter).predict_rows(rows)
        cut += found.truncated if isinstance(found, Said) else 0
        yield from _put_beside([record for record, _ in chunk], found, replaced, listener)
        done += len(chunk)
        listener.advance(done, done, "rows")
    if quick is not None:
        listener.note(f"{quick.again:,} of {quick.rows:,} rows were computed in float32 as well")
    if cut:
        listener.note(_say_cut(cut, done, adapter))


def _say_cut(cut: int, rows: int, adapter: LoadedAdapter) -> str:
    return f"{cut:,} of {rows:,} rows are longer than {adapter.scorer.max_length_tokens} tokens: cut there"


def _in_chunks(
    records: Iterable[tuple[Record, int]], most: int, *, measured: bool = False
) -> Iterator[list[tuple[Record, int]]]:
    """Up to `most` at a time; of a stream those that have arrived.

    Args:
        measured: something is measured on the first chunk, which then waits to be whole.
    """
    stream, waits = iter(records), measured
    while chunk := (
        records.take(most) if isinstance(records, ArrivingRows) and not waits else list(itertools.islice(stream, most))
    ):
        yield chunk
        waits = False


def _put_beside(
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


def _use_precision(
    adapter: LoadedAdapter, precision: NumberFormat | Literal["auto"], rows: Sequence[Row], progress: Progress
) -> QuickLabels | None:
    if precision == "auto":
        return QuickLabels(adapter, rows, progress) if QuickLabels.serves(adapter) else None
    if precision == "float32":  # whatever it was left in
        use_float32(adapter.scorer.choice.forward)
    else:
        adapter.compute_in(precision, rows, progress)
    return None


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

    Where the column holds chats, their next turn is written: a last one of the assistant's is left out.

    Raises:
        DataError: a record without a text or chat, or with one that cannot be gone on from (with its line).
        AdapterError: an adapter that writes nothing.
    """
    listener, done, cut = progress or Silent(), 0, 0
    answers = adapter.scorer.task.writes_answers
    read = text_in if answers else prompt_in
    replaced: set[str] = set()
    for chunk in _in_chunks(records, _PROMPTS_AT_ONCE):
        text_column = text_column or _found_in(chunk[0][0], adapter.facts.get("columns", {}).get("text"))
        prompts = [(place := f"{source}:{line}", read(record, place, text_column)) for record, line in chunk]
        tuned = _write(adapter, prompts, sampling, is_chat)
        base: list[str] = []
        if compare:
            with adapter.disable():
                base = _write(adapter, prompts, sampling, is_chat)
        found = [{"generated": text} | ({"base": base[place]} if compare else {}) for place, text in enumerate(tuned)]
        yield from _put_beside([record for record, _ in chunk], found, replaced, listener)
        done += len(chunk)
        cut += adapter.count_cut([prompt for _, prompt in prompts]) if answers else 0
        listener.advance(done, done, "prompts")
    if cut:
        listener.note(_say_cut(cut, done, adapter))


def _write(
    adapter: LoadedAdapter, prompts: Sequence[tuple[str, Prompt]], sampling: Sampling | None, is_chat: bool | None
) -> list[str]:
    """What is written after prompts, each given with its place, which errors name."""
    try:
        return adapter.generate([prompt for _, prompt in prompts], sampling, is_chat=is_chat)
    except RowError as error:
        raise RowError(prompts[int(error.row_id) - 1][0], error.problem) from error


def _found_in(record: Record, column: str | None) -> str | None:
    return column if column in record else None


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


def write_records(records: Iterable[Record], out: str, output_format: OutputFormat | None = None) -> int:
    """Write records to a file, whole or not at all, or to standard output; returns how many.

    Args:
        output_format: told by the file's name, if missing; CSV has a column for each probability.

    Raises:
        DataError: as `check_output`, or columns that the format cannot hold.
    """
    found = check_output(out, output_format)
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
    for record in _as_cells(records):
        count += 1
        if writer is None:
            writer = csv.DictWriter(file, list(record))
            writer.writeheader()
        writer.writerow(record)
        if file is sys.stdout:
            file.flush()
    return count


def _as_cells(records: Iterable[Record]) -> Iterator[Record]:
    """Cells for a table, whose columns are those of the first record: lists as JSON, a column for each probability.

    Raises:
        DataError: a record with another column.
    """
    columns: dict[str, None] = {}
    for number, record in enumerate(records, 1):
        cells: Record = {}
        for name, value in record.items():
            if name == "probabilities" and isinstance(value, dict):
                cells |= {f"probability_{label}": share for label, share in value.items()}
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

    stream, count, writer = _as_cells(records), 0, None
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
