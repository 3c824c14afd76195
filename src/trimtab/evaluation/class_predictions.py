"""What a classifier said about every test row, and the metrics of that as weighted sums over rows.

The sums are written so that one matrix product gives every metric of every system on thousands of
resamples; on the plain rows the values are scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trimtab.data import Row
from trimtab.errors import DataError
from trimtab.evaluation.predictions import Floats, Ints
from trimtab.runs import write_jsonl

# A zero probability of what happened would make the loss infinite and every mean useless.
_SMALLEST = 1e-12


@dataclass(frozen=True)
class ClassPredictions:
    """`labels` [rows] and `probabilities` [rows, classes], classes as in `label_names`."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "precision", "recall", "loss", "brier")
    primary_metric: ClassVar[str] = "accuracy"

    ids: list[str]
    label_names: list[str]
    labels: Ints
    probabilities: Floats

    @property
    def predicted(self) -> Ints:
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    @property
    def correct(self) -> NDArray[np.bool_]:
        return np.asarray(self.predicted == self.labels, dtype=np.bool_)

    @property
    def losses(self) -> Floats:
        """Negative log-likelihood of each row, in nats."""
        chosen = self.probabilities[np.arange(len(self.labels)), self.labels]
        return np.asarray(-np.log(np.maximum(chosen, _SMALLEST)))

    @property
    def briers(self) -> Floats:
        """Squared distance of each row's probabilities from the truth (Brier 1950): 0 to 2."""
        truth = np.eye(len(self.label_names))[self.labels]
        return np.asarray(((self.probabilities - truth) ** 2).sum(axis=1))

    def select(self, keep: NDArray[np.bool_]) -> ClassPredictions:
        ids = [name for name, kept in zip(self.ids, keep, strict=True) if kept]
        return ClassPredictions(ids, self.label_names, self.labels[keep], self.probabilities[keep])

    def agrees_with(self, other: ClassPredictions) -> bool:
        return self.label_names == other.label_names and np.array_equal(self.labels, other.labels)

    def row_statistics(self) -> Floats:
        """[rows, 2 + classes²]: loss, brier, and one column per cell of the confusion matrix."""
        rows, classes = len(self.ids), len(self.label_names)
        cells = np.zeros((rows, classes * classes))
        cells[np.arange(rows), self.labels * classes + self.predicted] = 1.0
        return np.column_stack([self.losses, self.briers, cells])

    def metrics_from_sums(self, sums: Floats) -> dict[str, Floats]:
        """Every metric from weighted sums of `row_statistics`, [resamples, 2 + classes²].

        F1, precision and recall are macro averages over the classes that occur among the true labels;
        a class that is never predicted has precision 0.
        """
        classes = len(self.label_names)
        confusion = sums[:, 2:].reshape(-1, classes, classes)
        total = confusion.sum(axis=(1, 2))
        hits = np.einsum("rcc->rc", confusion)
        true, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
        present = true > 0

        def macro(values: Floats) -> Floats:
            return np.asarray(np.where(present, values, 0.0).sum(axis=1) / present.sum(axis=1))

        return {
            "accuracy": hits.sum(axis=1) / total,
            "f1": macro(2 * hits / np.maximum(true + predicted, 1e-12)),
            "precision": macro(hits / np.maximum(predicted, 1e-12)),
            "recall": macro(hits / np.maximum(true, 1e-12)),
            "loss": sums[:, 0] / total,
            "brier": sums[:, 1] / total,
        }

    def write(self, path: Path) -> None:
        names = self.label_names
        write_jsonl(
            path,
            (
                {
                    "id": row_id,
                    "label": names[label],
                    "prediction": names[predicted],
                    "probabilities": dict(zip(names, map(float, probabilities), strict=True)),
                    "loss": float(loss),
                }
                for row_id, label, predicted, probabilities, loss in zip(
                    self.ids, self.labels, self.predicted, self.probabilities, self.losses, strict=True
                )
            ),
        )


def predictions_for(rows: Sequence[Row], label_names: Sequence[str], probabilities: Any) -> ClassPredictions:
    """Predictions of `rows` from an array-like [rows, classes]."""
    labels = np.array([row.label for row in rows], dtype=np.int64)
    return ClassPredictions(
        [row.id for row in rows], list(label_names), labels, np.asarray(probabilities, dtype=np.float64)
    )


def parse_class_predictions(lines: Sequence[dict[str, Any]], path: Path) -> ClassPredictions:
    """The lines of a `predictions.jsonl`.

    Raises:
        DataError: a line without the keys (with its number).
    """
    ids: list[str] = []
    labels: list[str] = []
    rows: list[dict[str, float]] = []
    for number, row in enumerate(lines, 1):
        try:
            probabilities = {str(name): float(value) for name, value in row["probabilities"].items()}
            ids.append(str(row["id"]))
            labels.append(str(row["label"]))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}:{number}: needs id, label and probabilities {{name: number}} ({error!r})"
            ) from None
        rows.append(probabilities)
        if probabilities.keys() != rows[0].keys() or labels[-1] not in probabilities:
            raise DataError(f"{path}:{number}: its label names are not those of the first line ({', '.join(rows[0])})")
    names = list(rows[0])
    return ClassPredictions(
        ids,
        names,
        np.array([names.index(label) for label in labels], dtype=np.int64),
        np.array([[row[name] for name in names] for row in rows]),
    )
