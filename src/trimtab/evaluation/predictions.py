"""What one system said about every test row: what every kind of predictions can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Metrics of which less is better.
LOWER_IS_BETTER = frozenset({"loss", "brier", "perplexity", "rmse", "mae"})


class Predictions(Protocol):
    """Predictions of one kind, from which metrics are computed as weighted sums over rows."""

    metrics: ClassVar[tuple[str, ...]]

    @property
    def primary_metric(self) -> str: ...

    @property
    def ids(self) -> list[str]: ...

    def select(self, keep: NDArray[np.bool_]) -> Self: ...

    def agrees_with(self, other: Any) -> bool:
        """Whether both are about the same truth, row by row."""
        ...

    def row_statistics(self) -> Floats:
        """[rows, k], of which every metric is a function of the weighted sums."""
        ...

    def metrics_from_sums(self, sums: Floats) -> dict[str, Floats]:
        """Every metric from weighted sums of `row_statistics`, [resamples, k]."""
        ...

    def write(self, path: Path) -> None: ...


def compute_metrics(predictions: Predictions) -> dict[str, float]:
    """Every metric on the rows as they are."""
    values = predictions.metrics_from_sums(predictions.row_statistics().sum(axis=0, keepdims=True))
    return {name: float(values[name][0]) for name in predictions.metrics}
