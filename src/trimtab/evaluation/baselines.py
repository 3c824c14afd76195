"""The cheap systems that tuning must beat: constants, TF-IDF, tags of words, and the linear probe."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.data import Row
from trimtab.evaluation.linear_models import LINEAR_MODELS, best_fit
from trimtab.evaluation.predictions import Floats

# Inverse regularisation strengths tried; the validation loss chooses.
_PROBE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_TFIDF_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_ROWS_AT_ONCE = 1000


def constant_outputs(task: str, labels: Any, rows: int, columns: int) -> Tensor:
    """[rows, columns]: what the training labels alone say, the same for every row."""
    return torch.from_numpy(np.tile(LINEAR_MODELS[task].constant(labels, columns), (rows, 1)))


def tfidf_outputs(
    task: str,
    splits: tuple[Sequence[Row], Sequence[Row], Sequence[Row]],
    labels: Any,
    validation_labels: Any,
    columns: int,
    class_weight: str | None = None,
) -> Tensor:
    """[test rows, columns]: a linear model on TF-IDF of words and word pairs, as strong as validation likes.

    Args:
        splits: rows of train, validation and test.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    train, validation, test = ([f"{row.text} {row.text_pair or ''}" for row in rows] for rows in splits)
    # Single letters and signs count as words too, so that no text set leaves the vocabulary empty.
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]")
    features, held_out = vectorizer.fit_transform(train), vectorizer.transform(validation)
    model = LINEAR_MODELS[task]
    fit = best_fit(
        model, features, labels, columns, held_out, validation_labels, _TFIDF_STRENGTHS, class_weight=class_weight
    )
    return torch.from_numpy(fit.outputs(vectorizer.transform(test)))


def word_tag_outputs(train: Sequence[Row], words: Sequence[str], tags: int) -> Tensor:
    """[words, tags]: log shares of each word's tags in train, drawn towards those of all words by one count."""
    of_word: dict[str, Counter[int]] = defaultdict(Counter)
    shares = np.full(tags, 1e-3)
    for row in train:
        for word, tag in zip(row.words or (), row.labels or (), strict=True):
            of_word[word][tag] += 1
            shares[tag] += 1
    shares /= shares.sum()
    found = np.stack([_counts(of_word.get(word), tags) + shares for word in words])
    return torch.from_numpy(np.log(found / found.sum(axis=1, keepdims=True)))


def _counts(counter: Counter[int] | None, size: int) -> Floats:
    counts = np.zeros(size)
    for number, count in (counter or {}).items():
        counts[number] = count
    return counts


@dataclass(frozen=True)
class LinearProbe:
    """A linear model on raw features: outputs = features @ weight.T + bias.

    `weight` is [columns, features], float32; `bias` [columns], or None for heads without one. `strength` is the inverse
    regularisation that it was fitted with; a probe that was read again does not tell.
    """

    weight: Tensor
    bias: Tensor | None
    strength: float | None = None

    def outputs(self, features: Tensor) -> Tensor:
        return torch.nn.functional.linear(features, self.weight, self.bias)


def fit_linear_probe(
    task: str,
    features: Tensor,
    labels: Any,
    columns: int,
    held_out: Tensor,
    held_out_labels: Any,
    has_bias: bool,
    class_weight: str | None = None,
) -> LinearProbe:
    """The task's linear model on standardised features, folded back onto the raw ones.

    A head without bias cannot hold a shift, so its probe scales features without centring them
    and fits no intercept: what comes out is exactly what that head can express.

    Args:
        features: [positions, features], with as many labels.
        columns: outputs of the head.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler(copy=False, with_mean=has_bias)  # `double` has made a copy already
    for some in torch.split(features, _ROWS_AT_ONCE):  # what a fit computes on the way is as large as its rows
        scaler.partial_fit(some.double().numpy())
    fit = best_fit(
        LINEAR_MODELS[task],
        scaler.transform(features.double().numpy()),
        labels,
        columns,
        scaler.transform(held_out.double().numpy()),
        held_out_labels,
        _PROBE_STRENGTHS,
        fit_intercept=has_bias,
        class_weight=class_weight,
    )
    weight = fit.weight / scaler.scale_
    shift = torch.from_numpy(fit.bias - weight @ scaler.mean_).float() if has_bias else None
    # Several classes come in column order, which safetensors does not store.
    return LinearProbe(torch.from_numpy(np.ascontiguousarray(weight)).float(), shift, fit.strength)
