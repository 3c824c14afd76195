"""The main job: check, baselines, tune, reload, evaluate, compare, report.

Each stage leaves its files in the run folder; a stage whose files are there is not run again.
"""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from typing import Any

import torch

from trimtab.adapters import prove_reload
from trimtab.data import PreparedData, groups_of, prepare_data, write_rows
from trimtab.encoding import describe_encoded, encode_splits
from trimtab.errors import SourceError, StudyError, TrainingError
from trimtab.estimate import describe, estimate_job
from trimtab.evaluation.comparison import compare_systems
from trimtab.evaluation.evaluate import make_scorer, read_record
from trimtab.evaluation.prediction_files import read_predictions
from trimtab.fingerprints import fingerprint_files, fingerprint_model
from trimtab.job import Job
from trimtab.machine import describe_machine, git_state, package_versions, set_threads
from trimtab.methods import check_method, get_method, virtual_tokens_of
from trimtab.models import build_without_weights, check_quantize, load_base, load_tokenizer, quiet_libraries
from trimtab.precision import choose_precision
from trimtab.progress import Progress, Silent
from trimtab.report import write_report
from trimtab.runs import RunFolder, TrialFolder, read_json, write_json
from trimtab.sources import ModelSource, locate_model
from trimtab.study_config import StudyConfig
from trimtab.tasks import Task, get_task
from trimtab.tasks.classification import Classification, balance_classes
from trimtab.tasks.heads import final_linear, readout_of
from trimtab.tasks.preference import Preference
from trimtab.tasks.seq2seq import longest_target
from trimtab.tuning import cached_prefix, refer_splits, tune
from trimtab.untuned import score_untuned, untuned_are_scored


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
    set_threads()
    started = datetime.now(UTC)
    job = check_study(study, listener, overwrite)
    _keep_estimate(job)
    trial = job.run.trial(study.method, study.seed)
    failures: list[dict[str, str]] = []
    failure: TrainingError | None = None
    if not trial.is_proved or not untuned_are_scored(job.run, job.task):
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


def _keep_estimate(job: Job) -> None:
    """For the report to hold against what happens; a model that it does not understand is tuned all the same."""
    if job.run.estimate.is_file():
        return
    try:
        write_json(job.run.estimate, describe(estimate_job(job)))
    except Exception as error:  # builds differ without end, and the run's own checks have passed
        job.progress.note(f"no estimate: {type(error).__name__} ({str(error).splitlines()[0] if str(error) else ''})")


def check_study(study: StudyConfig, progress: Progress, overwrite: bool = False, *, claim: bool = True) -> Job:
    """Every check that needs no weights; then the run folder is this study's, if it is to be claimed."""
    get_method(study.method)
    task = get_task(study.task, study.beta)
    run = RunFolder(study.run_folder)
    if claim:
        run.check_free(study.to_yaml(), overwrite)
    progress.stage("Reading the data")
    data = prepare_data(study, progress)
    check_quantize(study.quantize)
    source = locate_model(study.model, progress)
    check_model(source, study, task)
    if study.class_weight:
        task = _weigh_classes(task, data)
    encoded = encode_splits(study, task, data, source, progress)
    if claim:
        run.claim(study.to_yaml(), overwrite)
        write_rows(run.test_rows, data.test)
        write_json(run.data_summary, data.summary() | describe_encoded(encoded))
    return Job(study, task, run, data, source, encoded, progress)


def _weigh_classes(task: Task, data: PreparedData) -> Task:
    if not isinstance(task, Classification):
        raise StudyError(f"class_weights: {task.name} has no classes to weigh; leave it at none")
    return Classification(balance_classes([row.label for row in data.train], len(data.label_names)))


def check_model(source: ModelSource, study: StudyConfig, task: Task) -> None:
    """Refuse a model that cannot be tuned here, from its configuration alone.

    Raises:
        SourceError: it has no model for the task, or its head is not one that is known.
        StudyError: layers to adapt that it does not have, or a method that cannot go into it.
    """
    model = build_without_weights(source, task.auto_class)
    check_method(lambda: build_without_weights(source, task.auto_class), study)
    try:
        (final_linear if task.has_probe else readout_of)(model)
    except NotImplementedError as error:
        raise SourceError(
            f"{source.name} cannot be used: {error}; choose a BERT, Llama or GPT-2 family model"
        ) from error


def _score_and_tune(job: Job, trial: TrialFolder) -> None:
    job.progress.stage(f"Loading {job.study.model}")
    with job.timed("load base"):
        head = job.task.head_settings(job.data.label_names)
        new_tokens = job.study.added_tokens
        tokenizer = load_tokenizer(job.source, new_tokens) if new_tokens else None
        base = load_base(job.source, job.task.auto_class, head, job.study.seed, job.study.quantize, tokenizer)
        reserved = virtual_tokens_of(job.study)
        scorer = make_scorer(job.task, base, job.encoded.max_length_tokens, job.progress, reserved)
        precision = choose_precision(job.study, scorer.choice.forward, job.progress)
        base_sha256 = fingerprint_model(job.source)
        facts = {
            "base": job.source.lasting_name,
            "base_commit": job.source.commit,
            "base_sha256": base_sha256,
            "task": job.study.task,
            "label_names": job.data.label_names,
            "max_length_tokens": scorer.max_length_tokens,
            "versions": package_versions(),
            "method": job.study.method,
            "seed": job.study.seed,
            "quantize": job.study.quantize,
            "beta": job.study.beta,
            "virtual_tokens": reserved,
            "new_tokens": new_tokens,
            "is_chat": job.data.columns.messages is not None,
            "columns": {what: name for what, name in job.data.columns.named.items() if name is not None},
        }
    encoded = job.encoded
    if job.task.writes_answers:
        facts["max_new_tokens"] = longest_target(encoded.train + encoded.validation)
    with cached_prefix(job.study, scorer, base_sha256, job.progress):
        with job.timed("base"):
            probe = score_untuned(job, scorer, encoded, precision)
        if isinstance(job.task, Preference):
            encoded = refer_splits(scorer, encoded, job.progress)
        if not trial.trained_logits.is_file():
            with job.timed("tune"):
                tune(job.study, scorer, encoded, probe, precision, trial, facts, job.progress)
    with job.timed("reload and evaluate"):
        prove_reload(job.run, trial, job.progress)


def compare_run(
    run: RunFolder, study: StudyConfig, data: PreparedData, failures: list[dict[str, str]]
) -> dict[str, Any]:
    """Write `comparison.json` from the systems' files."""
    folders = run.systems()
    predictions = {folder.name: read_predictions(folder.predictions) for folder in folders}
    groups = groups_of(data.test)
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
        "primary_metric": next(iter(predictions.values())).primary_metric,
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
