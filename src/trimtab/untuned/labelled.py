"""Systems for texts and words with labels: a constant, a count of words, the untrained head, and the linear probe."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.engine.frozen import NumberFormat
from trimtab.evaluation.baselines import (
    LinearProbe,
    constant_outputs,
    tfidf_outputs,
    word_tag_outputs,
)
from trimtab.evaluation.evaluate import (
    Scorer,
    fit_probe,
    peak_memory_bytes,
    predict_outputs,
    record_system,
    scoring_cost,
)
from trimtab.job import EncodedSplits, Job
from trimtab.models import count_parameters
from trimtab.precision import use_float32, use_precision
from trimtab.runs import write_file

# By task: name and title of the system without features, and of that which counts words.
_TEXT_SYSTEMS = {
    "classification": (("majority-class", "majority class"),
                       ("tfidf-logistic-regression", "TF-IDF + logistic regression")),
    "multilabel": (("label-shares", "label shares"), ("tfidf-logistic-regression", "TF-IDF + logistic regression")),
    "regression": (("mean-value", "mean value"), ("tfidf-ridge-regression", "TF-IDF + ridge regression")),
    "token_classification": (("majority-tag", "majority tag"), ("word-tags", "each word's commonest tag")),
}  # fmt: skip


def systems_of(task: str) -> list[str]:
    return [name for name, _ in _TEXT_SYSTEMS[task]] + ["linear-probe", "untrained-head"]


def score_text_systems(job: Job, encoded: EncodedSplits) -> None:
    """What labels and words alone say: no model needed."""
    (constant, constant_title), (counting, counting_title) = _TEXT_SYSTEMS[job.task.name]
    labels = encoded.train.labels
    if not job.run.baseline(constant).is_scored:
        outputs = constant_outputs(job.task.name, labels, len(encoded.test.labels), _columns(job))
        _record(job, encoded, constant, constant_title, outputs, {})
    if not job.run.baseline(counting).is_scored:
        job.progress.stage(f"Fitting {counting_title}")
        started = time.perf_counter()
        outputs = _COUNTING[job.task.name](job, encoded)
        cost = {"train_seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}
        _record(job, encoded, counting, counting_title, outputs, cost)


def _columns(job: Job) -> int:
    return max(1, len(job.data.label_names))


def _record(job: Job, encoded: EncodedSplits, name: str, title: str, outputs: Tensor, cost: dict[str, Any]) -> None:
    predictions = predict_outputs(job.task, job.data.test, encoded.test, job.data.label_names, outputs)
    record_system(job.run.baseline(name), predictions, title=title, kind="baseline", cost=cost)


def _by_tfidf(job: Job, encoded: EncodedSplits) -> Tensor:
    data = job.data
    return tfidf_outputs(
        job.task.name, (data.train, data.validation, data.test), encoded.train.labels, encoded.validation.labels,
        _columns(job), job.study.class_weight,
    )  # fmt: skip


def _by_words(job: Job, encoded: EncodedSplits) -> Tensor:
    pairs = zip(job.data.test, encoded.test.examples, strict=True)
    words = [word for row, example in pairs for word in (row.words or [])[: len(example.labels)]]
    return word_tag_outputs(job.data.train, words, _columns(job))


_COUNTING: dict[str, Callable[[Job, EncodedSplits], Tensor]] = {
    "classification": _by_tfidf,
    "multilabel": _by_tfidf,
    "regression": _by_tfidf,
    "token_classification": _by_words,
}


def score_base(job: Job, scorer: Scorer, encoded: EncodedSplits, precision: NumberFormat) -> LinearProbe:
    """One pass of the frozen base: the untrained head's scores of test rows, and the probe's features of the others.

    Test rows are scored in float32, as every system's; what the probe is fitted on comes in the training precision.
    """
    untrained, probed = job.run.baseline("untrained-head"), job.run.baseline("linear-probe")
    if untrained.is_scored and probed.is_scored and probed.probe.is_file():
        return _read_probe(probed.probe)
    data, names = job.data, job.data.label_names
    job.progress.stage("Scoring the base: test")
    test = scorer.score(encoded.test, job.progress, features=True)
    job.progress.stage("Scoring the base: train and validation (features for the linear probe)")
    forward = scorer.choice.forward
    use_precision(precision, job.task, forward, scorer.first_batch(encoded.train), job.progress, training=False)
    started = time.perf_counter()
    train, validation = encoded.probed(job.study.max_probe_positions)
    probe = fit_probe(scorer, train, validation, job.study.class_weight, job.progress)
    seconds = time.perf_counter() - started
    use_float32(forward)
    assert test.features is not None
    parameters = count_parameters(scorer.base.model)
    base_cost = scoring_cost(test, len(data.test)) | {
        "total_parameters": parameters,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    record_system(
        untrained,
        predict_outputs(job.task, data.test, encoded.test, names, test.outputs),
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
        predict_outputs(job.task, data.test, encoded.test, names, probe.outputs(test.features)),
        title=f"linear probe ({'frozen base' if train is encoded.train else f'{len(train.examples):,} rows'})",
        kind="baseline",
        cost=base_cost
        | {
            "trainable_parameters": size,
            "trainable_percent": 100 * size / parameters,
            "adapter_bytes": 4 * size,
        }
        | {"train_seconds": seconds, "train_tokens": train.tokens},
    )
    return probe


def _read_probe(path: Any) -> LinearProbe:
    weights = load_file(path)
    return LinearProbe(weights["weight"], weights.get("bias"))
