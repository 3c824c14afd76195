"""An adapter and its base as one plain transformers model, written only once it has proved equal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel

from trimtab.data import Row, read_rows
from trimtab.engine.forward import stock_forward
from trimtab.errors import InputError, MergeError, SourceError
from trimtab.evaluation.evaluate import Scorer, predict_outputs
from trimtab.evaluation.predictions import compute_metrics
from trimtab.generation import Sampling, write_answers
from trimtab.models import BaseModel, load_base
from trimtab.progress import Progress, Silent
from trimtab.runs import RunFolder, TrialFolder, read_json, write_folder, write_json
from trimtab.sources import fingerprint_model, locate_model
from trimtab.study_config import build_study, read_study_file
from trimtab.tasks import Task, get_task
from trimtab.tasks.preference import Preference

MergeDtype = Literal["float32", "bfloat16", "float16"]
# Largest difference of an output (a logit, or a token's loss) between adapter and merged model that counts as equal.
BOUNDS: dict[str, float] = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 5e-1}
# Test rows on which both are held against each other.
_COMPARED_ROWS = 256


@dataclass(frozen=True)
class Merge:
    """What a merge was found to change, on `rows` test rows; `metric` is the task's own.

    `trained` is the metric of the system that was tuned, on all of its test rows: where its base was quantised, the
    merged model stands on the weights in full precision.
    """

    dtype: str
    max_abs_difference: float
    bound: float
    rows: int
    metric: str
    before: float
    after: float
    trained: float | None
    quantize: str

    @property
    def is_equal(self) -> bool:
        return self.max_abs_difference <= self.bound


def merge_adapter(
    adapter: Path, out: Path, dtype: MergeDtype = "float32", *, force: bool = False, progress: Progress | None = None
) -> Merge:
    """Write base and adapter as one model to `out`, with tokenizer and label names; plain transformers reads it.

    Args:
        adapter: the adapter folder of a trial in a run folder, whose test rows the models are compared on.
        force: write it even where outputs differ by more than the dtype's bound.

    Raises:
        InputError: no adapter of a run, another base, a method that cannot be merged, or `out` is taken.
        MergeError: the merged model differs by more than the bound; nothing was written.
    """
    listener = progress or Silent()
    trial, run = _find_trial(adapter)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; give another --out")
    study = build_study(read_study_file(run.study))
    facts = read_json(trial.facts_in(trial.adapter))
    task, rows = get_task(study.task), read_rows(run.test_rows)[:_COMPARED_ROWS]
    if not (trial.adapter / "adapter_config.json").is_file():
        raise InputError(f"{trial.adapter} holds a whole model, which needs no merge: transformers loads it as it is")
    listener.stage(f"Loading {facts['base']} and {trial.name}")
    base = _load_whole(facts, task, study.seed, listener)
    peft_model = _load_adapter(base, trial.adapter)
    scorer = Scorer(task, base, stock_forward(base.model), facts["max_length_tokens"])
    listener.stage("Scoring test rows with the adapter")
    outputs, before = _score(scorer, rows, facts, listener)
    merged = peft_model.merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    listener.stage(f"Scoring test rows with the merged model, in {dtype}")
    merged_outputs, after = _score(scorer, rows, facts, listener)
    metric, value = next(iter(before.items()))
    # A preference is told by rewards where the base stands beside it, and by log-probabilities here.
    scored = {} if isinstance(task, Preference) else read_json(trial.metrics)["metrics"]
    found = Merge(
        dtype, float((merged_outputs - outputs).abs().max()), BOUNDS[dtype], len(rows), metric, value, after[metric],
        scored.get(metric), study.quantize,
    )  # fmt: skip
    if not (found.is_equal or force):
        raise MergeError(
            f"{trial.adapter} merged in {dtype} is another model: outputs differ by up to "
            f"{found.max_abs_difference:.2e} (at most {found.bound:g}), {metric} {found.before:.4f} before and "
            f"{found.after:.4f} after, on {len(rows)} test rows; nothing was written: try --dtype float32, or --force"
        )

    def write(folder: Path) -> None:
        merged.save_pretrained(folder, safe_serialization=True)
        base.tokenizer.save_pretrained(folder)
        write_json(folder / "merge.json", {"base": facts["base"], "base_sha256": facts["base_sha256"]} | asdict(found))

    write_folder(out, write)
    return found


def _find_trial(adapter: Path) -> tuple[TrialFolder, RunFolder]:
    """The trial of an adapter folder; a run folder with one trial names it as well."""
    run = RunFolder(adapter)
    if run.study.is_file():
        trials = run.trials()
        if len(trials) != 1:
            named = ", ".join(str(trial.adapter) for trial in trials) or "none"
            raise InputError(f"{adapter} holds {len(trials)} adapters ({named}); name the one to merge")
        return trials[0], run
    trial, run = TrialFolder(adapter.absolute().parent), RunFolder(adapter.absolute().parent.parent.parent)
    if trial.adapter != adapter.absolute() or not trial.facts_in(adapter).is_file() or not run.test_rows.is_file():
        raise InputError(f"{adapter} is no adapter in a run folder; give RUN/trials/METHOD-sSEED/adapter, or RUN")
    return trial, run


def _load_whole(facts: dict[str, Any], task: Task, seed: int, progress: Progress) -> BaseModel:
    """The base in full precision, whatever it was tuned in."""
    source = locate_model(facts["base"], progress)
    sha256 = fingerprint_model(source)
    if sha256 != facts["base_sha256"]:
        raise SourceError(
            f"{facts['base']} has changed: its weights have SHA-256 {sha256[:12]}…, the adapter was trained on "
            f"{facts['base_sha256'][:12]}…; give it the base it was trained on"
        )
    return load_base(source, task.auto_class, task.head_settings(facts["label_names"]), seed)


def _load_adapter(base: BaseModel, adapter: Path) -> Any:
    peft_model = PeftModel.from_pretrained(base.model, str(adapter)).eval()
    if not hasattr(peft_model.base_model, "merge_and_unload"):  # prompt learning, LLaMA-Adapter
        kind = peft_model.active_peft_config.peft_type.value.lower()
        raise InputError(f"{adapter}: {kind} stands beside the base's weights and changes none, so it cannot be merged")
    return peft_model


def _score(
    scorer: Scorer, rows: list[Row], facts: dict[str, Any], progress: Progress
) -> tuple[torch.Tensor, dict[str, float]]:
    """Outputs of `rows`, and the task's own metric."""
    encoded = scorer.encode(rows)
    outputs, written = scorer.score(encoded, progress).outputs, None
    if scorer.task.writes_answers:
        written = write_answers(
            scorer.base.model, scorer.base.tokenizer, encoded.examples, Sampling(facts["max_new_tokens"]), progress
        )
    names = facts["label_names"]
    predictions = predict_outputs(scorer.task, rows, encoded, names, outputs, written)
    return outputs, {predictions.primary_metric: compute_metrics(predictions)[predictions.primary_metric]}
