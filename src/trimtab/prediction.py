"""Rows in, what an adapter says of them or writes after them out: streamed, so memory does not grow with the rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from trimtab.adapters import LoadedAdapter
from trimtab.adapters.files import check_folder
from trimtab.adapters.quick_labels import QuickLabels
from trimtab.data import Row
from trimtab.data.reading import ArrivingRows
from trimtab.engine.frozen import NumberFormat
from trimtab.errors import AdapterError, RowError, StudyError
from trimtab.evaluation.unlabelled import Record, Said, prompt_in, row_without_label, text_in
from trimtab.generation import Prompt
from trimtab.precision import use_float32
from trimtab.progress import Progress, Silent
from trimtab.record_files import ROWS_AT_ONCE, put_beside
from trimtab.sampling import Sampling
from trimtab.tasks import get_task
from trimtab.tasks.causal_lm import CausalLM

_PROMPTS_AT_ONCE = 16


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
        yield from put_beside([record for record, _ in chunk], found, replaced, listener)
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
        yield from put_beside([record for record, _ in chunk], found, replaced, listener)
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
