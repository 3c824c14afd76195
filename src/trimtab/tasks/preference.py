"""Preference: of two answers to a prompt the chosen one, by direct preference optimisation (Rafailov et al. 2023).

The reference model is the base with the adapter off. Its log-probabilities never change, so they are
computed once, before the adapter is there, and stand in the examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.data import Row
from trimtab.errors import RowError
from trimtab.tasks.causal_lm import CausalLM
from trimtab.tasks.examples import Batch, EncodedRows, Forward

# Each row is two examples, the chosen answer before the rejected one.
_ANSWERS = 2


@dataclass(frozen=True)
class Preference(CausalLM):
    """DPO's sigmoid loss; `beta` holds the tuned model to the base (Rafailov et al. 2023, equation 7)."""

    beta: float = 0.1

    name = "preference"
    learns_last_turn_only = True

    def encode(self, rows: Sequence[Row], tokenizer: Any, model: Any, max_length_tokens: int) -> EncodedRows:
        """Prompts with their chosen and rejected answers; only the answers count.

        Raises:
            RowError: both answers give the same tokens, or one gives none.
        """
        answers = [part for row in rows for part in _both(row)]
        encoded = super().encode(answers, tokenizer, model, max_length_tokens)
        for place, row in enumerate(rows):
            chosen, rejected = encoded.examples[_ANSWERS * place : _ANSWERS * (place + 1)]
            if chosen.input_ids == rejected.input_ids:
                raise RowError(
                    row.id,
                    f"chosen and rejected are the same in their first {max_length_tokens} tokens; "
                    "raise --max-length-tokens, or remove the row",
                )
        numbers = [number // _ANSWERS for number in encoded.rows]
        return EncodedRows(encoded.examples, numbers, encoded.truncated, together=_ANSWERS)

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Mean over the batch's pairs."""
        losses = forward.head().learnt_losses(forward.states(batch), batch.labels)
        texts = torch.repeat_interleave(torch.tensor(batch.positions_by_text, device=losses.device))
        sums = losses.new_zeros(len(batch.rows)).index_add(0, texts, -losses)
        assert batch.references is not None
        # A batch is ordered by length: back to chosen and rejected side by side.
        order = torch.tensor(batch.rows, device=losses.device).argsort()
        return dpo_losses((sums - batch.references).index_select(0, order).view(-1, _ANSWERS), self.beta).mean()

    def summarise(self, outputs: Tensor, encoded: EncodedRows) -> dict[str, float]:
        """Figures of the validation rows; the highest `score` is best."""
        log_ratios = log_probabilities(outputs, encoded) - references_of(encoded)
        margins = log_ratios[:, 0] - log_ratios[:, 1]
        loss = float(dpo_losses(log_ratios, self.beta).mean())
        return {"loss": loss, "accuracy": float((margins > 0).double().mean()), "score": -loss}


def dpo_losses(log_ratios: Tensor, beta: float) -> Tensor:
    """[pairs] from log(tuned / base) of the chosen and the rejected answer, [pairs, 2]."""
    return -F.logsigmoid(beta * (log_ratios[:, 0] - log_ratios[:, 1]))


def log_probabilities(outputs: Tensor, encoded: EncodedRows) -> Tensor:
    """[rows, 2], float64: of the whole chosen and rejected answers, from the losses of their tokens."""
    counts = [len(example.labels) for example in encoded.examples]
    sums = torch.stack([-part.sum() for part in torch.split(outputs[:, 0].double(), counts)])
    return sums.view(-1, _ANSWERS)


def references_of(encoded: EncodedRows) -> Tensor:
    """[rows, 2], float64: what stands in the examples."""
    return torch.tensor([example.reference for example in encoded.examples], dtype=torch.float64).view(-1, _ANSWERS)


def refer_to(encoded: EncodedRows, base: Tensor) -> EncodedRows:
    """The same rows, with the log-probabilities [rows, 2] that the base gives their answers."""
    pairs = zip(encoded.examples, base.flatten().tolist(), strict=True)
    return replace(encoded, examples=[replace(example, reference=value) for example, value in pairs])


def _both(row: Row) -> tuple[Row, Row]:
    """The row as a language model would learn its chosen, and its rejected answer."""
    if row.messages is None:
        return replace(row, rejected=None), replace(row, completion=row.rejected, rejected=None)
    turns = row.messages
    answers = (row.completion, row.rejected)
    chosen, rejected = (
        replace(row, completion=None, rejected=None, messages=[*turns, {"role": "assistant", "content": answer or ""}])
        for answer in answers
    )
    return chosen, rejected
