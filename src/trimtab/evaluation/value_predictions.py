"""Which number a system gave every test row, and the metrics of that as weighted sums over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import DataError
from trimtab.evaluation.predictions import Floats
from trimtab.runs import write_jsonl

_SMALLEST = 1e-24


@dataclass(frozen=True)
class ValuePredictions:
    """`truth` and `predicted` [rows], in the data's own units."""

    metrics: ClassVar[tuple[str, ...]] = ("rmse", "mae", "r2", "pearson", "loss")
    primary_metric: ClassVar[str] = "rmse"

    ids: list[str]
    truth: Floats
    predicted: Floats

    def select(self, keep: NDArray[np.bool_]) -> ValuePredictions:
        ids = [name for name, kept in zip(self.ids, keep, strict=True) if kept]
        return ValuePredictions(ids, self.truth[keep], self.predicted[keep])

    def agrees_with(self, other: ValuePredictions) -> bool:
        return np.array_equal(self.truth, other.truth)

    def row_statistics(self) -> Floats:
        """[rows, 8]: one, |error|, error², and the first and second moments of both, taken from the truth's mean."""
        centre = self.truth.mean()
        true, said = self.truth - centre, self.predicted - centre
        error = said - true
        return np.column_stack([np.ones(len(true)), np.abs(error), error**2, true, said, true**2, said**2, true * said])

    def metrics_from_sums(self, sums: Floats) -> dict[str, Floats]:
        """`r2` is the share of the variance explained; `loss` the mean squared error."""
        rows, absolute, squared, true, said, true_squared, said_squared, product = sums.T
        variance = true_squared - true**2 / rows
        said_variance = said_squared - said**2 / rows
        covariance = product - true * said / rows
        # A system that always says the same has no correlation.
        spread = np.sqrt(np.maximum(variance, 0.0) * np.maximum(said_variance, 0.0))
        varies = spread > 1e-9 * np.maximum(variance, _SMALLEST)
        return {
            "rmse": np.sqrt(squared / rows),
            "mae": absolute / rows,
            "r2": 1.0 - squared / np.maximum(variance, _SMALLEST),
            "pearson": np.where(varies, covariance / np.maximum(spread, _SMALLEST), 0.0),
            "loss": squared / rows,
        }

    def write(self, path: Path) -> None:
        rows = zip(self.ids, self.truth, self.predicted, strict=True)
        write_jsonl(
            path,
            (
                {"id": row_id, "label": float(true), "prediction": float(said), "loss": float((said - true) ** 2)}
                for row_id, true, said in rows
            ),
        )


def parse_value_predictions(lines: Sequence[dict[str, Any]], path: Path) -> ValuePredictions:
    """The lines of a `predictions.jsonl`.

    Raises:
        DataError: a line without the keys (with its number).
    """
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append((str(line["id"]), float(line["label"]), float(line["prediction"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: needs id, label and prediction, two numbers ({error!r})") from None
    ids, truth, predicted = zip(*found, strict=True)
    return ValuePredictions(list(ids), np.array(truth), np.array(predicted))
