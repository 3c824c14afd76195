"""How the next token is chosen, so that a text does not depend on the batch that it is written in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

# The likeliest token each time, whatever the model's own generation settings ask for (BART's ask for length).
_LIKELIEST = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "min_length": 0,
              "no_repeat_ngram_size": 0}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, by transformers' own names: the likeliest each time where nothing says otherwise."""

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def settings(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """For `generate`, which then writes after these prompts (token ids), a row of its batch for each.

        A prompt's draws follow from it and the seed, so it is answered alone as in any batch.
        """
        kept = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.temperature is None and self.top_p is None and self.top_k is None:
            return _LIKELIEST | kept
        processors: list[LogitsProcessor] = []
        if self.temperature not in (None, 1.0):
            processors.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            processors.append(TopPLogitsWarper(self.top_p))
        processors.append(_GumbelNoise(prompts, self.seed))
        return _LIKELIEST | kept | {"logits_processor": LogitsProcessorList(processors)}


class _GumbelNoise(LogitsProcessor):  # type: ignore[misc]
    """Noise with which the largest logit is a draw from their softmax (Gumbel 1954; Maddison et al. 2014, sec. 2)."""

    def __init__(self, prompts: Sequence[Sequence[int]], seed: int) -> None:
        self.generators = [torch.Generator().manual_seed(_seed_of(prompt, seed)) for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [prompts, vocabulary], of which those that were ruled out are -inf."""
        draws = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=each) for each in self.generators])
        return scores - draws.log().to(scores)


def _seed_of(prompt: Sequence[int], seed: int) -> int:
    return int.from_bytes(hashlib.sha256(repr((seed, list(prompt))).encode()).digest()[:8]) >> 1
