"""Regression: a number a text, squared error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from trimtab.data import Row
from trimtab.tasks.examples import Batch, EncodedRows, Forward
from trimtab.tasks.sequences import encode_texts


class Regression:
    """The head gives the number itself, in the data's own units."""

    name = "regression"
    peft_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    has_probe = True
    softens_head = False
    writes_answers = False

    def head_settings(self, label_names: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def encode(self, rows: Sequence[Row], tokenizer: Any, model: Any, max_length_tokens: int) -> EncodedRows:
        return encode_texts(rows, [row.value for row in rows], tokenizer, model, max_length_tokens)

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        return F.mse_loss(forward.logits(batch).squeeze(-1).float(), batch.labels)

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        """The numbers [texts, 1]."""
        return forward.logits(batch)

    def summarise(self, outputs: Tensor, encoded: EncodedRows) -> dict[str, float]:
        """Figures to validate by; the highest `score` is best."""
        labels = encoded.label_tensor
        loss = float(F.mse_loss(outputs.squeeze(-1).double(), labels.double()))
        return {"loss": loss, "rmse": loss**0.5, "score": -loss}
