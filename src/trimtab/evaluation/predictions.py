"""What one system said about every test row: the file that every test is computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimtab.data import Row
from trimtab.errors import DataError
from trimtab.runs import read_jsonl, write_jsonl

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# A zero probability of what happened would make the loss infinite and every mean useless.
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Predictions:
    """`labels` [rows] and `probabilities` [rows, classes], classes as in `label_names`."""

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

    def select(self, keep: NDArray[np.bool_]) -> Predictions:
        ids = [name for name, kept in zip(self.ids, keep, strict=True) if kept]
        return Predictions(ids, self.label_names, self.labels[keep], self.probabilities[keep])

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


def predictions_for(rows: Sequence[Row], label_names: Sequence[str], probabilities: Any) -> Predictions:
    """Predictions of `rows` from an array-like [rows, classes]."""
    labels = np.array([row.label for row in rows], dtype=np.int64)
    return Predictions([row.id for row in rows], list(label_names), labels, np.asarray(probabilities, dtype=np.float64))


def read_predictions(path: Path) -> Predictions:
    """Predictions from a `predictions.jsonl`.

    Raises:
        DataError: missing or empty file, or a line without the keys (with its number).
    """
    ids: list[str] = []
    labels: list[str] = []
    rows: list[dict[str, float]] = []
    for number, row in enumerate(read_jsonl(path), 1):
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
    if not rows:
        raise DataError(f"{path}: holds no predictions")
    names = list(rows[0])
    return Predictions(
        ids,
        names,
        np.array([names.index(label) for label in labels], dtype=np.int64),
        np.array([[row[name] for name in names] for row in rows]),
    )
