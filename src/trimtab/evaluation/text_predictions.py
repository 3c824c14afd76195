"""The texts that one system wrote for every test row, and the metrics that hold them against the references."""

from __future__ import annotations

import re
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

_ROUGES = ("rouge1", "rouge2", "rougeL")
_BLEU_ORDERS = 4


@dataclass(frozen=True)
class TextPredictions:
    """References and what was written for them; `losses` are sums over the `tokens` of each reference, in nats.

    A system that gives texts without probabilities has NaN for its losses.
    """

    ids: list[str]
    references: list[str]
    written: list[str]
    losses: Floats
    tokens: Floats

    metrics: ClassVar[tuple[str, ...]] = ("exact_match", *_ROUGES, "bleu", "loss")
    # Of the metrics of texts the one that fits single words as well as whole summaries.
    primary_metric: ClassVar[str] = "rougeL"

    def select(self, keep: NDArray[np.bool_]) -> TextPredictions:
        def kept(values: Sequence[str]) -> list[str]:
            return [value for value, is_kept in zip(values, keep, strict=True) if is_kept]

        return TextPredictions(
            kept(self.ids), kept(self.references), kept(self.written), self.losses[keep], self.tokens[keep]
        )

    def agrees_with(self, other: TextPredictions) -> bool:
        return self.references == other.references

    @cached_property
    def _statistics(self) -> Floats:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU

        rouge, bleu = RougeScorer(list(_ROUGES), tokenizer=_Words()), BLEU(effective_order=True)
        rows = []
        for reference, written in zip(self.references, self.written, strict=True):
            ngrams = bleu.sentence_score(written, [reference])
            overlaps = rouge.score(reference, written)
            rows.append([
                1.0, float(written.strip() == reference.strip()), *(overlaps[name].fmeasure for name in _ROUGES),
                *ngrams.counts, *ngrams.totals, ngrams.sys_len, ngrams.ref_len,
            ])  # fmt: skip
        return np.array(rows, dtype=np.float64)

    def row_statistics(self) -> Floats:
        """[rows, 17]: one, exact, ROUGE; n-grams right and given, lengths of text and reference; loss, tokens."""
        return np.column_stack([self._statistics, self.losses, self.tokens])

    def metrics_from_sums(self, sums: Floats) -> dict[str, Floats]:
        """ROUGE's F-measures are means over rows (Lin 2004); BLEU is one of the whole corpus, 0 to 100 (Post 2018)."""
        rows, exact = sums[:, 0], sums[:, 1]
        found = {"exact_match": exact / rows}
        found |= {name: sums[:, 2 + place] / rows for place, name in enumerate(_ROUGES)}
        ngrams = sums[:, 2 + len(_ROUGES) : -2]
        return found | {"bleu": np.array([_corpus_bleu(row) for row in ngrams]), "loss": sums[:, -2] / sums[:, -1]}

    def write(self, path: Path) -> None:
        """`loss` of a line is the mean over the reference's tokens; null where the system has no probabilities."""
        rows = zip(self.ids, self.references, self.written, self.losses, self.tokens, strict=True)
        write_jsonl(
            path,
            (
                {"id": row_id, "label": reference, "prediction": written,
                 "loss": None if np.isnan(loss) else loss / tokens, "tokens": int(tokens)}
                for row_id, reference, written, loss, tokens in rows
            ),
        )  # fmt: skip


class _Words:
    """ROUGE's words: runs of letters and digits in lower case, of any script (its own tokenizer keeps ASCII only)."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def _corpus_bleu(sums: Floats) -> float:
    from sacrebleu.metrics import BLEU

    right, given = sums[:_BLEU_ORDERS], sums[_BLEU_ORDERS : 2 * _BLEU_ORDERS]
    length, reference_length = sums[2 * _BLEU_ORDERS :]
    sizes = {"sys_len": int(length), "ref_len": int(reference_length)}
    score = BLEU.compute_bleu(list(right), list(given), **sizes, smooth_method="exp")
    return float(score.score)


def parse_text_predictions(lines: Sequence[dict[str, Any]], path: Path) -> TextPredictions:
    """The lines of a `predictions.jsonl`.

    Raises:
        DataError: a line without the keys (with its number).
    """
    texts: dict[str, list[str]] = {"id": [], "label": [], "prediction": []}
    losses, counts = [], []
    for number, line in enumerate(lines, 1):
        try:
            tokens = int(line["tokens"])
            losses.append(float("nan") if line["loss"] is None else float(line["loss"]) * tokens)
            counts.append(tokens)
            for key, found in texts.items():
                found.append(str(line[key]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: needs id, label, prediction, loss and tokens ({error!r})") from None
    written = texts["prediction"]
    return TextPredictions(texts["id"], texts["label"], written, np.array(losses), np.array(counts, dtype=np.float64))
