"""A task's outputs for many rows, in the rows' order, without gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from trimtab.engine.batches import Batch, Collator
from trimtab.engine.forward import HeadFeatures
from trimtab.engine.memory import keep_freed_memory
from trimtab.progress import Progress, Silent

# Scoring needs no room for gradients: larger batches, sorted by length.
SCORING_TOKENS_PER_BATCH = 1024


@dataclass(frozen=True)
class Scores:
    """`outputs` [positions, columns] and, where asked for, `features` [positions, features], float32 on CPU.

    Positions are those of the examples, in their order.
    """

    outputs: Tensor
    features: Tensor | None
    seconds: float
    tokens: int
    steps: int


def score_rows(
    compute: Callable[[Batch], Tensor],
    collator: Collator,
    device: torch.device,
    *,
    features: HeadFeatures | None = None,
    tokens_per_batch: int = SCORING_TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> Scores:
    """Run `compute`, which gives [positions, columns], over every example of `collator`."""
    listener = progress or Silent()
    keep_freed_memory()
    batches = collator.plan(tokens_per_batch, None)
    total = sum(map(len, collator.examples))
    ends = list(accumulate(len(example.positions) for example in collator.examples))
    outputs, caught = _Gathered(ends), _Gathered(ends)
    tokens = 0
    started = time.perf_counter()
    with torch.inference_mode():
        for rows in batches:
            batch = collator.collate(rows).to(device)
            outputs.put(batch.rows, compute(batch))
            if features is not None:
                caught.put(batch.rows, features.take(batch))
            tokens += batch.tokens
            seconds = time.perf_counter() - started
            listener.advance(tokens, total, "tokens", tokens_per_second=tokens / seconds)
    seconds = time.perf_counter() - started
    assert outputs.values is not None
    return Scores(outputs.values, caught.values, seconds, tokens, len(batches))


class _Gathered:
    """Values [positions, columns] of all examples, put in their places as they come.

    Held in one piece from the first on: small pieces would lie between what batches compute in, and break up the heap.
    """

    def __init__(self, ends: Sequence[int]) -> None:
        self.ends = ends  # of each example's positions
        self.values: Tensor | None = None

    def put(self, rows: Sequence[int], found: Tensor) -> None:
        """What was found for the positions of these examples, one after the other."""
        if self.values is None:
            with torch.inference_mode(False):
                self.values = torch.empty(self.ends[-1], *found.shape[1:])
        places = [place for row in rows for place in range(self.ends[row - 1] if row else 0, self.ends[row])]
        self.values[torch.tensor(places, dtype=torch.long)] = found.float().cpu()
