"""Language modelling without a model: frequencies of tokens."""

from __future__ import annotations

import time

import numpy as np

from trimtab.evaluation.evaluate import record_system
from trimtab.evaluation.token_predictions import token_predictions_for
from trimtab.job import EncodedSplits, Job

NAME = "token-frequencies"


def score_token_frequencies(job: Job, encoded: EncodedSplits, vocabulary: int) -> None:
    """Each token by its share among those learnt from in train, with one added to every count (Laplace)."""
    folder = job.run.baseline(NAME)
    if folder.is_scored:
        return
    started = time.perf_counter()
    counts = np.bincount(encoded.train.labels, minlength=vocabulary) + 1.0
    losses = -np.log(counts / counts.sum())
    labels = encoded.test.labels
    of_row = np.repeat(encoded.test.rows, [len(example.labels) for example in encoded.test.examples])
    hits = (labels == int(counts.argmax())).astype(np.float64)
    predictions = token_predictions_for([row.id for row in job.data.test], of_row, losses[labels], hits)
    cost = {"train_seconds": time.perf_counter() - started}
    record_system(folder, predictions, title="token frequencies", kind="baseline", cost=cost)
