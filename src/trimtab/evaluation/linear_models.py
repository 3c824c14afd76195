"""Linear models by task: logistic regression for classes and for each label, ridge regression for values.

What comes out is always a weight and a bias, so that the same functions serve sparse word counts and
the features of a frozen base, and a head can start at what was fitted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from trimtab.evaluation.predictions import Floats

# A share of nothing still has a logarithm.
_SMALLEST = 1e-12


class Fit(NamedTuple):
    """outputs = features weight^T + bias; `weight` [columns, features], `bias` [columns]."""

    weight: Floats
    bias: Floats
    strength: float

    def outputs(self, features: Any) -> Floats:
        return np.asarray(features @ self.weight.T + self.bias)


class LinearModel(NamedTuple):
    """How a task's outputs are fitted, judged, and guessed without any features."""

    fit: Callable[..., Fit]  # (features, labels, columns, strength, fit_intercept, class_weight)
    loss: Callable[[Floats, Any], float]
    constant: Callable[[Any, int], Floats]  # (labels, columns) -> [columns]


def best_fit(
    model: LinearModel,
    features: Any,
    labels: Any,
    columns: int,
    held_out: Any,
    held_out_labels: Any,
    strengths: Sequence[float],
    fit_intercept: bool = True,
    class_weight: str | None = None,
) -> Fit:
    """The fit with the least validation loss; once that falls no more, freer ones, slower to fit, are not tried.

    Args:
        columns: outputs: classes, those that these labels lack among them, or labels, or one value.
        strengths: inverse regularisation strengths, rising.
        class_weight: scikit-learn's word for it, where the task has classes.
    """
    best: tuple[float, Fit] | None = None
    for strength in strengths:
        fit = model.fit(features, labels, columns, strength, fit_intercept, class_weight)
        loss = model.loss(fit.outputs(held_out), held_out_labels)
        if best is not None and loss >= best[0]:
            break
        best = (loss, fit)
    assert best is not None
    return best[1]


def fit_logistic_regression(
    features: Any, labels: Any, strength: float, fit_intercept: bool, class_weight: str | None = None
) -> Any:
    """scikit-learn's, by Newton's method with conjugate gradients; `strength` is its `C`.

    Of wide features it is several times as fast as lbfgs, and closer to the optimum (docs/decisions.md, 99).
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(
        C=strength, fit_intercept=fit_intercept, class_weight=class_weight, solver="newton-cg", tol=1e-6, max_iter=200
    )
    with warnings.catch_warnings():  # the validation loss judges what comes out, finished or not
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        return model.fit(features, labels)


def _fit_classes(
    features: Any, labels: Any, columns: int, strength: float, fit_intercept: bool, class_weight: str | None
) -> Fit:
    model = fit_logistic_regression(features, labels, strength, fit_intercept, class_weight)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # two classes share one direction
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    if len(weight) < columns:  # a class that these rows do not have is the least likely
        whole, shift = np.zeros((columns, weight.shape[1])), np.full(columns, np.log(_SMALLEST))
        whole[model.classes_], shift[model.classes_] = weight, bias
        weight, bias = whole, shift
    return Fit(weight, bias, strength)


def _fit_several(
    features: Any, labels: Any, columns: int, strength: float, fit_intercept: bool, class_weight: str | None
) -> Fit:
    weight, bias = np.zeros((columns, features.shape[1])), np.zeros(columns)
    for column in range(columns):
        of_label = labels[:, column] > 0.5
        if of_label.all() or not of_label.any():  # nothing to tell apart
            bias[column] = 10.0 if of_label.all() else -10.0
            continue
        model = fit_logistic_regression(features, of_label, strength, fit_intercept)
        weight[column], bias[column] = model.coef_[0], model.intercept_[0] if fit_intercept else 0.0
    return Fit(weight, bias, strength)


def _fit_values(
    features: Any, labels: Any, columns: int, strength: float, fit_intercept: bool, class_weight: str | None
) -> Fit:
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=1.0 / strength, fit_intercept=fit_intercept).fit(features, labels)
    return Fit(np.atleast_2d(model.coef_), np.atleast_1d(np.asarray(model.intercept_, dtype=np.float64)), strength)


def _class_loss(outputs: Floats, labels: Any) -> float:
    return float(F.cross_entropy(torch.from_numpy(outputs), torch.as_tensor(labels)))


def _several_loss(outputs: Floats, labels: Any) -> float:
    return float(F.binary_cross_entropy_with_logits(torch.from_numpy(outputs), torch.as_tensor(labels).double()))


def _value_loss(outputs: Floats, labels: Any) -> float:
    return float(np.mean((outputs[:, 0] - labels) ** 2))


def _class_shares(labels: Any, columns: int) -> Floats:
    counts = np.bincount(labels, minlength=columns)
    return np.asarray(np.log(np.maximum(counts / counts.sum(), _SMALLEST)))


def _label_shares(labels: Any, columns: int) -> Floats:
    shares = np.clip(labels.mean(axis=0), 1e-6, 1 - 1e-6)
    return np.asarray(np.log(shares / (1 - shares)))


def _mean_value(labels: Any, columns: int) -> Floats:
    return np.array([labels.mean()])


_CLASSES = LinearModel(_fit_classes, _class_loss, _class_shares)
LINEAR_MODELS: dict[str, LinearModel] = {
    "classification": _CLASSES,
    "token_classification": _CLASSES,
    "multilabel": LinearModel(_fit_several, _several_loss, _label_shares),
    "regression": LinearModel(_fit_values, _value_loss, _mean_value),
}
