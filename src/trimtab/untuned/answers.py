"""Answers without a model: the source itself, and the nearest training row's target."""

from __future__ import annotations

import time
from collections.abc import Sequence

from trimtab.data import Row
from trimtab.evaluation.by_task import predict_texts
from trimtab.evaluation.evaluate import peak_memory_bytes, record_system
from trimtab.job import EncodedSplits, Job

SYSTEMS = ("copied-source", "nearest-row")


def score_text_systems(job: Job, encoded: EncodedSplits) -> None:
    """What sources and targets alone say: no model needed."""
    data = job.data
    copied, nearest = job.run.baseline("copied-source"), job.run.baseline("nearest-row")
    if not copied.is_scored:
        predictions = predict_texts(data.test, encoded.test, [row.text for row in data.test])
        record_system(copied, predictions, title="source, copied", kind="baseline", cost={})
    if not nearest.is_scored:
        started = time.perf_counter()
        predictions = predict_texts(data.test, encoded.test, answer_by_nearest_row(data.train, data.test))
        cost = {"train_seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}
        record_system(nearest, predictions, title="nearest training row (TF-IDF)", kind="baseline", cost=cost)


def answer_by_nearest_row(train: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """For each row the target of that training row whose source has the most alike words (TF-IDF, cosine)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=r"\S+")
    index = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectorizer.fit_transform([row.text for row in train]))
    places = index.kneighbors(vectorizer.transform([row.text for row in rows]), return_distance=False)[:, 0]
    return [train[place].completion or "" for place in places]
