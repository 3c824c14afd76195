"""Multilabel classification: any number of labels a text, a yes or no for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.data import Row
from trimtab.tasks.classification import name_labels
from trimtab.tasks.examples import Batch, EncodedRows, Forward
from trimtab.tasks.sequences import encode_texts


class Multilabel:
    """Binary cross-entropy, averaged over texts and labels; a label is given where its probability is above a half."""

    name = "multilabel"
    peft_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    has_probe = True
    softens_head = True
    writes_answers = False

    def head_settings(self, label_names: Sequence[str]) -> dict[str, Any]:
        return {**name_labels(label_names), "problem_type": "multi_label_classification"}

    def encode(self, rows: Sequence[Row], tokenizer: Any, model: Any, max_length_tokens: int) -> EncodedRows:
        classes = model.config.num_labels
        marks = [[float(number in (row.labels or ())) for number in range(classes)] for row in rows]
        return encode_texts(rows, marks, tokenizer, model, max_length_tokens)

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        return F.binary_cross_entropy_with_logits(forward.logits(batch).float(), batch.labels)

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        """Logits [texts, labels]."""
        return forward.logits(batch)

    def summarise(self, outputs: Tensor, encoded: EncodedRows) -> dict[str, float]:
        """Figures to validate by; the highest `score` is best."""
        labels = encoded.label_tensor
        said, true = outputs > 0, labels > 0.5
        hits = float((said & true).sum())
        f1 = 2 * hits / max(1.0, float(said.sum() + true.sum()))
        return {"loss": float(F.binary_cross_entropy_with_logits(outputs, labels)), "f1": f1, "score": f1}


def marginals_of(logits: Tensor) -> Tensor:
    """Each label's probability by itself, in float64."""
    return torch.sigmoid(logits.double())
