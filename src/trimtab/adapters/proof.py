"""A trial's adapter scored from its saved folder, in a fresh process, and held against what was trained."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file

from trimtab.adapters.files import write_facts
from trimtab.adapters.judging import judge
from trimtab.adapters.loading import load_adapter
from trimtab.adapters.samples import sample_answers, write_samples
from trimtab.adapters.saving import save_logits
from trimtab.data import Row, read_rows
from trimtab.errors import ReloadError
from trimtab.evaluation.evaluate import Scorer, record_system, scoring_cost
from trimtab.evaluation.prediction_files import read_predictions
from trimtab.evaluation.predictions import compute_metrics
from trimtab.evaluation.preference_predictions import PreferencePredictions
from trimtab.evaluation.text_predictions import TextPredictions
from trimtab.precision import use_float32, use_trained_precision
from trimtab.progress import Progress
from trimtab.runs import RunFolder, TrialFolder, read_json, write_json, write_jsonl
from trimtab.study_config import build_study, read_study_file
from trimtab.tasks import get_task, smooth_outputs
from trimtab.tasks.causal_lm import CausalLM
from trimtab.tasks.examples import EncodedRows
from trimtab.tasks.preference import Preference, refer_to

# Largest difference in logits between training's end and a fresh process; where an adapter is saved in another form
# than it was trained in (PiSSA), sums of large numbers are rounded in another order.
RELOAD_TOLERANCE, CONVERTED_TOLERANCE = 1e-4, 1e-3


def evaluate_trial(run: RunFolder, trial: TrialFolder, progress: Progress) -> None:
    """Reload a trial's adapter, score the run's test rows, write predictions, metrics and logits."""
    study = build_study(read_study_file(run.study))
    progress.stage(f"Scoring {trial.name} from its saved folder")
    adapter = load_adapter(trial.adapter, study.model, progress=progress)
    scorer = adapter.scorer
    rows = read_rows(run.test_rows)
    encoded = _encode(run, scorer, rows)
    training = read_json(trial.training)

    scores, predictions = judge(adapter, rows, encoded, progress)
    other: dict[str, Any] = {}
    if use_trained_precision(scorer.choice.forward, training):
        progress.stage(f"Scoring {trial.name} in {training['precision']}, as it was trained")
        trained, trained_predictions = judge(adapter, rows, encoded, progress)
        other = {"precision": training["precision"],
                 "metrics": compute_metrics(trained_predictions),
                 "max_abs_logit_difference": float((trained.outputs - scores.outputs).abs().max())}  # fmt: skip
        use_float32(scorer.choice.forward)
    record_system(
        trial,
        predictions,
        title=training["title"],
        kind="tuned",
        method=study.method,
        seed=study.seed,
        cost=training["cost"] | scoring_cost(scores, len(rows)),
        in_training_precision=other,
    )
    save_logits(trial.logits, scores.outputs)
    metric = predictions.primary_metric
    score = {"metric": metric, "value": compute_metrics(predictions)[metric], "test_rows": len(rows)}
    write_facts(trial.adapter, {**adapter.facts, "score": score})
    if isinstance(scorer.task, CausalLM):
        write_jsonl(trial.samples, write_samples(adapter, rows, encoded, progress))
    elif isinstance(predictions, TextPredictions):
        base = read_predictions(run.baseline("base-model").predictions)
        assert isinstance(base, TextPredictions)
        write_jsonl(trial.samples, sample_answers(rows, base, predictions))


def _encode(run: RunFolder, scorer: Scorer, rows: Sequence[Row]) -> EncodedRows:
    """The test rows; preferences with what the base was found to make of them."""
    encoded = scorer.encode(rows)
    if not isinstance(scorer.task, Preference):
        return encoded
    base = read_predictions(run.baseline("base-model").predictions)
    assert isinstance(base, PreferencePredictions)
    return refer_to(encoded, torch.from_numpy(base.log_probabilities))


def prove_reload(run: RunFolder, trial: TrialFolder, progress: Progress) -> dict[str, Any]:
    """Score a trial in a fresh process, and hold its logits against those at training's end.

    Raises:
        ReloadError: the process failed, or its logits differ by more than 1e-4 (PiSSA: 1e-3).
    """
    progress.stage(f"Reloading {trial.name} in a fresh process")
    score_in_fresh_process(run, trial)
    trained, reloaded = (load_file(path)["logits"] for path in (trial.trained_logits, trial.logits))
    task = get_task(build_study(read_study_file(run.study)).task)
    difference = float(smooth_outputs(task, trained - reloaded).abs().max())
    tolerance = CONVERTED_TOLERANCE if trial.start.is_dir() else RELOAD_TOLERANCE
    passed = bool(torch.isfinite(reloaded).all()) and difference <= tolerance
    result = {"max_abs_logit_difference": difference, "passed": passed}
    write_json(trial.reload, result)
    if not passed:
        raise ReloadError(
            f"{trial.adapter} does not give what was trained: logits differ by up to {difference:.2e} "
            f"(at most {tolerance:.0e}); do not use this adapter, and please report it"
        )
    return result


def score_in_fresh_process(run: RunFolder, trial: TrialFolder) -> None:
    """`trimtab evaluate` on its own, as a stranger would start it.

    Raises:
        ReloadError: with the last line that it said.
    """
    command = [sys.executable, "-m", "trimtab", "evaluate", str(run.path), "--trial", trial.name, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ReloadError(
            f"{trial.adapter} could not be scored in a fresh process: {' '.join(said)}; "
            f"the adapter is kept; try: trimtab evaluate {run.path}"
        )
