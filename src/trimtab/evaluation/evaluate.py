"""A model ready to score rows, and the records that scored systems leave in the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import isnan
from typing import Any

import torch
from torch import Tensor

from trimtab.data import Row
from trimtab.engine.batches import Batch, Collator
from trimtab.engine.forward import Choice, HeadFeatures, choose_forward, usable_length
from trimtab.engine.scoring import Scores, score_rows
from trimtab.evaluation.baselines import LinearProbe, fit_linear_probe
from trimtab.evaluation.by_task import PREDICT, predict_preferences, predict_texts
from trimtab.evaluation.predictions import Predictions, compute_metrics
from trimtab.models import BaseModel
from trimtab.progress import Progress
from trimtab.runs import SystemFolder, read_json, write_json
from trimtab.tasks import Task
from trimtab.tasks.examples import EncodedRows
from trimtab.tasks.heads import final_linear
from trimtab.tasks.preference import Preference


@dataclass
class Scorer:
    """A base model with its chosen forward, at a task: encodes rows, makes batches, scores."""

    task: Task
    base: BaseModel
    choice: Choice
    max_length_tokens: int

    def encode(self, rows: Sequence[Row]) -> EncodedRows:
        return self.task.encode(rows, self.base.tokenizer, self.base.model, self.max_length_tokens)

    def collator(self, encoded: EncodedRows) -> Collator:
        forward = self.choice.forward
        pad = self.base.tokenizer.pad_token_id
        return Collator(encoded.examples, forward.packed, self.choice.position_offset, pad, encoded.together)

    def first_batch(self, encoded: EncodedRows, tokens: int = 256) -> Batch:
        """A batch of the first rows, as many as make up `tokens`."""
        collator = self.collator(encoded)
        rows = sum(end <= tokens for end in accumulate(collator.lengths))
        return collator.collate(range(max(1, rows))).to(self.base.device)

    def score(self, encoded: EncodedRows, progress: Progress | None = None, features: bool = False) -> Scores:
        collator = self.collator(encoded)
        compute = partial(self.task.outputs, self.choice.forward)
        if not features:
            return score_rows(compute, collator, self.base.device, progress=progress)
        with HeadFeatures(self.base.model) as caught:
            return score_rows(compute, collator, self.base.device, features=caught, progress=progress)


def make_scorer(
    task: Task, base: BaseModel, max_length_tokens: int, progress: Progress, reserved_tokens: int = 0
) -> Scorer:
    """Choose the forward by probing the loaded base; says which and why where it is not the packed one.

    Args:
        reserved_tokens: positions that the method's own tokens will take; texts are cut for every system alike.
    """
    usable = usable_length(base.model, max_length_tokens, reserved_tokens)
    if usable < max_length_tokens:
        progress.note(f"this model reads at most {usable} tokens, so texts are cut there")
        max_length_tokens = usable
    type_ids = "token_type_ids" in base.tokenizer.model_input_names
    choice = choose_forward(base.model, base.tokenizer.pad_token_id, max_length_tokens, type_ids)
    if choice.forward.packed:
        fused = ", in fused layers" if choice.forward.name == "fused" else ""
        progress.note(f"texts are packed without padding{fused} (packed and lone texts gave the same logits)")
    else:
        progress.note(f"texts are padded, in batches of like length: packing does not fit this model ({choice.reason})")
    return Scorer(task, base, choice, max_length_tokens)


def scoring_cost(scores: Scores, rows: int) -> dict[str, float]:
    return {
        "evaluate_seconds": scores.seconds,
        "evaluate_samples_per_second": rows / scores.seconds,
        "evaluate_steps_per_second": scores.steps / scores.seconds,
    }


def fit_probe(
    scorer: Scorer,
    train: EncodedRows,
    validation: EncodedRows,
    class_weight: str | None = None,
    progress: Progress | None = None,
) -> LinearProbe:
    """The linear probe on what enters the head's final linear now."""
    scores = scorer.score(train + validation, progress, features=True)
    assert scores.features is not None
    train_features, validation_features = torch.split(scores.features, [len(train.labels), len(validation.labels)])
    head = final_linear(scorer.base.model)
    return fit_linear_probe(
        scorer.task.name, train_features, train.labels, head.out_features, validation_features, validation.labels,
        has_bias=head.bias is not None, class_weight=class_weight,
    )  # fmt: skip


def predict_outputs(
    task: Task,
    rows: Sequence[Row],
    encoded: EncodedRows,
    label_names: Sequence[str],
    outputs: Tensor,
    written: Sequence[str] | None = None,
) -> Predictions:
    """Predictions of `rows` from the outputs [positions, columns] of a system at their positions.

    Args:
        written: what it wrote for each row, where the task is judged by that.
    """
    if written is not None:
        return predict_texts(rows, encoded, written, outputs)
    if isinstance(task, Preference):
        return predict_preferences(rows, encoded, outputs, task.beta)
    return PREDICT[task.name](rows, encoded, label_names, outputs)


_COSTS = (
    "trainable_parameters", "total_parameters", "trainable_percent", "adapter_bytes", "train_seconds",
    "train_tokens", "tokens_per_second", "evaluate_seconds", "evaluate_samples_per_second",
    "evaluate_steps_per_second", "peak_memory_bytes",
)  # fmt: skip


def record_system(
    folder: SystemFolder,
    predictions: Predictions,
    *,
    title: str,
    kind: str,
    method: str | None = None,
    seed: int | None = None,
    cost: dict[str, Any],
    in_training_precision: dict[str, Any] | None = None,
) -> None:
    """Write a system's predictions and its record; costs that do not apply are null.

    Args:
        in_training_precision: what it scores in the number format it was trained in, where that is not float32.
    """
    predictions.write(folder.predictions)
    record = {
        "name": folder.name,
        "title": title,
        "kind": kind,
        "method": method,
        "seed": seed,
        "metrics": {name: None if isnan(value) else value for name, value in compute_metrics(predictions).items()},
        "cost": dict.fromkeys(_COSTS) | cost,
    }
    if in_training_precision:
        record["in_training_precision"] = in_training_precision
    write_json(folder.metrics, record)


def read_record(folder: SystemFolder) -> dict[str, Any]:
    record: dict[str, Any] = read_json(folder.metrics)
    return {name: record[name] for name in ("name", "title", "kind", "method", "seed", "cost")}


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the accelerator where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
