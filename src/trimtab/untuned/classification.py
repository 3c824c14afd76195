"""Classifiers that need no tuning: majority class, TF-IDF, the untrained head, and the linear probe."""

from __future__ import annotations

import time
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trimtab.engine.frozen import NumberFormat
from trimtab.evaluation.baselines import (
    LinearProbe,
    fit_linear_probe,
    majority_probabilities,
    tfidf_probabilities,
)
from trimtab.evaluation.class_predictions import predictions_for
from trimtab.evaluation.evaluate import Scorer, peak_memory_bytes, predict, record_system, scoring_cost
from trimtab.job import EncodedSplits, Job
from trimtab.precision import use_float32, use_precision
from trimtab.runs import write_file
from trimtab.tasks.classification import probabilities_of
from trimtab.tasks.heads import final_linear

SYSTEMS = ("majority-class", "tfidf-logistic-regression", "linear-probe", "untrained-head")


def score_text_baselines(job: Job) -> None:
    """Majority class, and TF-IDF with logistic regression: no model needed."""
    data = job.data
    majority, tfidf = job.run.baseline("majority-class"), job.run.baseline("tfidf-logistic-regression")
    if not majority.is_scored:
        probabilities = majority_probabilities(data.train, data.test, len(data.label_names))
        predictions = predictions_for(data.test, data.label_names, probabilities)
        record_system(majority, predictions, title="majority class", kind="baseline", cost={})
    if not tfidf.is_scored:
        job.progress.stage("Fitting TF-IDF + logistic regression")
        started = time.perf_counter()
        probabilities = tfidf_probabilities(data.train, data.validation, data.test)
        cost = {"train_seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}
        predictions = predictions_for(data.test, data.label_names, probabilities)
        record_system(tfidf, predictions, title="TF-IDF + logistic regression", kind="baseline", cost=cost)


def score_base(job: Job, scorer: Scorer, encoded: EncodedSplits, precision: NumberFormat) -> LinearProbe:
    """One pass of the frozen base over every row: the untrained head's scores, and the probe's features.

    Test rows are scored in float32, as every system's; what the probe is fitted on comes in the training precision.
    """
    untrained, probed = job.run.baseline("untrained-head"), job.run.baseline("linear-probe")
    if untrained.is_scored and probed.is_scored and probed.probe.is_file():
        return _read_probe(probed.probe)
    data, names = job.data, job.data.label_names
    job.progress.stage("Scoring the base: test")
    test = scorer.score(encoded.test, job.progress, features=True)
    job.progress.stage("Scoring the base: train and validation (features for the linear probe)")
    rest = encoded.train + encoded.validation
    forward = scorer.choice.forward
    use_precision(precision, job.task, forward, scorer.first_batch(encoded.train), job.progress, training=False)
    rest_scores = scorer.score(rest, job.progress, features=True)
    use_float32(forward)
    assert rest_scores.features is not None
    assert test.features is not None
    train_features, validation_features = torch.split(rest_scores.features, [len(data.train), len(data.validation)])

    started = time.perf_counter()
    probe = fit_linear_probe(
        train_features,
        [row.label for row in data.train],
        validation_features,
        [row.label for row in data.validation],
        has_bias=final_linear(scorer.base.model).bias is not None,
    )
    seconds = time.perf_counter() - started
    parameters = sum(parameter.numel() for parameter in scorer.base.model.parameters())
    base_cost = scoring_cost(test, len(data.test)) | {
        "total_parameters": parameters,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    record_system(
        untrained,
        predict(data.test, encoded.test, names, test),
        title="untrained head",
        kind="base",
        seed=job.study.seed,
        cost=base_cost | {"trainable_parameters": 0, "trainable_percent": 0.0},
    )
    weights = {"weight": probe.weight} | ({} if probe.bias is None else {"bias": probe.bias})
    write_file(probed.probe, lambda temporary: save_file(weights, temporary))
    size = sum(weight.numel() for weight in weights.values())
    record_system(
        probed,
        predictions_for(data.test, names, probabilities_of(probe.logits(test.features)).numpy()),
        title="linear probe (frozen base)",
        kind="baseline",
        cost=base_cost
        | {
            "trainable_parameters": size,
            "trainable_percent": 100 * size / parameters,
            "adapter_bytes": 4 * size,
        }
        | {"train_seconds": rest_scores.seconds + seconds, "train_tokens": encoded.train.tokens},
    )
    return probe


def _read_probe(path: Any) -> LinearProbe:
    weights = load_file(path)
    return LinearProbe(weights["weight"], weights.get("bias"), float("nan"))
