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
    MinPLogitsWarper,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from trimtab.errors import InputError

# The likeliest token each time, whatever the model's own generation settings ask for (BART's ask for length).
_LIKELIEST = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "min_length": 0}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, by transformers' own names: the likeliest each time where nothing says otherwise.

    Args:
        temperature, top_p, top_k, min_p, typical_p: any of them asks for sampling.
        do_sample: True samples from all tokens where none of these is given; False refuses them.
        no_repeat_ngram_size: no run of so many tokens is written twice, the prompt's included; 0 allows all.
        stop_strings: a text ends with the first token that completes one of these, and keeps it.

    Raises:
        InputError: sampling is asked for and forbidden.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float | None = None
    typical_p: float | None = None
    no_repeat_ngram_size: int = 0
    stop_strings: str | Sequence[str] = ()
    do_sample: bool | None = None

    def __post_init__(self) -> None:
        if self.do_sample is False and self._warpers_asked:
            raise InputError(
                f"do_sample is off, and {', '.join(self._warpers_asked)} asks for sampling; leave out one of the two"
            )

    @property
    def _warpers_asked(self) -> list[str]:
        names = ("temperature", "top_p", "top_k", "min_p", "typical_p")
        return [name for name in names if getattr(self, name) is not None]

    def settings(self, prompts: Sequence[Sequence[int]], tokenizer: Any = None) -> dict[str, Any]:
        """For `generate`, which then writes after these prompts (token ids), a row of its batch for each.

        A prompt's draws follow from it and the seed, so it is answered alone as in any batch.

        Args:
            tokenizer: by which strings to stop at are found.
        """
        chosen: dict[str, Any] = _LIKELIEST | {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
        }
        if self.stop_strings:
            chosen["stopping_criteria"] = StoppingCriteriaList([self._stop(tokenizer)])
        if self.do_sample or self._warpers_asked:
            chosen["logits_processor"] = LogitsProcessorList([*self._warpers(), _GumbelNoise(prompts, self.seed)])
        return chosen

    def _stop(self, tokenizer: Any) -> StopStringCriteria:
        strings = [self.stop_strings] if isinstance(self.stop_strings, str) else list(self.stop_strings)
        try:
            found = StopStringCriteria(tokenizer, strings)
        except ValueError as error:  # it reads each token's text behind a word that whole-word vocabularies lack
            raise InputError("stop_strings: transformers cannot tell this tokenizer's tokens as text; leave them out "
                             "and cut the texts yourself") from error  # fmt: skip
        # Where a criterion has an end token, `generate` pads the rows of a batch that ended before others.
        found.eos_token_id = tokenizer.eos_token_id
        return found

    def _warpers(self) -> list[LogitsProcessor]:
        """In the order in which transformers applies them."""
        warpers: list[LogitsProcessor] = []
        if self.temperature not in (None, 1.0):
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            warpers.append(MinPLogitsWarper(self.min_p))
        if self.typical_p is not None and self.typical_p < 1.0:
            warpers.append(TypicalLogitsWarper(self.typical_p))
        return warpers


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
