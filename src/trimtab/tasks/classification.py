"""Classification: one label a text, cross-entropy, and probabilities.

How a stock classification model turns pooled states into logits is in `heads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.data import Row
from trimtab.tasks.examples import Batch, EncodedRows, Forward
from trimtab.tasks.sequences import encode_texts


@dataclass(frozen=True)
class Classification:
    """One label a text; the head reads one token of it. `class_weights` weigh each class's loss, None all alike."""

    class_weights: Tensor | None = None

    name = "classification"
    peft_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    has_probe = True
    softens_head = True
    writes_answers = False

    def head_settings(self, label_names: Sequence[str]) -> dict[str, Any]:
        return {**name_labels(label_names), "problem_type": "single_label_classification"}

    def encode(self, rows: Sequence[Row], tokenizer: Any, model: Any, max_length_tokens: int) -> EncodedRows:
        return encode_texts(rows, [row.label for row in rows], tokenizer, model, max_length_tokens)

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        return classification_loss(forward.logits(batch), batch.labels, self.class_weights)

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        """Logits [texts, classes]."""
        return forward.logits(batch)

    def summarise(self, outputs: Tensor, encoded: EncodedRows) -> dict[str, float]:
        """Figures to validate by; the highest `score` is best."""
        labels = encoded.label_tensor
        accuracy = float((outputs.argmax(-1) == labels).double().mean())
        return {"loss": float(classification_loss(outputs, labels)), "accuracy": accuracy, "score": accuracy}


def name_labels(label_names: Sequence[str]) -> dict[str, Any]:
    """What a stock config says of its labels."""
    return {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: number for number, name in enumerate(label_names)},
    }


def classification_loss(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of `logits` [rows, classes] against `labels` [rows], each row times its class's weight."""
    if class_weights is None:
        return F.cross_entropy(logits.float(), labels)
    # A mean over rows, not over weights: parts of a batch then add up to the whole.
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return (losses * class_weights.to(losses.device)[labels]).mean()


def balance_classes(labels: Sequence[int], classes: int) -> Tensor:
    """[classes] weights inverse to their shares, of mean 1 over the rows (King & Zeng 2001, section 4.2)."""
    counts = torch.bincount(torch.tensor(labels), minlength=classes).clamp_min(1)
    return len(labels) / (classes * counts.float())


def probabilities_of(logits: Tensor) -> Tensor:
    """Softmax in float64, so that stored probabilities keep the logits' precision."""
    return torch.softmax(logits.double(), dim=-1)
