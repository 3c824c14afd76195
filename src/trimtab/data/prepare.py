"""From a study to checked splits: read, name the columns, cut, limit, look for leaks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

from trimtab.data.answers import AnswerReader
from trimtab.data.columns import Columns, Named
from trimtab.data.duplicates import find_near_duplicates
from trimtab.data.labels import ClassReader, SeveralReader, ValueReader
from trimtab.data.language import LanguageReader
from trimtab.data.preferences import PreferenceReader
from trimtab.data.reading import Source, Table, read_source
from trimtab.data.rows import Row
from trimtab.data.splits import cut_split, take_rows
from trimtab.data.words import TagReader
from trimtab.errors import DataError
from trimtab.progress import Progress
from trimtab.study_config import StudyConfig


class Reader(Protocol):
    """How a task's rows stand in a table."""

    has_labels: bool

    def find_columns(self, table: Table, named: Named, progress: Progress) -> Columns:
        """Named columns are checked; missing ones are found by name, and the guess is noted."""
        ...

    def label_names(self, table: Table, columns: Columns) -> list[str]:
        """Names of the labels in the training rows, in their order; none where labels have no names."""
        ...

    def rows(self, table: Table, split: str, columns: Columns, names: list[str]) -> list[Row]: ...


READERS: dict[str, Reader] = {
    "classification": ClassReader(),
    "multilabel": SeveralReader(),
    "regression": ValueReader(),
    "token_classification": TagReader(),
    "causal_lm": LanguageReader(),
    "seq2seq": AnswerReader(),
    "preference": PreferenceReader(),
}


@dataclass(frozen=True)
class PreparedData:
    """Rows by split, in one fixed order that every system shares."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]
    label_names: list[str]
    duplicate_rows: int
    leaked_test_ids: set[str]
    sha256: str
    columns: Columns

    def summary(self) -> dict[str, Any]:
        """The `data` part of comparison.json, and what the report shows beside it."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            **{f"{name}_rows": len(rows) for name, rows in splits.items()},
            "duplicate_rows": self.duplicate_rows,
            "leaked_test_rows": len(self.leaked_test_ids),
            "leaked_test_ids": sorted(self.leaked_test_ids),
            "sha256": self.sha256,
            "label_names": self.label_names,
            "label_counts": {name: self._counts(rows) for name, rows in splits.items()},
            "columns": vars(self.columns),
        }

    def _counts(self, rows: list[Row]) -> dict[str, int]:
        counts = Counter(label for row in rows for label in ([row.label] if row.labels is None else row.labels))
        return {name: counts[number] for number, name in enumerate(self.label_names)}


def prepare_data(study: StudyConfig, progress: Progress) -> PreparedData:
    """Every split of a study, checked before any weight is read.

    Raises:
        SourceError: a source cannot be had.
        DataError: malformed, empty, one class, unknown or missing labels, too few rows.
    """
    reader = READERS[study.task]
    source = read_source(study.train_data, progress)
    train_table = source.splits["train"]
    columns = reader.find_columns(train_table, _named(study, source, reader), progress)
    names = reader.label_names(train_table, columns)
    train = reader.rows(train_table, "train", columns, names)
    given = {
        split: _given_split(split, path, source, reader, columns, names, progress)
        for split, path in (("test", study.test_data), ("validation", study.validation_data))
    }
    test, validation = given["test"], given["validation"]
    if test is None:
        train, test = cut_split(train, study.seed, "test", reader.has_labels)
    if validation is None:
        train, validation = cut_split(train, study.seed, "validation", reader.has_labels)
    _refuse_overlap(study)
    train = take_rows(train, study.max_train_rows, study.seed)
    validation = take_rows(validation, study.max_validation_rows, study.seed)
    test = take_rows(test, study.max_test_rows, study.seed)
    if study.task == "classification":
        _check_classes(train, names)
    duplicate_rows, leaked = find_near_duplicates(train, test)
    prepared = PreparedData(
        train, validation, test, names, duplicate_rows, leaked, _fingerprint(train, validation, test), columns
    )
    _describe(prepared, progress)
    return prepared


