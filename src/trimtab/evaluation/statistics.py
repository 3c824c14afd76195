"""Intervals and paired tests.

Wilson for a proportion, exact McNemar for two systems' accuracies, the paired bootstrap for
everything else, Holm over all contrasts that are claimed together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trimtab.evaluation.class_predictions import ClassPredictions
from trimtab.evaluation.predictions import Floats, Ints, Predictions, compute_metrics
from trimtab.evaluation.preference_predictions import PreferencePredictions

Bools = NDArray[np.bool_]

# Kinds of which each row is right or wrong, and accuracy the share of right ones.
RIGHT_OR_WRONG = (ClassPredictions, PreferencePredictions)

CONFIDENCE = 0.95
RESAMPLES = 10_000
# Normal quantiles of a two-sided test at 5 % with a power of 80 %.
_DETECTABLE_STANDARD_ERRORS = 1.96 + 0.84
_CHUNK = 250


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927)."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, total, alpha=1 - CONFIDENCE, method="wilson")
    return float(low), float(high)


def mcnemar_exact(correct: Bools, against: Bools) -> float:
    """Two-sided exact p-value that two systems err equally often (McNemar 1947), paired by row."""
    from scipy.stats import binomtest

    only_first = int(np.sum(correct & ~against))
    only_second = int(np.sum(~correct & against))
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted so that the chance of any false claim among them stays at its level (Holm 1979)."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(list(p_values), method="holm")[1]] if p_values else []


def _resample_weights(units: Ints, resamples: int, seed: int) -> Iterator[Floats]:
    """Chunks [k, rows]: how often each row is drawn when whole units are drawn with replacement."""
    generator = np.random.default_rng(seed)
    count = int(units.max()) + 1
    for start in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - start)
        drawn = generator.integers(count, size=(size, count)) + np.arange(size)[:, None] * count
        weights = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        yield weights[:, units].astype(np.float64)


def bootstrap_metrics(
    systems: Mapping[str, Predictions],
    groups: Sequence[str] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Floats]]:
    """Every metric of every system on the same resamples of the test rows (Efron & Tibshirani 1993).

    Args:
        systems: predictions on the same rows, in the same order.
        groups: rows of one group are drawn together; None draws rows.

    Returns:
        system -> metric -> [resamples].
    """
    first = next(iter(systems.values()))
    units = np.arange(len(first.ids)) if groups is None else np.unique(list(groups), return_inverse=True)[1]
    statistics = np.concatenate([predictions.row_statistics() for predictions in systems.values()], axis=1)
    chunks = [weights @ statistics for weights in _resample_weights(units, resamples, seed)]
    parts = np.split(np.concatenate(chunks), len(systems), axis=1)
    return {name: first.metrics_from_sums(part) for name, part in zip(systems, parts, strict=True)}


def percentile_interval(values: Floats, units: int) -> tuple[float, float]:
    """95 % interval from bootstrap values, its percentiles widened for few units.

    Plain percentiles are too narrow by sqrt((n - 1) / n) and take the normal's quantiles for those of
    Student's t (Hesterberg 2015, "What teachers should know about the bootstrap", section 4.3).

    Args:
        units: rows, or groups of rows, that were resampled; of one unit the interval is all values.
    """
    from scipy.stats import norm, t

    tail = 0.0
    if units > 1:
        tail = float(norm.cdf(-_expansion(units) * t.ppf(0.5 * (1 + CONFIDENCE), units - 1)))
    low, high = np.percentile(values, [100 * tail, 100 * (1 - tail)])
    return float(low), float(high)


def bootstrap_p_value(differences: Floats, units: int) -> float:
    """Two-sided p-value that the difference is zero, from its paired bootstrap values.

    Twice the smaller tail around zero (Efron & Tibshirani 1993, chapter 15), never below what this
    number of resamples can show, and corrected for few units as `percentile_interval` is.
    """
    from scipy.stats import norm, t

    if units < 2:
        return 1.0
    count = len(differences)
    below = (np.sum(differences <= 0) + 1) / (count + 1)
    above = (np.sum(differences >= 0) + 1) / (count + 1)
    tail = min(below, above, 0.5)
    return float(2 * t.cdf(norm.ppf(tail) / _expansion(units), units - 1))


def _expansion(units: int) -> float:
    return float(np.sqrt(units / (units - 1)))


def minimum_detectable_difference(differences: Floats, rows: int | None) -> float:
    """The difference that this test set would show four times in five, at the 5 % level.

    From the bootstrap's standard error.

    Args:
        rows: of which the metric is a share: two systems that never differ get the standard error of one row.
    """
    return float(_DETECTABLE_STANDARD_ERRORS * max(float(np.std(differences)), 1 / rows if rows else 0.0))


def metric_intervals(
    predictions: Predictions, resampled: Mapping[str, Floats], units: int
) -> dict[str, dict[str, float | None]]:
    """value, low and high of every metric: Wilson for accuracy, percentile bootstrap of `units` for the others."""
    values = compute_metrics(predictions)
    intervals: dict[str, dict[str, float | None]] = {}
    for name in predictions.metrics:
        if name == "accuracy" and isinstance(predictions, RIGHT_OR_WRONG):
            low, high = wilson_interval(int(predictions.correct.sum()), len(predictions.ids))
        else:
            low, high = percentile_interval(resampled[name], units)
        # A system without probabilities has no loss.
        found = {"value": values[name], "low": low, "high": high}
        intervals[name] = {part: None if np.isnan(number) else number for part, number in found.items()}
    return intervals
