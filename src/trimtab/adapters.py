"""Adapters on disk: saved in peft's format, loaded again, and proved in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.data import Row, read_rows
from trimtab.engine.prepare import prepare_adapted
from trimtab.errors import ReloadError, SourceError
from trimtab.evaluation.evaluate import Scorer, make_scorer, predict, record_system, scoring_cost
from trimtab.evaluation.predictions import compute_metrics
from trimtab.generation import continue_prompts
from trimtab.models import load_base
from trimtab.precision import use_float32, use_trained_precision
from trimtab.progress import Progress
from trimtab.runs import RunFolder, TrialFolder, read_json, write_file, write_folder, write_json, write_jsonl
from trimtab.sources import fingerprint_model, locate_model
from trimtab.study_config import StudyConfig, build_study, read_study_file
from trimtab.tasks import get_task
from trimtab.tasks.causal_lm import prompt_of
from trimtab.tasks.examples import EncodedRows

# Largest difference in logits between training's end and a fresh process.
RELOAD_TOLERANCE = 1e-4
# Samples of a language model in the report: how many, tokens of a plain text's beginning, tokens written.
_SAMPLES, _PROMPT_TOKENS, _SAMPLE_TOKENS = 4, 32, 48


def save_adapter(peft_model: Any, tokenizer: Any, trial: TrialFolder, facts: dict[str, Any]) -> int:
    """Write adapter, head, tokenizer and facts as one folder; returns the weights' bytes."""

    def write(folder: Path) -> None:
        peft_model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        write_json(trial.facts_in(folder), facts)

    write_folder(trial.adapter, write)
    return sum(path.stat().st_size for path in trial.adapter.glob("*.safetensors"))


def save_logits(path: Path, logits: Tensor) -> None:
    write_file(path, lambda temporary: save_file({"logits": logits.contiguous()}, temporary))


def load_scorer(study: StudyConfig, trial: TrialFolder, progress: Progress) -> tuple[Scorer, Any]:
    """Base and saved adapter, as a stranger would load them, ready to score; and peft's model.

    Raises:
        SourceError: the base is not the one that the adapter was trained on.
    """
    from peft import PeftModel

    facts = read_json(trial.facts_in(trial.adapter))
    source = locate_model(study.model, progress)
    found = fingerprint_model(source)
    if found != facts["base_sha256"]:
        raise SourceError(
            f"{study.model} is not the base of {trial.adapter}: its weights have SHA-256 {found[:12]}…, "
            f"the adapter was trained on {facts['base_sha256'][:12]}…; give the base it was trained on"
        )
    task = get_task(facts["task"])
    base = load_base(source, task.auto_class, facts["label_names"], study.seed)
    scorer = make_scorer(task, base, study.max_length_tokens, progress)
    peft_model = PeftModel.from_pretrained(base.model, str(trial.adapter))
    prepare_adapted(peft_model, scorer.choice.forward)
    peft_model.eval()
    return scorer, peft_model


def evaluate_trial(run: RunFolder, trial: TrialFolder, progress: Progress) -> None:
    """Reload a trial's adapter, score the run's test rows, write predictions, metrics and logits."""
    study = build_study(read_study_file(run.study))
    progress.stage(f"Scoring {trial.name} from its saved folder")
    scorer, peft_model = load_scorer(study, trial, progress)
    rows = read_rows(run.test_rows)
    encoded = scorer.encode(rows)
    scores = scorer.score(encoded, progress)
    training = read_json(trial.training)
    names = training["label_names"]
    other: dict[str, Any] = {}
    if use_trained_precision(scorer.choice.forward, training):
        progress.stage(f"Scoring {trial.name} in {training['precision']}, as it was trained")
        trained = scorer.score(encoded, progress)
        other = {"precision": training["precision"],
                 "metrics": compute_metrics(predict(rows, encoded, names, trained)),
                 "max_abs_logit_difference": float((trained.outputs - scores.outputs).abs().max())}  # fmt: skip
        use_float32(scorer.choice.forward)
    record_system(
        trial,
        predict(rows, encoded, names, scores),
        title=training["title"],
        kind="tuned",
        method=study.method,
        seed=study.seed,
        cost=training["cost"] | scoring_cost(scores, len(rows)),
        in_training_precision=other,
    )
    save_logits(trial.logits, scores.outputs)
    if not names:
        write_samples(scorer, peft_model, rows, encoded, trial, progress)


def write_samples(
    scorer: Scorer, peft_model: Any, rows: Sequence[Row], encoded: EncodedRows, trial: TrialFolder, progress: Progress
) -> None:
    """What the base and the tuned model write after the beginnings of some test rows, side by side."""
    progress.stage("Writing samples, base and tuned")
    tokenizer = scorer.base.tokenizer
    firsts = [encoded.rows.index(number) for number in range(min(_SAMPLES, len(rows)))]
    examples = [encoded.examples[place] for place in firsts]
    prompts = [prompt_of(example, _PROMPT_TOKENS) for example in examples]
    tuned = continue_prompts(peft_model, tokenizer, prompts, _SAMPLE_TOKENS)
    with peft_model.disable_adapter():
        base = continue_prompts(peft_model, tokenizer, prompts, _SAMPLE_TOKENS)
    found = []
    for row, example, prompt, ours, theirs in zip(rows, examples, prompts, tuned, base, strict=False):
        truth = example.input_ids[len(prompt) :][:_SAMPLE_TOKENS]
        texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, truth))
        found.append(dict(zip(("id", "prompt", "truth", "base", "tuned"), (row.id, *texts, theirs, ours), strict=True)))
    write_jsonl(trial.samples, found)


def prove_reload(run: RunFolder, trial: TrialFolder, progress: Progress) -> dict[str, Any]:
    """Score a trial in a fresh process, and hold its logits against those at training's end.

    Raises:
        ReloadError: the process failed, or its logits differ by more than 1e-4.
    """
    progress.stage(f"Reloading {trial.name} in a fresh process")
    command = [sys.executable, "-m", "trimtab", "evaluate", str(run.path), "--trial", trial.name, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ReloadError(
            f"{trial.adapter} could not be scored in a fresh process: {' '.join(said)}; "
            f"the adapter is kept; try: trimtab evaluate {run.path}"
        )
    trained, reloaded = (load_file(path)["logits"] for path in (trial.trained_logits, trial.logits))
    difference = float((trained - reloaded).abs().max())
    passed = bool(torch.isfinite(reloaded).all()) and difference <= RELOAD_TOLERANCE
    result = {"max_abs_logit_difference": difference, "passed": passed}
    write_json(trial.reload, result)
    if not passed:
        raise ReloadError(
            f"{trial.adapter} does not give what was trained: logits differ by up to {difference:.2e} "
            f"(at most {RELOAD_TOLERANCE:.0e}); do not use this adapter, and please report it"
        )
    return result
