"""The main job: check, baselines, tune, reload, evaluate, compare, report.

Each stage leaves its files in the run folder; a stage whose files are there is not run again.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from trimtab.adapters import prove_reload
from trimtab.data import PreparedData, prepare_data, write_rows
from trimtab.errors import SourceError, TrainingError
from trimtab.evaluation.baselines import (
    LinearProbe,
    fit_linear_probe,
    majority_probabilities,
    tfidf_probabilities,
)
from trimtab.evaluation.comparison import PRIMARY_METRIC, compare_systems
from trimtab.evaluation.evaluate import (
    Scorer,
    make_scorer,
    peak_memory_bytes,
    predict,
    read_record,
    record_system,
    scoring_cost,
)
from trimtab.evaluation.predictions import predictions_for, read_predictions
from trimtab.machine import describe_machine, git_state, package_versions
from trimtab.methods import build_config, get_method
from trimtab.models import build_without_weights, load_base, quiet_libraries
from trimtab.precision import NumberFormat, choose_precision, use_float32, use_precision
from trimtab.progress import Progress, Silent
from trimtab.report import write_report
from trimtab.runs import RunFolder, TrialFolder, read_json, write_file, write_json
from trimtab.sources import ModelSource, fingerprint_files, fingerprint_model, locate_model
from trimtab.study_config import StudyConfig
from trimtab.tasks.classification import EncodedRows
from trimtab.tasks.heads import final_linear
from trimtab.tuning import TuningData, cached_prefix, tune


@dataclass
class Job:
    """What the stages of one run share."""

    study: StudyConfig
    run: RunFolder
    data: PreparedData
    source: ModelSource
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 2)


def run_study(
    study: StudyConfig,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Evaluate the base, tune, reload, evaluate again, compare, report.

    Returns:
        What stands in `comparison.json`.

    Raises:
        InputError: before any weight is read, and with nothing lost.
        RunError: what was finished is in the run folder; the same command goes on from there.
    """
    listener = progress or Silent()
    quiet_libraries()
    started = datetime.now(UTC)
    job = check_study(study, listener, overwrite)
    trial = job.run.trial(study.method, study.seed)
    failures: list[dict[str, str]] = []
    failure: TrainingError | None = None
    if not trial.is_proved or not _baselines_are_scored(job.run):
        try:
            _score_and_tune(job, trial)
        except TrainingError as error:
            failure = error
            failures.append({"trial": trial.name, "reason": str(error)})
    _write_manifest(job, trial, started, command)
    comparison = compare_run(job.run, study, job.data, failures)
    with job.timed("report"):
        write_report(job.run)
    if failure:
        raise failure
    return comparison


def check_study(study: StudyConfig, progress: Progress, overwrite: bool = False) -> Job:
    """Every check that needs no weights; then the run folder is this study's."""
    get_method(study.method)
    run = RunFolder(study.run_folder)
    run.check_free(study.to_yaml(), overwrite)
    progress.stage("Reading the data")
    data = prepare_data(study, progress)
    source = locate_model(study.model, progress)
    check_model(source, study)
    run.claim(study.to_yaml(), overwrite)
    write_rows(run.test_rows, data.test)
    return Job(study, run, data, source, progress)


def check_model(source: ModelSource, study: StudyConfig) -> None:
    """Refuse a model that cannot be tuned here, from its configuration alone.

    Raises:
        SourceError: it cannot classify, or its head is not one that a linear probe can start.
        StudyError: layers to adapt that it does not have.
    """
    model = build_without_weights(source)
    build_config(model, study)
    try:
        final_linear(model)
    except NotImplementedError as error:
        raise SourceError(
            f"{source.name} cannot be used: {error}; choose a BERT, Llama or GPT-2 family model"
        ) from error


def _baselines_are_scored(run: RunFolder) -> bool:
    names = ("majority-class", "tfidf-logistic-regression", "linear-probe", "untrained-head")
    return all(run.baseline(name).is_scored for name in names)


def _score_and_tune(job: Job, trial: TrialFolder) -> None:
    with job.timed("text baselines"):
        score_text_baselines(job)
    job.progress.stage(f"Loading {job.study.model}")
    with job.timed("load base"):
        base = load_base(job.source, job.data.label_names, job.study.seed)
        scorer = make_scorer(base, job.study.max_length_tokens, job.progress)
        precision = choose_precision(job.study.precision, scorer.choice.forward, job.progress)
        base_sha256 = fingerprint_model(job.source)
        facts = {
            "base": job.study.model,
            "base_sha256": base_sha256,
            "task": job.study.task,
            "label_names": job.data.label_names,
            "max_length_tokens": scorer.max_length_tokens,
            "versions": package_versions(),
        }
    encoded = encode_splits(job, scorer)
    with cached_prefix(job.study, scorer, base_sha256, job.progress):
        with job.timed("base"):
            probe = score_base(job, scorer, encoded, precision)
        if not trial.trained_logits.is_file():
            with job.timed("tune"):
                tune(job.study, scorer, encoded, probe, precision, trial, facts, job.progress)
    with job.timed("reload and evaluate"):
        prove_reload(job.run, trial, job.progress)