def read_labelled(
    source: str,
    task: str,
    label_names: list[str],
    trained_on: Mapping[str, str],
    named: Named,
    progress: Progress,
) -> list[Row]:
    """The test rows of `source`, or all of them where it has no such split, for a task whose labels are known.

    Args:
        trained_on: columns by what they were for in training; those that `source` does not have are found by name.
        named: columns that are named now, which go before those.

    Raises:
        SourceError: it cannot be had.
        DataError: malformed, empty, or with labels that are not known.
    """
    reader, found = READERS[task], read_source(source, progress)
    table = found.splits.get("test") or found.splits["train"]
    starter: Named = {"text": found.starter.text_column, "label": found.starter.label_column} if found.starter else {}
    given = {what: name for what, name in named.items() if name is not None}
    known = {what: name for what, name in trained_on.items() if name in table.columns}
    columns = reader.find_columns(table, {**dict.fromkeys(vars(Columns(""))), **starter, **known, **given}, progress)
    return reader.rows(table, "test", columns, label_names)


def _named(study: StudyConfig, source: Source, reader: Reader) -> Named:
    """The columns that the study names, else those that a starter is known to have."""
    starter = source.starter
    if starter and reader.has_labels and starter.label_column is None and study.label_column is None:
        raise DataError(
            f"{study.train_data} has texts without labels, made for language modelling; "
            f"{study.task} needs labels: try starter:rotten-tomatoes or starter:reuters-r8, or --task causal_lm"
        )
    return {
        "text": study.text_column or (starter.text_column if starter else None),
        "text_pair": study.text_pair_column,
        "label": study.label_column or (starter.label_column if starter else None),
        "completion": study.completion_column,
        "target": study.target_column,
        "chosen": study.chosen_column,
        "rejected": study.rejected_column,
        "messages": study.messages_column,
        "group": study.group_column or (starter.group_column if starter else None),
    }


def _given_split(
    split: str,
    path: str | None,
    source: Source,
    reader: Reader,
    columns: Columns,
    names: list[str],
    progress: Progress,
) -> list[Row] | None:
    """Rows of a split that was named, or that came with the training source; else None."""
    table = source.splits.get(split)
    what, wanted = ("target", columns.target) if columns.target else ("label", columns.label)
    if path is not None:
        given = read_source(path, progress).splits
        table = given.get(split) or given["train"]
        reader.find_columns(table, columns.named, progress)
    elif wanted and table and split == "test" and all(row.get(wanted) is None for row in table.rows):
        progress.note(f"{table.source} has no {what}s, so it is left out; test rows are cut from train")
        return None
    return reader.rows(table, split, columns, names) if table else None


def _refuse_overlap(study: StudyConfig) -> None:
    for split in ("validation_data", "test_data"):
        if getattr(study, split) == study.train_data and Path(study.train_data).is_file():
            raise DataError(
                f"{split} is the training file itself; leave it out, and {split[:-5]} rows are cut from train"
            )


def _check_classes(train: list[Row], names: list[str]) -> None:
    if len(train) < len(names):
        raise DataError(
            f"{len(train)} training rows for {len(names)} classes; raise --max-train-rows or give more rows"
        )
    lost = [name for number, name in enumerate(names) if number not in {row.label for row in train}]
    if lost:
        raise DataError(
            f"no training row is left of class {lost[0]!r} after cutting the splits "
            f"({len(lost)} such classes); give more rows of it, or remove it"
        )


def _fingerprint(*splits: list[Row]) -> str:
    digest = hashlib.sha256()
    for rows in splits:
        for row in rows:
            digest.update(repr(astuple(row)).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _describe(data: PreparedData, progress: Progress) -> None:
    progress.note(f"rows: {len(data.train):,} train, {len(data.validation):,} validation, {len(data.test):,} test")
    if data.label_names:
        counts = data._counts(data.train)
        whole = sum(counts.values())
        shares = ", ".join(f"{name} {count / whole:.0%}" for name, count in counts.items())
        progress.note(f"labels in train: {shares}")
    elif data.train[0].value is not None:
        values = [row.value or 0.0 for row in data.train]
        progress.note(f"values in train: {min(values):g} to {max(values):g}, mean {sum(values) / len(values):.4g}")
    if data.columns.group:
        progress.note(f"rows with the same {data.columns.group!r} stay in one split")
    if data.duplicate_rows or data.leaked_test_ids:
        progress.note(
            f"near duplicates: {data.duplicate_rows} inside train; {len(data.leaked_test_ids)} test rows stand in "
            "train too (scores are given without them as well)"
        )
