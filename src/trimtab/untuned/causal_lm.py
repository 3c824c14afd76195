"""Language models that need no tuning: frequencies of tokens, and the base itself."""

from __future__ import annotations

import time

import numpy as np

from trimtab.evaluation.evaluate import Scorer, peak_memory_bytes, predict_outputs, record_system, scoring_cost
from trimtab.evaluation.token_predictions import token_predictions_for
from trimtab.job import EncodedSplits, Job
from trimtab.models import count_parameters

SYSTEMS = ("token-frequencies", "base-model")


def score_token_frequencies(job: Job, encoded: EncodedSplits, vocabulary: int) -> None:
    """Each token by its share among those learnt from in train, with one added to every count (Laplace)."""
    folder = job.run.baseline("token-frequencies")
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


def score_base(job: Job, scorer: Scorer, encoded: EncodedSplits) -> None:
    """The base as it is, on the test rows."""
    folder = job.run.baseline("base-model")
    if folder.is_scored:
        return
    job.progress.stage("Scoring the base: test")
    scores = scorer.score(encoded.test, job.progress)
    parameters = count_parameters(scorer.base.model)
    cost = scoring_cost(scores, len(job.data.test)) | {
        "total_parameters": parameters,
        "trainable_parameters": 0,
        "trainable_percent": 0.0,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    predictions = predict_outputs(job.task, job.data.test, encoded.test, [], scores.outputs)
    record_system(folder, predictions, title="base model", kind="base", cost=cost)
