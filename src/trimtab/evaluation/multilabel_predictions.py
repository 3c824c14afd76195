"""What a system said of every label of every test row, and the metrics of that as weighted sums over rows."""

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

_SMALLEST = 1e-12


@dataclass(frozen=True)
class MultilabelPredictions:
    """`truth` and `probabilities` [rows, labels], labels as in `label_names`; above a half a label is given."""

    metrics: ClassVar[tuple[str, ...]] = ("f1", "f1_macro", "precision", "recall", "exact_match", "loss")
    primary_metric: ClassVar[str] = "f1"

    ids: list[str]
    label_names: list[str]
    truth: NDArray[np.bool_]
    probabilities: Floats

    @property
    def given(self) -> NDArray[np.bool_]:
        return np.asarray(self.probabilities > 0.5, dtype=np.bool_)

    @property
    def losses(self) -> Floats:
        """Binary cross-entropy of each row, averaged over labels, in nats."""
        of_truth = np.where(self.truth, self.probabilities, 1.0 - self.probabilities)
        return np.asarray(-np.log(np.maximum(of_truth, _SMALLEST)).mean(axis=1))

    def select(self, keep: NDArray[np.bool_]) -> MultilabelPredictions:
        ids = [name for name, kept in zip(self.ids, keep, strict=True) if kept]
        return MultilabelPredictions(ids, self.label_names, self.truth[keep], self.probabilities[keep])

    def agrees_with(self, other: MultilabelPredictions) -> bool:
        return self.label_names == other.label_names and np.array_equal(self.truth, other.truth)

    def row_statistics(self) -> Floats:
        """[rows, 3 + 3 labels]: one, loss, exact match; hits, given and true by label."""
        given = self.given
        exact = (given == self.truth).all(axis=1)
        return np.column_stack(
            [np.ones(len(self.ids)), self.losses, exact, given & self.truth, given, self.truth]
        ).astype(np.float64)

    def metrics_from_sums(self, sums: Floats) -> dict[str, Floats]:
        """F1, precision and recall over all labels together (micro); `f1_macro` over those that occur."""
        hits, given, true = np.split(sums[:, 3:], 3, axis=1)
        all_hits, all_given, all_true = (part.sum(axis=1) for part in (hits, given, true))
        by_label = 2 * hits / np.maximum(given + true, _SMALLEST)
        present = true > 0
        return {
            "f1": 2 * all_hits / np.maximum(all_given + all_true, _SMALLEST),
            "f1_macro": np.where(present, by_label, 0.0).sum(axis=1) / np.maximum(present.sum(axis=1), 1),
            "precision": all_hits / np.maximum(all_given, _SMALLEST),
            "recall": all_hits / np.maximum(all_true, _SMALLEST),
            "exact_match": sums[:, 2] / sums[:, 0],
            "loss": sums[:, 1] / sums[:, 0],
        }

    def write(self, path: Path) -> None:
        names = np.array(self.label_names)
        rows = zip(self.ids, self.truth, self.given, self.probabilities, self.losses, strict=True)
        write_jsonl(
            path,
            (
                {
                    "id": row_id,
                    "label": names[truth].tolist(),
                    "prediction": names[given].tolist(),
                    "probabilities": dict(zip(self.label_names, map(float, probabilities), strict=True)),
                    "loss": float(loss),
                }
                for row_id, truth, given, probabilities, loss in rows
            ),
        )


def parse_multilabel_predictions(lines: Sequence[dict[str, Any]], path: Path) -> MultilabelPredictions:
    """The lines of a `predictions.jsonl`.

    Raises:
        DataError: a line without the keys (with its number).
    """
    names: list[str] = []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            names = names or list(line["probabilities"])
            probabilities = [float(line["probabilities"][name]) for name in names]
            found.append((str(line["id"]), [name in line["label"] for name in names], probabilities))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}:{number}: needs id, label [names] and probabilities {{name: number}} ({error!r})"
            ) from None
    ids, truth, probabilities_of = zip(*found, strict=True)
    return MultilabelPredictions(list(ids), names, np.array(truth, dtype=np.bool_), np.array(probabilities_of))
