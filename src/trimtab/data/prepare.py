"""From a study to checked splits: read, name the columns, cut, limit, look for leaks."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from trimtab.data.columns import (
    Columns,
    find_columns,
    find_language_columns,
    label_names,
    to_language_rows,
    to_rows,
)
from trimtab.data.duplicates import find_near_duplicates
from trimtab.data.reading import Source, Table, read_source
from trimtab.data.rows import Row
from trimtab.data.splits import cut_split, take_rows
from trimtab.errors import DataError
from trimtab.progress import Progress
from trimtab.study_config import StudyConfig


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
        counts = Counter(row.label for row in rows)
        return {name: counts[number] for number, name in enumerate(self.label_names)}


def prepare_data(study: StudyConfig, progress: Progress) -> PreparedData:
    """Every split of a study, checked before any weight is read.

    Raises:
        SourceError: a source cannot be had.
        DataError: malformed, empty, one class, unknown or missing labels, too few rows.
    """
    source = read_source(study.train_data, progress)
    train_table = source.splits["train"]
    columns = _columns_of(study, source, train_table, progress)
    names = label_names(train_table, columns) if columns.label else []
    train = _rows_of(train_table, "train", columns, names)
    given = {
        split: _given_split(split, path, source, columns, names, progress)
        for split, path in (("test", study.test_data), ("validation", study.validation_data))
    }
    test, validation = given["test"], given["validation"]
    if test is None:
        train, test = cut_split(train, study.seed, "test", bool(names))
    if validation is None:
        train, validation = cut_split(train, study.seed, "validation", bool(names))
    _refuse_overlap(study)
    train = take_rows(train, study.max_train_rows, study.seed)
    validation = take_rows(validation, study.max_validation_rows, study.seed)
    test = take_rows(test, study.max_test_rows, study.seed)
    if columns.label:
        _check_classes(train, names)
    duplicate_rows, leaked = find_near_duplicates(train, test)
    prepared = PreparedData(
        train, validation, test, names, duplicate_rows, leaked, _fingerprint(train, validation, test), columns
    )
    _describe(prepared, progress)
    return prepared


def _columns_of(study: StudyConfig, source: Source, table: Table, progress: Progress) -> Columns:
    starter = source.starter
    if study.task == "causal_lm":
        text = study.text_column or (starter.text_column if starter else None)
        group = study.group_column or (starter.group_column if starter else None)
        return find_language_columns(table, text, study.completion_column, study.messages_column, group, progress)
    if starter and starter.label_column is None and study.label_column is None:
        raise DataError(
            f"{study.train_data} has texts without labels, made for language modelling; "
            "classification needs labels: try starter:rotten-tomatoes or starter:reuters-r8, or --task causal_lm"
        )
    return find_columns(
        table,
        study.text_column or (starter.text_column if starter else None),
        study.text_pair_column,
        study.label_column or (starter.label_column if starter else None),
        study.group_column or (starter.group_column if starter else None),
        progress,
    )


def _given_split(
    split: str, path: str | None, source: Source, columns: Columns, names: list[str], progress: Progress
) -> list[Row] | None:
    """Rows of a split that was named, or that came with the training source; else None."""
    table = source.splits.get(split)
    if path is not None:
        given = read_source(path, progress).splits
        table = given.get(split) or given["train"]
        if columns.label:
            find_columns(table, columns.text, columns.text_pair, columns.label, columns.group, progress)
        else:
            find_language_columns(table, columns.text, columns.completion, columns.messages, columns.group, progress)
    elif columns.label and table and split == "test" and all(row.get(columns.label) is None for row in table.rows):
        progress.note(f"{table.source} has no labels, so it is left out; test rows are cut from train")
        return None
    return _rows_of(table, split, columns, names) if table else None


def _rows_of(table: Table, split: str, columns: Columns, names: list[str]) -> list[Row]:
    return to_rows(table, split, columns, names) if columns.label else to_language_rows(table, split, columns)


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
        shares = ", ".join(f"{name} {count / len(data.train):.0%}" for name, count in data._counts(data.train).items())
        progress.note(f"labels in train: {shares}")
    if data.columns.group:
        progress.note(f"rows with the same {data.columns.group!r} stay in one split")
    if data.duplicate_rows or data.leaked_test_ids:
        progress.note(
            f"near duplicates: {data.duplicate_rows} inside train; {len(data.leaked_test_ids)} test rows stand in "
            "train too (scores are given without them as well)"
        )
