"""The cheap systems that tuning must beat: majority class, TF-IDF, and the linear probe."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.data import Row
from trimtab.evaluation.predictions import Floats

# Inverse regularisation strengths tried; the validation loss chooses.
_PROBE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_TFIDF_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0)


def majority_probabilities(train: Sequence[Row], test: Sequence[Row], classes: int) -> Floats:
    """The class shares of train, for every test row."""
    counts = np.bincount([row.label for row in train], minlength=classes)
    return np.tile(counts / counts.sum(), (len(test), 1))


def tfidf_probabilities(train: Sequence[Row], validation: Sequence[Row], test: Sequence[Row]) -> Floats:
    """Logistic regression on TF-IDF of words and word pairs, as strong as validation likes."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    def texts(rows: Sequence[Row]) -> list[str]:
        return [f"{row.text} {row.text_pair or ''}" for row in rows]

    # Single letters and signs count as words too, so that no text set leaves the vocabulary empty.
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]")
    features = vectorizer.fit_transform(texts(train))
    held_out = vectorizer.transform(texts(validation))
    model = _best_regression(features, _labels(train), held_out, _labels(validation), _TFIDF_STRENGTHS)
    return np.asarray(model.predict_proba(vectorizer.transform(texts(test))))


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier on raw features: logits = features @ weight.T + bias.

    `weight` is [classes, features], float32; `bias` [classes], or None for heads without one.
    """

    weight: Tensor
    bias: Tensor | None
    strength: float

    def logits(self, features: Tensor) -> Tensor:
        return torch.nn.functional.linear(features, self.weight, self.bias)


def fit_linear_probe(
    features: Tensor, labels: Sequence[int], held_out: Tensor, held_out_labels: Sequence[int], has_bias: bool
) -> LinearProbe:
    """Standardised logistic regression, folded back onto the raw features.

    A head without bias cannot hold a shift, so its probe scales features without centring them
    and fits no intercept: what comes out is exactly what that head can express.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler(with_mean=has_bias).fit(features.double().numpy())
    model = _best_regression(
        scaler.transform(features.double().numpy()),
        np.asarray(labels),
        scaler.transform(held_out.double().numpy()),
        np.asarray(held_out_labels),
        _PROBE_STRENGTHS,
        fit_intercept=has_bias,
    )
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # two classes share one direction
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    weight = weight / scaler.scale_
    shift = torch.from_numpy(bias - weight @ scaler.mean_).float() if has_bias else None
    # Several classes come in column order, which safetensors does not store.
    return LinearProbe(torch.from_numpy(np.ascontiguousarray(weight)).float(), shift, float(model.C))


def _labels(rows: Sequence[Row]) -> np.ndarray:
    return np.array([row.label for row in rows])


def _best_regression(
    features: Any,
    labels: Any,
    held_out: Any,
    held_out_labels: Any,
    strengths: Sequence[float],
    fit_intercept: bool = True,
) -> Any:
    """The logistic regression with the least validation loss."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    best: tuple[float, Any] | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength in strengths:
            model = LogisticRegression(C=strength, fit_intercept=fit_intercept, max_iter=500).fit(features, labels)
            loss = log_loss(held_out_labels, model.predict_proba(held_out), labels=model.classes_)
            if best is None or loss < best[0]:
                best = (float(loss), model)
    assert best is not None
    return best[1]