def encode_splits(job: Job, scorer: Scorer) -> TuningData:
    """Tokenise every split, and tell lengths and truncations."""
    job.progress.stage("Tokenising")
    splits = {name: scorer.encode(getattr(job.data, name)) for name in ("train", "validation", "test")}
    lengths = {name: _describe_lengths(encoded) for name, encoded in splits.items()}
    write_json(job.run.data_summary, job.data.summary() | {"tokens": lengths})
    train = lengths["train"]
    job.progress.note(
        f"tokens a text: median {train['median']:.0f}, 95 % below {train['p95']:.0f}, longest {train['longest']}; "
        f"{train['total']:,} in train"
    )
    cut = {name: length["truncated"] for name, length in lengths.items() if length["truncated"]}
    if cut:
        told = ", ".join(f"{count} {name}" for name, count in cut.items())
        job.progress.note(f"cut to {scorer.max_length_tokens} tokens: {told} texts")
    else:
        job.progress.note(f"no text is longer than {scorer.max_length_tokens} tokens")
    return TuningData(**splits)


def _describe_lengths(encoded: EncodedRows) -> dict[str, Any]:
    lengths = np.array([len(example) for example in encoded.examples])
    return {
        "median": float(np.median(lengths)),
        "p95": float(np.percentile(lengths, 95)),
        "longest": int(lengths.max()),
        "total": int(lengths.sum()),
        "truncated": encoded.truncated,
    }


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


def score_base(job: Job, scorer: Scorer, encoded: TuningData, precision: NumberFormat) -> LinearProbe:
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
    rest = EncodedRows([*encoded.train.examples, *encoded.validation.examples], 0)
    forward = scorer.choice.forward
    use_precision(precision, forward, scorer.first_batch(encoded.train), job.progress, training=False)
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
        predict(data.test, names, test.logits),
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
        predict(data.test, names, probe.logits(test.features)),
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


def compare_run(
    run: RunFolder, study: StudyConfig, data: PreparedData, failures: list[dict[str, str]]
) -> dict[str, Any]:
    """Write `comparison.json` from the systems' files."""
    folders = run.systems()
    predictions = {folder.name: read_predictions(folder.predictions) for folder in folders}
    groups = [row.group or "" for row in data.test] if data.columns.group else None
    systems, contrasts = compare_systems(
        [read_record(folder) for folder in folders], predictions, groups, data.leaked_test_ids, study.seed
    )
    proofs = [read_json(trial.reload) for trial in run.trials() if trial.reload.is_file()]
    summary = data.summary()
    kept = ("train_rows", "validation_rows", "test_rows", "duplicate_rows", "leaked_test_rows", "sha256")
    comparison = {
        "version": 1,
        "study": study.name,
        "task": study.task,
        "primary_metric": PRIMARY_METRIC,
        "data": {name: summary[name] for name in kept},
        "systems": systems,
        "contrasts": contrasts,
        "reload": max(proofs, key=lambda proof: proof["max_abs_logit_difference"])
        if proofs
        else {"max_abs_logit_difference": None, "passed": False},
        "failures": failures,
    }
    write_json(run.comparison, comparison)
    return comparison


def _write_manifest(job: Job, trial: TrialFolder, started: datetime, command: list[str] | None) -> None:
    earlier = read_json(job.run.manifest) if job.run.manifest.is_file() else {}
    adapter = {}
    if trial.adapter.is_dir():
        adapter = {trial.name: fingerprint_files(list(trial.adapter.glob("*.safetensors")))}
        model_sha256 = read_json(trial.facts_in(trial.adapter))["base_sha256"]
    else:
        model_sha256 = fingerprint_model(job.source)
    manifest = {
        "trimtab": package_versions().get("trimtab"),
        "command": shlex.join(command) if command else None,
        "started": started.isoformat(timespec="seconds"),
        "seconds": earlier.get("seconds", {}) | job.seconds,
        "versions": package_versions(),
        "machine": describe_machine(),
        "git": git_state(),
        "model": job.study.model,
        "model_sha256": model_sha256,
        "data_sha256": job.data.sha256,
        "adapter_sha256": adapter,
        "threads": torch.get_num_threads(),
    }
    write_json(job.run.manifest, manifest)
