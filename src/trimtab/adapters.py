"""Adapters on disk: saved in peft's format, loaded again, and proved in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.data import Row, read_rows
from trimtab.engine.prepare import prepare_adapted
from trimtab.engine.scoring import Scores
from trimtab.errors import ReloadError, SourceError
from trimtab.evaluation.evaluate import Scorer, make_scorer, predict_outputs, record_system, scoring_cost
from trimtab.evaluation.prediction_files import read_predictions
from trimtab.evaluation.predictions import Predictions, compute_metrics
from trimtab.evaluation.preference_predictions import PreferencePredictions
from trimtab.evaluation.text_predictions import TextPredictions
from trimtab.generation import continue_prompts, write_answers
from trimtab.methods import WholeModel, get_method, virtual_tokens_of
from trimtab.models import BaseModel, load_base
from trimtab.precision import use_float32, use_trained_precision
from trimtab.progress import Progress
from trimtab.runs import RunFolder, TrialFolder, read_json, write_file, write_folder, write_json, write_jsonl
from trimtab.sources import ModelSource, fingerprint_model, locate_model
from trimtab.study_config import StudyConfig, build_study, read_study_file
from trimtab.tasks import task_of
from trimtab.tasks.causal_lm import CausalLM, prompt_of
from trimtab.tasks.examples import EncodedRows
from trimtab.tasks.preference import Preference, refer_to

# Largest difference in logits between training's end and a fresh process.
RELOAD_TOLERANCE = 1e-4
# Samples of a language model in the report: how many, tokens of a plain text's beginning, tokens written.
_SAMPLES, _PROMPT_TOKENS, _SAMPLE_TOKENS = 4, 32, 48


def save_start(peft_model: Any, target: Path) -> None:
    """Keep the adapter as it starts, where its start changed the base's weights (PiSSA), for `write_weights`."""
    config: Any = getattr(peft_model, "active_peft_config", None)
    start = getattr(config, "init_lora_weights", True)
    if not str(start).startswith("pissa"):
        return

    def write(folder: Path) -> None:
        config.init_lora_weights = True  # or reading it back would take the base apart again
        peft_model.save_pretrained(folder, safe_serialization=True)
        config.init_lora_weights = start

    write_folder(target, write)


def save_adapter(peft_model: Any, base: BaseModel, trial: TrialFolder, facts: dict[str, Any]) -> int:
    """Write adapter, head, tokenizer and facts as one folder; returns the weights' bytes.

    An adapter that changed the base's weights at its start is saved as LoRA of twice its rank, on the base as it was.
    """

    def write(folder: Path) -> None:
        write_weights(peft_model, base.new_modules, folder, trial.start if trial.start.is_dir() else None)
        base.tokenizer.save_pretrained(folder)
        write_json(trial.facts_in(folder), facts)

    write_folder(trial.adapter, write)
    return sum(path.stat().st_size for path in trial.adapter.glob("*.safetensors"))


def write_weights(peft_model: Any, new_modules: Sequence[str], folder: Path, start: Path | None = None) -> None:
    """Adapter and head in peft's format.

    Args:
        start: where `save_start` kept the adapter, if it did.
    """
    conversion = {} if start is None else {"path_initial_model_for_weight_conversion": str(start)}
    peft_model.save_pretrained(folder, safe_serialization=True, **conversion)
    _add_head(peft_model, new_modules, folder / SAFETENSORS_WEIGHTS_NAME)


def _add_head(peft_model: Any, new_modules: Sequence[str], file: Path) -> None:
    """Write what was trained and peft left out: the head, with methods without `modules_to_save`, and with PiSSA.

    Stock peft reads these weights, too, by their names.
    """
    config = getattr(peft_model, "active_peft_config", None)
    if config is None:
        return
    if hasattr(config, "modules_to_save"):
        saved = load_file(file)
        left_out = {name: value for name, value in get_peft_model_state_dict(peft_model).items() if name not in saved}
        if left_out:
            save_file(saved | left_out, file, metadata={"format": "pt"})
        return
    head = {
        name: parameter.detach().clone()
        for name, parameter in peft_model.named_parameters()
        if any(f".{module}." in name for module in new_modules)
    }
    if head:
        save_file(load_file(file) | head, file, metadata={"format": "pt"})


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
    task = task_of(study)
    is_whole = not get_method(study.method).is_adapter
    if is_whole:
        source = ModelSource(study.model, str(trial.adapter), True)
    head = task.head_settings(facts["label_names"])
    base = load_base(source, task.auto_class, head, study.seed, "none" if is_whole else study.quantize)
    scorer = make_scorer(task, base, study.max_length_tokens, progress, virtual_tokens_of(study))
    if is_whole:
        return scorer, WholeModel(base.model).eval()
    peft_model = PeftModel.from_pretrained(base.model, str(trial.adapter))
    scorer.choice = prepare_adapted(peft_model, scorer.choice)
    peft_model.eval()
    return scorer, peft_model


