"""Systems against each other on the same rows: contrasts, verdicts and the comparison's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab.errors import DataError, suggest
from trimtab.evaluation.prediction_files import KINDS
from trimtab.evaluation.predictions import LOWER_IS_BETTER, Floats, Predictions, compute_metrics
from trimtab.evaluation.statistics import (
    RIGHT_OR_WRONG,
    bootstrap_metrics,
    bootstrap_p_value,
    holm,
    mcnemar_exact,
    metric_intervals,
    minimum_detectable_difference,
    percentile_interval,
)
from trimtab.evaluation.token_predictions import TokenPredictions

SIGNIFICANCE = 0.05


def contrast(
    system: str,
    against: str,
    metric: str,
    predictions: Mapping[str, Predictions],
    resampled: Mapping[str, Mapping[str, Floats]],
    units: int,
) -> dict[str, Any]:
    """One contrast without its adjusted p-value and verdict; a positive difference is `system` above.

    Args:
        units: rows, or groups of rows, that were resampled.
    """
    differences = resampled[system][metric] - resampled[against][metric]
    values = [compute_metrics(predictions[name])[metric] for name in (system, against)]
    low, high = percentile_interval(differences, units)
    ours, theirs = predictions[system], predictions[against]
    p_value, test = bootstrap_p_value(differences, units), "paired_bootstrap"
    if metric == "accuracy" and isinstance(ours, RIGHT_OR_WRONG) and isinstance(theirs, RIGHT_OR_WRONG):
        p_value, test = mcnemar_exact(ours.correct, theirs.correct), "mcnemar_exact"
    rows = None if metric in LOWER_IS_BETTER else len(ours.ids)
    return {
        "system": system,
        "against": against,
        "metric": metric,
        "difference": values[0] - values[1],
        "low": low,
        "high": high,
        "p_value": p_value,
        "test": test,
        "minimum_detectable_difference": minimum_detectable_difference(differences, rows),
    }


def settle(contrasts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add Holm-adjusted p-values and verdicts, over all contrasts claimed together.

    A verdict needs both: the adjusted p-value below 5 %, and the interval without zero.
    """
    for found, adjusted in zip(contrasts, holm([c["p_value"] for c in contrasts]), strict=True):
        found["p_adjusted"] = adjusted
        verdict = "inconclusive"
        if adjusted < SIGNIFICANCE and (found["low"] > 0 or found["high"] < 0):
            is_better = (found["difference"] > 0) != (found["metric"] in LOWER_IS_BETTER)
            verdict = "better" if is_better else "worse"
        found["verdict"] = verdict
    return contrasts


def check_same_rows(first: Predictions, second: Predictions, names: tuple[str, str]) -> None:
    """Raise DataError unless both hold the same rows, labels and label names, in one order."""
    if first.ids != second.ids:
        missing = set(first.ids) ^ set(second.ids)
        detail = f"{len(missing)} ids stand in one only" if missing else "the order differs"
        raise DataError(
            f"{names[0]} and {names[1]} are not about the same rows ({len(first.ids)} and {len(second.ids)}; "
            f"{detail}); a paired test needs both systems on one test set"
        )
    if type(first) is not type(second):
        raise DataError(f"{names[0]} and {names[1]} are predictions of different tasks")
    if not first.agrees_with(second):
        what = "numbers of tokens" if isinstance(first, TokenPredictions) else "labels"
        raise DataError(f"{names[0]} and {names[1]} disagree on the {what} of the same rows")


def compare_two(
    first: Predictions,
    second: Predictions,
    names: tuple[str, str],
    metric: str | None = None,
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The second system against the first on one metric (the task's own, if None), with both systems' metrics.

    Args:
        groups: of each row; rows of one group are drawn together.

    Raises:
        DataError: not the same rows, or a metric that such predictions do not have.
    """
    check_same_rows(first, second, names)
    metric = metric or first.primary_metric
    if metric not in first.metrics:
        raise DataError(f"these predictions have no {metric}; they have: {', '.join(first.metrics)}")
    for name, one in zip(names, (first, second), strict=True):
        if not np.isfinite(compute_metrics(one)[metric]):
            raise DataError(f"{name} has no {metric}: it gives no probabilities; choose another --metric")
    return compare_with({names[0]: first, names[1]: second}, names[1], metric, groups)


def compare_with(
    predictions: Mapping[str, Predictions],
    system: str,
    metric: str | None = None,
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """One system against each of the others on one metric (the task's own, if None), with the metrics of all.

    Args:
        groups: of each row; rows of one group are drawn together.

    Raises:
        DataError: not the same rows.
    """
    mine = predictions[system]
    for name, other in predictions.items():
        check_same_rows(other, mine, (name, system))
    resampled = bootstrap_metrics(predictions, groups)
    metric, units = metric or mine.primary_metric, len(mine.ids if groups is None else set(groups))
    others = (name for name in predictions if name != system)
    return {
        "version": 1,
        "primary_metric": metric,
        "systems": [{"name": name, "metrics": metric_intervals(one, resampled[name], units)}
                    for name, one in predictions.items()],
        "contrasts": settle([contrast(system, name, metric, predictions, resampled, units) for name in others]),
    }  # fmt: skip


def compare_systems(
    records: Sequence[dict[str, Any]],
    predictions: Mapping[str, Predictions],
    groups: Sequence[str] | None,
    leaked: set[str],
    seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(systems, contrasts) of a run: every tuned system against every other kind.

    Args:
        records: name, title, kind, method, seed and cost of each system.
        leaked: ids of test rows that train holds too; `metrics_clean` leaves them out.
    """
    first = next(iter(predictions.values()))
    resampled = bootstrap_metrics(predictions, groups, seed=seed)
    keep = np.array([row not in leaked for row in first.ids])
    units = len(first.ids if groups is None else set(groups))
    clean, clean_resampled, clean_units = dict(predictions), resampled, units
    if leaked and keep.any():
        clean = {name: one.select(keep) for name, one in predictions.items()}
        kept_groups = None if groups is None else [group for group, kept in zip(groups, keep, strict=True) if kept]
        clean_resampled = bootstrap_metrics(clean, kept_groups, seed=seed)
        clean_units = int(keep.sum()) if kept_groups is None else len(set(kept_groups))
    systems = [
        {
            **record,
            "metrics": metric_intervals(predictions[record["name"]], resampled[record["name"]], units),
            "metrics_clean": metric_intervals(clean[record["name"]], clean_resampled[record["name"]], clean_units),
        }
        for record in records
    ]
    tuned = [record["name"] for record in records if record["kind"] == "tuned"]
    others = [record["name"] for record in records if record["kind"] != "tuned"]
    pairs = [(name, other) for name in tuned for other in others]
    return systems, settle([contrast(a, b, first.primary_metric, predictions, resampled, units) for a, b in pairs])


def check_metric(metric: str) -> str:
    """The metric's name, or DataError with the nearest."""
    known = sorted({name for kind in KINDS for name in kind.metrics})
    if metric not in known:
        raise DataError(f"unknown metric {metric!r}{suggest(metric, known)}; there are: {', '.join(known)}")
    return metric
