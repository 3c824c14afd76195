"""Every split as tokens, before weights are read; a row that cannot be used is told with its file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trimtab.data import PreparedData
from trimtab.engine.forward import usable_length
from trimtab.errors import DataError, RowError
from trimtab.job import EncodedSplits
from trimtab.methods import virtual_tokens_of
from trimtab.models import build_without_weights, give_padding, load_tokenizer
from trimtab.progress import Progress
from trimtab.sources import ModelSource
from trimtab.study_config import StudyConfig
from trimtab.tasks import Task
from trimtab.tasks.examples import EncodedRows
from trimtab.tasks.sequences import pair_separator

_SPLITS = ("train", "validation", "test")


def encode_splits(
    study: StudyConfig, task: Task, data: PreparedData, source: ModelSource, progress: Progress
) -> EncodedSplits:
    """Tokenise every split as the base will read it, and tell lengths and truncations.

    Raises:
        StudyError: a new token that the tokenizer has already.
        DataError: the first row that the tokenizer or its chat template cannot take.
    """
    progress.stage("Tokenising")
    model = build_without_weights(source, task.auto_class, task.head_settings(data.label_names))
    tokenizer = load_tokenizer(source, study.added_tokens)
    give_padding(model, tokenizer)
    length = usable_length(model, study.max_length_tokens, virtual_tokens_of(study))
    if length < study.max_length_tokens:
        progress.note(f"this model reads at most {length} tokens, so texts are cut there")
    try:
        splits = {name: task.encode(getattr(data, name), tokenizer, model, length) for name in _SPLITS}
    except RowError as error:
        raise DataError(f"{_place_of(error.row_id, study)}: {error.problem}") from error
    separator = pair_separator(tokenizer) if data.columns.text_pair else None
    encoded = EncodedSplits(**splits, max_length_tokens=length, pair_separator=separator)
    _tell_lengths(encoded, progress)
    return encoded


def _place_of(row_id: str, study: StudyConfig) -> str:
    """File and line of a row of the study, or what stands for them in a data set."""
    split, _, number = row_id.partition(":")
    source = getattr(study, f"{split}_data") or study.train_data
    return f"{source}:{number}" if Path(source).is_file() else f"{source}[{split}]:{number}"


def describe_encoded(encoded: EncodedSplits) -> dict[str, Any]:
    """Lengths of every split in tokens, and what stands between two texts, as the data's summary keeps them."""
    lengths = {name: _describe_lengths(getattr(encoded, name)) for name in _SPLITS}
    return {"tokens": lengths, "pair_separator": encoded.pair_separator}


def _describe_lengths(encoded: EncodedRows) -> dict[str, Any]:
    blocks = np.array([len(example) for example in encoded.examples])
    lengths = np.bincount(encoded.rows, blocks)
    return {
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
        "total": int(lengths.sum()),
        "truncated": encoded.truncated,
    }


def _tell_lengths(encoded: EncodedSplits, progress: Progress) -> None:
    lengths = describe_encoded(encoded)["tokens"]
    train = lengths["train"]
    progress.note(
        f"tokens a text: median {train['median']:.0f}, 95 % within {train['p95']:.0f}, longest {train['longest']}; "
        f"{train['total']:,} in train"
    )
    splits = {name: getattr(encoded, name) for name in _SPLITS}
    if any(len(rows.examples) > len(set(rows.rows)) * rows.together for rows in splits.values()):
        blocks = ", ".join(f"{len(rows.examples):,} {name}" for name, rows in splits.items())
        progress.note(f"long texts are cut into blocks of {encoded.max_length_tokens} tokens: {blocks}")
        return
    cut = {name: length["truncated"] for name, length in lengths.items() if length["truncated"]}
    if cut:
        told = ", ".join(f"{count} {name}" for name, count in cut.items())
        progress.note(f"cut to {encoded.max_length_tokens} tokens: {told} texts")
    else:
        progress.note(f"no text is longer than {encoded.max_length_tokens} tokens")
