"""From a model's outputs to predictions, by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from trimtab.data import Row
from trimtab.evaluation.class_predictions import predictions_for
from trimtab.evaluation.multilabel_predictions import MultilabelPredictions
from trimtab.evaluation.predictions import Predictions
from trimtab.evaluation.preference_predictions import PreferencePredictions
from trimtab.evaluation.tag_predictions import TagPredictions
from trimtab.evaluation.text_predictions import TextPredictions
from trimtab.evaluation.token_predictions import token_predictions_for
from trimtab.evaluation.value_predictions import ValuePredictions
from trimtab.tasks.classification import probabilities_of
from trimtab.tasks.examples import EncodedRows
from trimtab.tasks.multilabel import marginals_of
from trimtab.tasks.preference import dpo_losses, log_probabilities, references_of

# (rows, what of them was encoded, label names, outputs [positions, columns]), where these tell all.
Predict = Callable[[Sequence[Row], EncodedRows, Sequence[str], Tensor], Predictions]


def predict_classes(rows: Sequence[Row], encoded: EncodedRows, names: Sequence[str], outputs: Tensor) -> Predictions:
    return predictions_for(rows, names, probabilities_of(outputs).numpy())


def predict_several(rows: Sequence[Row], encoded: EncodedRows, names: Sequence[str], outputs: Tensor) -> Predictions:
    truth = np.array([[number in (row.labels or ()) for number in range(len(names))] for row in rows])
    return MultilabelPredictions([row.id for row in rows], list(names), truth, marginals_of(outputs).numpy())


def predict_values(rows: Sequence[Row], encoded: EncodedRows, names: Sequence[str], outputs: Tensor) -> Predictions:
    truth = np.array([row.value for row in rows], dtype=np.float64)
    return ValuePredictions([row.id for row in rows], truth, outputs[:, 0].double().numpy())


def predict_tags(rows: Sequence[Row], encoded: EncodedRows, names: Sequence[str], outputs: Tensor) -> Predictions:
    """Words that were cut off are left out, of every system alike."""
    labels = torch.from_numpy(encoded.labels)
    counts = [len(example.labels) for example in encoded.examples]
    losses = torch.nn.functional.cross_entropy(outputs.double(), labels, reduction="none")

    def by_row(numbers: Tensor) -> list[list[str]]:
        return [[names[number] for number in part.tolist()] for part in torch.split(numbers, counts)]

    sums = np.array([float(part.sum()) for part in torch.split(losses, counts)])
    return TagPredictions([row.id for row in rows], by_row(labels), by_row(outputs.argmax(-1)), sums)


def predict_tokens(rows: Sequence[Row], encoded: EncodedRows, names: Sequence[str], outputs: Tensor) -> Predictions:
    of_row = np.repeat(encoded.rows, [len(example.labels) for example in encoded.examples])
    losses, hits = outputs.double().numpy().T
    return token_predictions_for([row.id for row in rows], of_row, losses, hits)


def predict_texts(
    rows: Sequence[Row], encoded: EncodedRows, written: Sequence[str], outputs: Tensor | None = None
) -> Predictions:
    """What a system wrote, and the losses of the references where it has probabilities."""
    counts = np.array([len(example.labels) for example in encoded.examples], dtype=np.float64)
    losses = np.full(len(rows), np.nan)
    if outputs is not None:
        losses = np.bincount(np.repeat(encoded.rows, counts.astype(int)), outputs[:, 0].double().numpy(), len(rows))
    references = [row.completion or "" for row in rows]
    return TextPredictions([row.id for row in rows], references, list(written), losses, counts)


def predict_preferences(rows: Sequence[Row], encoded: EncodedRows, outputs: Tensor, beta: float) -> Predictions:
    """By rewards over the references; by log-probabilities alone where there are none, as for the base itself."""
    found = log_probabilities(outputs, encoded)
    is_base = encoded.examples[0].reference is None
    log_ratios = torch.zeros_like(found) if is_base else found - references_of(encoded)
    margins = found if is_base else log_ratios
    losses = dpo_losses(log_ratios, beta).numpy()
    ids = [row.id for row in rows]
    return PreferencePredictions(ids, (margins[:, 0] - margins[:, 1]).numpy(), losses, found.numpy())


PREDICT: dict[str, Predict] = {
    "classification": predict_classes,
    "multilabel": predict_several,
    "regression": predict_values,
    "token_classification": predict_tags,
    "causal_lm": predict_tokens,
}
