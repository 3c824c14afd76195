"""The metrics of classification, as weighted sums over rows.

Written so that one matrix product gives every metric of every system on thousands of resamples;
on the plain rows the values are scikit-learn's.
"""

from __future__ import annotations

import numpy as np

from trimtab.evaluation.predictions import Floats, Predictions

METRICS = ("accuracy", "f1", "precision", "recall", "loss", "brier")
# Metrics of which less is better.
LOWER_IS_BETTER = frozenset({"loss", "brier"})


def row_statistics(predictions: Predictions) -> Floats:
    """[rows, 2 + classes²]: loss, brier, and one column per cell of the confusion matrix."""
    rows, classes = len(predictions.ids), len(predictions.label_names)
    cells = np.zeros((rows, classes * classes))
    cells[np.arange(rows), predictions.labels * classes + predictions.predicted] = 1.0
    return np.column_stack([predictions.losses, predictions.briers, cells])


def metrics_from_sums(sums: Floats, classes: int) -> dict[str, Floats]:
    """Every metric from weighted sums of `row_statistics`, [resamples, 2 + classes²].

    F1, precision and recall are macro averages over the classes that occur among the true labels;
    a class that is never predicted has precision 0.
    """
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


def compute_metrics(predictions: Predictions) -> dict[str, float]:
    """Every metric on the rows as they are."""
    sums = row_statistics(predictions).sum(axis=0, keepdims=True)
    values = metrics_from_sums(sums, len(predictions.label_names))
    return {name: float(values[name][0]) for name in METRICS}
