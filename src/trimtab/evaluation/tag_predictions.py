"""Which tags a system gave the words of every test row; entities are counted as seqeval does (CoNLL-2000's rules)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import DataError
from trimtab.evaluation.predictions import Floats
from trimtab.runs import write_jsonl

_SMALLEST = 1e-12


@dataclass(frozen=True)
class TagPredictions:
    """`truth` and `predicted` hold a list of tags for each row, `losses` [rows] the sum over its words, in nats."""

    metrics: ClassVar[tuple[str, ...]] = ("f1", "precision", "recall", "accuracy", "loss")

    ids: list[str]
    truth: list[list[str]]
    predicted: list[list[str]]
    losses: Floats

    @cached_property
    def has_entities(self) -> bool:
        """Whether tags mark entities (B-, I-) rather than words."""
        return any(tag.startswith(("B-", "I-")) for tags in self.truth for tag in tags)

    @property
    def primary_metric(self) -> str:
        return "f1" if self.has_entities else "accuracy"

    def select(self, keep: NDArray[np.bool_]) -> TagPredictions:
        kept = np.flatnonzero(keep)
        return TagPredictions(
            [self.ids[i] for i in kept], [self.truth[i] for i in kept], [self.predicted[i] for i in kept],
            self.losses[keep],
        )  # fmt: skip

    def agrees_with(self, other: TagPredictions) -> bool:
        return self.truth == other.truth

    def row_statistics(self) -> Floats:
        """[rows, 6]: entities hit, given and true; words hit, words, loss."""
        return np.array(
            [
                [*_count_entities(true, said), sum(a == b for a, b in zip(true, said, strict=True)), len(true), loss]
                for true, said, loss in zip(self.truth, self.predicted, self.losses, strict=True)
            ]
        )

    def metrics_from_sums(self, sums: Floats) -> dict[str, Floats]:
        """F1, precision and recall over whole entities; accuracy and loss over words."""
        hits, given, true, right, words, loss = sums.T
        return {
            "f1": 2 * hits / np.maximum(given + true, _SMALLEST),
            "precision": hits / np.maximum(given, _SMALLEST),
            "recall": hits / np.maximum(true, _SMALLEST),
            "accuracy": right / words,
            "loss": loss / words,
        }

    def write(self, path: Path) -> None:
        """`loss` of a line is the mean over the row's words."""
        rows = zip(self.ids, self.truth, self.predicted, self.losses, strict=True)
        write_jsonl(
            path,
            (
                {"id": row_id, "label": true, "prediction": said, "loss": float(loss) / len(true)}
                for row_id, true, said, loss in rows
            ),
        )


def _count_entities(true: list[str], said: list[str]) -> tuple[int, int, int]:
    """Entities of one row that both have, that were given, and that there are."""
    from seqeval.metrics.sequence_labeling import get_entities

    ours, theirs = set(get_entities(said)), set(get_entities(true))
    return len(ours & theirs), len(ours), len(theirs)


def parse_tag_predictions(lines: Sequence[dict[str, Any]], path: Path) -> TagPredictions:
    """The lines of a `predictions.jsonl`.

    Raises:
        DataError: a line without the keys, or with lists of different lengths (with its number).
    """
    found = []
    for number, line in enumerate(lines, 1):
        try:
            true, said = list(map(str, line["label"])), list(map(str, line["prediction"]))
            found.append((str(line["id"]), true, said, float(line["loss"]) * len(true)))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}:{number}: needs id, label [tags], prediction [tags] and loss ({error!r})"
            ) from None
        if len(true) != len(said):
            raise DataError(f"{path}:{number}: {len(true)} tags in label and {len(said)} in prediction")
    ids, truth, predicted, losses = zip(*found, strict=True)
    return TagPredictions(list(ids), list(truth), list(predicted), np.array(losses))
