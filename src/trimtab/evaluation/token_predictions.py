"""What a language model said about every test row: losses of its tokens, and the metrics of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import DataError
from trimtab.evaluation.predictions import Floats, Ints
from trimtab.runs import write_jsonl


@dataclass(frozen=True)
class TokenPredictions:
    """Of each row's tokens that were to be predicted: their loss in nats, summed, how many, and how many right."""

    ids: list[str]
    losses: Floats
    tokens: Ints
    hits: Ints

    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "loss", "token_accuracy")
    primary_metric: ClassVar[str] = "perplexity"

    def select(self, keep: NDArray[np.bool_]) -> TokenPredictions:
        ids = [name for name, kept in zip(self.ids, keep, strict=True) if kept]
        return TokenPredictions(ids, self.losses[keep], self.tokens[keep], self.hits[keep])

    def agrees_with(self, other: TokenPredictions) -> bool:
        """Losses of different tokenizers cannot be compared token by token."""
        return np.array_equal(self.tokens, other.tokens)

    def row_statistics(self) -> Floats:
        """[rows, 3]: loss, tokens, hits."""
        return np.column_stack([self.losses, self.tokens, self.hits]).astype(np.float64)

    def metrics_from_sums(self, sums: Floats) -> dict[str, Floats]:
        """Means over tokens, not over rows; perplexity is e to the mean loss."""
        loss = sums[:, 0] / sums[:, 1]
        return {"perplexity": np.exp(loss), "loss": loss, "token_accuracy": sums[:, 2] / sums[:, 1]}

    def write(self, path: Path) -> None:
        """`loss` of a line is the mean over the row's tokens."""
        rows = zip(self.ids, self.losses, self.tokens, self.hits, strict=True)
        write_jsonl(
            path,
            (
                {"id": row_id, "loss": float(loss / tokens), "tokens": int(tokens), "correct_tokens": int(hits)}
                for row_id, loss, tokens, hits in rows
            ),
        )


def token_predictions_for(ids: Sequence[str], rows: Ints, losses: Floats, hits: Floats) -> TokenPredictions:
    """Sums over the tokens of each row.

    Args:
        rows: [tokens], the row of each; every row has at least one.
        losses, hits: [tokens].
    """
    count = len(ids)
    return TokenPredictions(
        list(ids),
        np.bincount(rows, losses, count).astype(np.float64),
        np.bincount(rows, minlength=count).astype(np.int64),
        np.bincount(rows, hits, count).astype(np.int64),
    )


def parse_token_predictions(lines: Sequence[dict[str, Any]], path: Path) -> TokenPredictions:
    """The lines of a `predictions.jsonl`.

    Raises:
        DataError: a line without the keys (with its number).
    """
    found = []
    for number, line in enumerate(lines, 1):
        try:
            tokens = int(line["tokens"])
            found.append((str(line["id"]), float(line["loss"]) * tokens, tokens, int(line["correct_tokens"])))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: needs id, loss, tokens and correct_tokens ({error!r})") from None
    ids, losses, tokens_of, hits = zip(*found, strict=True)
    return TokenPredictions(list(ids), np.array(losses), np.array(tokens_of), np.array(hits))
