"""Preferences without a model: for the longer answer, and for the words of answers that were chosen."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from trimtab.data import Row
from trimtab.evaluation.evaluate import peak_memory_bytes, record_system
from trimtab.evaluation.linear_models import fit_logistic_regression
from trimtab.evaluation.predictions import Floats
from trimtab.evaluation.preference_predictions import PreferencePredictions
from trimtab.job import Job

SYSTEMS = ("answer-length", "tfidf-preference")


def score_text_systems(job: Job) -> None:
    """What lengths and words alone say."""
    data = job.data
    by_length, by_words = (job.run.baseline(name) for name in SYSTEMS)
    if not by_length.is_scored:
        record_system(by_length, _predict(data.test, length_margins(data.train, data.test)),
                      title="answer of the usual length", kind="baseline", cost={})  # fmt: skip
    if not by_words.is_scored:
        started = time.perf_counter()
        margins = word_margins(data.train, data.test)
        cost = {"train_seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}
        record_system(by_words, _predict(data.test, margins), title="TF-IDF + logistic regression", kind="baseline",
                      cost=cost)  # fmt: skip


def _predict(rows: Sequence[Row], margins: Floats) -> PreferencePredictions:
    nothing = np.full((len(rows), 2), np.nan)
    return PreferencePredictions([row.id for row in rows], margins, nothing[:, 0], nothing)


def length_margins(train: Sequence[Row], rows: Sequence[Row]) -> Floats:
    """Characters by which the chosen answer is longer, or shorter where in train the shorter is more often chosen."""

    def differences(part: Sequence[Row]) -> Floats:
        return np.array([len(row.completion or "") - len(row.rejected or "") for row in part], dtype=np.float64)

    return differences(rows) * (1.0 if np.sign(differences(train)).sum() >= 0 else -1.0)


def word_margins(train: Sequence[Row], rows: Sequence[Row]) -> Floats:
    """Logits of a logistic regression on the difference of the two answers' TF-IDF, without a constant."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"\S+")
    vectorizer.fit([text or "" for row in train for text in (row.completion, row.rejected)])

    def features(part: Sequence[Row]) -> object:
        chosen, rejected = zip(*((row.completion or "", row.rejected or "") for row in part), strict=True)
        return vectorizer.transform(chosen) - vectorizer.transform(rejected)

    # Each pair is seen both ways round, or there would be one class only.
    signs = np.where(np.arange(len(train)) % 2, 1.0, -1.0)
    flipped = features(train).multiply(signs[:, None]).tocsr()  # type: ignore[attr-defined]
    fitted = fit_logistic_regression(flipped, signs > 0, 1.0, fit_intercept=False)
    found: Floats = fitted.decision_function(features(rows))
    return found
