"""Predictions from files, of whichever kind a file holds."""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import DataError
from trimtab.evaluation.class_predictions import ClassPredictions, parse_class_predictions
from trimtab.evaluation.predictions import Predictions
from trimtab.evaluation.token_predictions import TokenPredictions, parse_token_predictions
from trimtab.runs import read_jsonl

KINDS: tuple[type[ClassPredictions] | type[TokenPredictions], ...] = (ClassPredictions, TokenPredictions)


def read_predictions(path: Path) -> Predictions:
    """Predictions from a `predictions.jsonl`.

    Raises:
        DataError: missing or empty file, or a line without the keys (with its number).
    """
    lines = list(read_jsonl(path))
    if not lines:
        raise DataError(f"{path}: holds no predictions")
    return parse_token_predictions(lines, path) if "tokens" in lines[0] else parse_class_predictions(lines, path)
