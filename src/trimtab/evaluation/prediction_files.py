"""Predictions from files, of whichever kind a file holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trimtab.data import groups_of, read_rows
from trimtab.errors import DataError
from trimtab.evaluation.class_predictions import ClassPredictions, parse_class_predictions
from trimtab.evaluation.multilabel_predictions import MultilabelPredictions, parse_multilabel_predictions
from trimtab.evaluation.predictions import Predictions
from trimtab.evaluation.preference_predictions import PreferencePredictions, parse_preference_predictions
from trimtab.evaluation.tag_predictions import TagPredictions, parse_tag_predictions
from trimtab.evaluation.text_predictions import TextPredictions, parse_text_predictions
from trimtab.evaluation.token_predictions import TokenPredictions, parse_token_predictions
from trimtab.evaluation.value_predictions import ValuePredictions, parse_value_predictions
from trimtab.runs import RunFolder, read_jsonl

KINDS = (ClassPredictions, MultilabelPredictions, ValuePredictions, TagPredictions, TokenPredictions, TextPredictions,
         PreferencePredictions)  # fmt: skip


def read_predictions(path: Path) -> Predictions:
    """Predictions from a `predictions.jsonl`.

    Raises:
        DataError: missing or empty file, or a line without the keys (with its number).
    """
    lines = list(read_jsonl(path))
    if not lines:
        raise DataError(f"{path}: holds no predictions")
    return _parser_for(lines[0])(lines, path)


def read_groups(path: Path, predictions: Predictions) -> list[str] | None:
    """The group of each row of a `predictions.jsonl` that lies in a run, where its rows have groups."""
    run = RunFolder(path.resolve().parent.parent.parent)
    if not (run.study.is_file() and run.test_rows.is_file()):
        return None
    rows = {row.id: row for row in read_rows(run.test_rows)}
    return groups_of([rows[name] for name in predictions.ids]) if rows.keys() >= set(predictions.ids) else None


def _parser_for(line: dict[str, Any]) -> Callable[[Sequence[dict[str, Any]], Path], Predictions]:
    """The kind of predictions that a first line shows."""
    if "correct_tokens" in line:
        return parse_token_predictions
    if "tokens" in line and isinstance(line.get("label"), str):
        return parse_text_predictions
    if "log_probabilities" in line:
        return parse_preference_predictions
    has_list = isinstance(line.get("label"), list)
    if "probabilities" in line:
        return parse_multilabel_predictions if has_list else parse_class_predictions
    if has_list:
        return parse_tag_predictions
    return parse_value_predictions if isinstance(line.get("prediction"), float | int) else parse_class_predictions
