"""Which of two answers a system prefers in every test row, and the metrics of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import DataError
from trimtab.evaluation.predictions import Floats
from trimtab.runs import write_jsonl

_NAN = float("nan")


@dataclass(frozen=True)
class PreferencePredictions:
    """`margins` [rows]: how much more a system gives the chosen answer than the rejected one.

    A tuned model's margin is of its rewards, log(tuned / base) of an answer; the base's, whose rewards are nothing,
    of the log-probabilities themselves. Systems without probabilities have NaN for `losses` and `log_probabilities`
    [rows, 2].
    """

    ids: list[str]
    margins: Floats
    losses: Floats
    log_probabilities: Floats

    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "margin", "loss")
    primary_metric: ClassVar[str] = "accuracy"

    @property
    def correct(self) -> NDArray[np.bool_]:
        return self.margins > 0

    def select(self, keep: NDArray[np.bool_]) -> PreferencePredictions:
        ids = [name for name, kept in zip(self.ids, keep, strict=True) if kept]
        return PreferencePredictions(ids, self.margins[keep], self.losses[keep], self.log_probabilities[keep])

    def agrees_with(self, other: PreferencePredictions) -> bool:
        return True

    def row_statistics(self) -> Floats:
        """[rows, 4]: one, preferred, margin, loss."""
        return np.column_stack([np.ones(len(self.ids)), self.correct, self.margins, self.losses]).astype(np.float64)

    def metrics_from_sums(self, sums: Floats) -> dict[str, Floats]:
        rows, preferred, margins, losses = sums.T
        return {"accuracy": preferred / rows, "margin": margins / rows, "loss": losses / rows}

    def write(self, path: Path) -> None:
        rows = zip(self.ids, self.margins, self.losses, self.log_probabilities, strict=True)
        write_jsonl(
            path,
            (
                {"id": row_id, "label": "chosen", "prediction": "chosen" if margin > 0 else "rejected",
                 "margin": float(margin), "loss": None if np.isnan(loss) else float(loss),
                 "log_probabilities": None if np.isnan(both).any() else both.tolist()}
                for row_id, margin, loss, both in rows
            ),
        )  # fmt: skip


def parse_preference_predictions(lines: Sequence[dict[str, Any]], path: Path) -> PreferencePredictions:
    """The lines of a `predictions.jsonl`.

    Raises:
        DataError: a line without the keys (with its number).
    """
    ids, margins, losses, both = [], [], [], []
    for number, line in enumerate(lines, 1):
        try:
            ids.append(str(line["id"]))
            margins.append(float(line["margin"]))
            losses.append(_NAN if line["loss"] is None else float(line["loss"]))
            chosen, rejected = line["log_probabilities"] or (_NAN, _NAN)
            both.append([float(chosen), float(rejected)])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: needs id, margin, loss and log_probabilities ({error!r})") from None
    return PreferencePredictions(ids, np.array(margins), np.array(losses), np.array(both))
