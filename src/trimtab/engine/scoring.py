"""A task's outputs for many rows, in the rows' order, without gradients."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

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
    outputs: list[Tensor] = []
    caught: list[Tensor] = []
    order: list[int] = []
    tokens = 0
    started = time.perf_counter()
    with torch.inference_mode():
        for rows in batches:
            batch = collator.collate(rows).to(device)
            outputs.append(compute(batch).float().cpu())
            if features is not None:
                caught.append(features.take(batch).float().cpu())
            order.extend(row for row in batch.rows for _ in collator.examples[row].positions)
            tokens += batch.tokens
            seconds = time.perf_counter() - started
            listener.advance(tokens, total, "tokens", tokens_per_second=tokens / seconds)
    seconds = time.perf_counter() - started
    place = torch.tensor(order).argsort(stable=True)
    return Scores(
        torch.cat(outputs).index_select(0, place),
        torch.cat(caught).index_select(0, place) if caught else None,
        seconds,
        tokens,
        len(batches),
    )