def evaluate_trial(run: RunFolder, trial: TrialFolder, progress: Progress) -> None:
    """Reload a trial's adapter, score the run's test rows, write predictions, metrics and logits."""
    study = build_study(read_study_file(run.study))
    progress.stage(f"Scoring {trial.name} from its saved folder")
    scorer, peft_model = load_scorer(study, trial, progress)
    rows = read_rows(run.test_rows)
    encoded = _encode(run, scorer, rows)
    training = read_json(trial.training)
    most = read_json(trial.facts_in(trial.adapter)).get("max_new_tokens")

    def predict() -> tuple[Scores, Predictions]:
        scores, written = scorer.score(encoded, progress), None
        if scorer.task.writes_answers:
            written = write_answers(peft_model, scorer.base.tokenizer, encoded.examples, most, progress)
        return scores, predict_outputs(scorer.task, rows, encoded, training["label_names"], scores.outputs, written)

    scores, predictions = predict()
    other: dict[str, Any] = {}
    if use_trained_precision(scorer.choice.forward, training):
        progress.stage(f"Scoring {trial.name} in {training['precision']}, as it was trained")
        trained, trained_predictions = predict()
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
    if isinstance(scorer.task, CausalLM):
        write_samples(study, scorer, peft_model, rows, encoded, trial, progress)
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


def write_samples(
    study: StudyConfig,
    scorer: Scorer,
    peft_model: Any,
    rows: Sequence[Row],
    encoded: EncodedRows,
    trial: TrialFolder,
    progress: Progress,
) -> None:
    """What the base and the tuned model write after the beginnings of some test rows, side by side."""
    progress.stage("Writing samples, base and tuned")
    tokenizer = scorer.base.tokenizer
    firsts = [encoded.rows.index(number) for number in range(min(_SAMPLES, len(rows)))]
    examples = [encoded.examples[place] for place in firsts]
    prompts = [prompt_of(example, _PROMPT_TOKENS) for example in examples]
    tuned = continue_prompts(peft_model, tokenizer, prompts, _SAMPLE_TOKENS)
    base = _continue_with_base(study, scorer, peft_model, prompts, progress)
    found = []
    for row, example, prompt, ours, theirs in zip(rows, examples, prompts, tuned, base, strict=False):
        truth = example.input_ids[len(prompt) :][:_SAMPLE_TOKENS]
        texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, truth))
        found.append(dict(zip(("id", "prompt", "truth", "base", "tuned"), (row.id, *texts, theirs, ours), strict=True)))
    write_jsonl(trial.samples, found)


def sample_answers(rows: Sequence[Row], base: TextPredictions, tuned: TextPredictions) -> list[dict[str, str]]:
    """Sources and references of the first rows, and what the base and the tuned model answered."""
    pairs = zip(rows, base.written, tuned.written, strict=True)
    return [{"id": row.id, "prompt": row.text, "truth": row.completion or "", "base": theirs, "tuned": ours}
            for row, theirs, ours in islice(pairs, _SAMPLES)]  # fmt: skip


def _continue_with_base(
    study: StudyConfig, scorer: Scorer, peft_model: Any, prompts: Sequence[Sequence[int]], progress: Progress
) -> list[str]:
    tokenizer = scorer.base.tokenizer
    if isinstance(peft_model, WholeModel):  # its base is gone
        base = load_base(locate_model(study.model, progress), scorer.task.auto_class, {}, study.seed)
        return continue_prompts(base.model, tokenizer, prompts, _SAMPLE_TOKENS)
    with peft_model.disable_adapter():
        return continue_prompts(peft_model, tokenizer, prompts, _SAMPLE_TOKENS)


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
