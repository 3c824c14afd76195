"""Which rows go into which batch, and their tensors: packed by token budget, or padded.

Every row stands in exactly one batch of an epoch, whatever its length. The plan of an epoch
depends on the seed and the epoch's number alone, so a resumed run meets the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trimtab.engine.attention import Run, runs_of
from trimtab.tasks.examples import Example

# Texts of like length are sought among the rows of this many batches.
_POOL_BATCHES = 40
# Packed texts of one length that stay together: each such group is one call of attention.
_GROUP_TEXTS = 4


@dataclass(frozen=True)
class Batch:
    """Tensors of one step.

    Packed: `input_ids` is [1, tokens], and `runs` give the texts in it. Padded: `input_ids` is
    [texts, longest], `runs` is None and `attention_mask` is set. `pooled` holds the positions in
    `input_ids.flatten()` that the head reads, or in `decoder_input_ids.flatten()` where a decoder
    answers an encoder; `labels` what it shall say there; `rows` the places of the texts in the encoded data.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    token_type_ids: Tensor | None
    attention_mask: Tensor | None
    runs: list[Run] | None
    pooled: Tensor
    labels: Tensor
    rows: list[int]
    tokens: int
    positions_by_text: list[int]
    terms: int  # that the loss is a mean of
    decoder_input_ids: Tensor | None = None
    references: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        moved = {name: value.to(device, non_blocking=True) for name, value in vars(self).items()
                 if isinstance(value, Tensor)}  # fmt: skip
        return Batch(**(vars(self) | moved))


def plan_batches(
    lengths: Sequence[int], tokens_per_batch: int, *, shuffle_seed: int | None, padded: bool = False
) -> list[list[int]]:
    """Rows by batch, each batch within the token budget (a longer text is a batch of its own).

    Args:
        lengths: tokens of every row.
        shuffle_seed: order of the rows; None sorts by length, for scoring.
        padded: count each row as long as the longest of its batch, and keep like lengths together.
    """
    order = _order(lengths, tokens_per_batch, shuffle_seed, padded)
    batches: list[list[int]] = []
    longest = used = 0
    for row in order:
        length = lengths[row]
        cost = max(longest, length) * (len(batches[-1]) + 1) if padded and batches else used + length
        if not batches or cost > tokens_per_batch:
            batches.append([])
            longest = used = 0
        batches[-1].append(row)
        longest, used = max(longest, length), used + length
    if padded and shuffle_seed is not None:
        shuffled = torch.randperm(len(batches), generator=_generator(shuffle_seed)).tolist()
        batches = [batches[i] for i in shuffled]
    return batches


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _order(lengths: Sequence[int], tokens_per_batch: int, shuffle_seed: int | None, padded: bool) -> list[int]:
    if shuffle_seed is None:
        return sorted(range(len(lengths)), key=lambda row: lengths[row])
    generator = _generator(shuffle_seed)
    order: list[int] = torch.randperm(len(lengths), generator=generator).tolist()
    pool = max(1, int(_POOL_BATCHES * tokens_per_batch * len(lengths) / max(1, sum(lengths))))
    pools = [order[start : start + pool] for start in range(0, len(order), pool)]
    if padded:
        return [row for rows in pools for row in sorted(rows, key=lambda row: lengths[row])]
    return [row for rows in pools for row in _in_groups(rows, lengths, generator)]


def _in_groups(rows: list[int], lengths: Sequence[int], generator: torch.Generator) -> list[int]:
    """Shuffled rows, where those of one length come in groups of `_GROUP_TEXTS`; the groups' order is random."""
    waiting: dict[int, list[int]] = {}
    groups: list[list[int]] = []
    for row in rows:
        group = waiting.setdefault(lengths[row], [])
        group.append(row)
        if len(group) == _GROUP_TEXTS:
            groups.append(waiting.pop(lengths[row]))
    groups.extend(waiting.values())
    return [row for i in torch.randperm(len(groups), generator=generator).tolist() for row in groups[i]]


@dataclass(frozen=True)
class Collator:
    """Turns rows into tensors, the way the model's forward wants them.

    A row is one example, or as many neighbours as stay `together`.
    """

    examples: Sequence[Example]
    packed: bool
    position_offset: int
    pad_token_id: int
    together: int = 1

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every row."""
        starts = range(0, len(self.examples), self.together)
        return [sum(map(len, self.examples[start : start + self.together])) for start in starts]

    def plan(self, tokens_per_batch: int, shuffle_seed: int | None) -> list[list[int]]:
        return plan_batches(self.lengths, tokens_per_batch, shuffle_seed=shuffle_seed, padded=not self.packed)

    def collate(self, rows: Sequence[int]) -> Batch:
        # Equal lengths side by side, so that attention can take each run as a view.
        texts = (row * self.together + part for row in rows for part in range(self.together))
        ordered = sorted(texts, key=lambda row: len(self.examples[row]))
        examples = [self.examples[row] for row in ordered]
        return (self._pack if self.packed else self._pad)(ordered, examples)

    def _pack(self, rows: list[int], examples: list[Example]) -> Batch:
        lengths = list(map(len, examples))
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        return Batch(
            input_ids=_row([token for example in examples for token in example.input_ids]),
            position_ids=_row([self.position_offset + i for length in lengths for i in range(length)]),
            token_type_ids=self._types([token for example in examples for token in example.token_type_ids or ()]),
            attention_mask=None,
            runs=runs_of(lengths),
            pooled=_places(examples, starts),
            tokens=starts[-1],
            **self._known(rows, examples),
        )

    def _pad(self, rows: list[int], examples: list[Example]) -> Batch:
        ids = pad_right([example.input_ids for example in examples], self.pad_token_id)
        types = decoder_ids = None
        if examples[0].token_type_ids is not None:
            types = pad_right([example.token_type_ids or [] for example in examples], 0)
        if examples[0].decoder_input_ids is not None:
            decoder_ids = pad_right([example.decoder_input_ids or [] for example in examples], self.pad_token_id)
        width = (ids if decoder_ids is None else decoder_ids).shape[1]
        return Batch(
            input_ids=ids,
            position_ids=None,
            token_type_ids=types,
            attention_mask=pad_right([[1] * len(example.input_ids) for example in examples], 0),
            runs=None,
            pooled=_places(examples, [i * width for i in range(len(examples))]),
            tokens=sum(map(len, examples)),
            decoder_input_ids=decoder_ids,
            **self._known(rows, examples),
        )

    def _known(self, rows: list[int], examples: list[Example]) -> dict[str, Any]:
        """What a batch says of its texts, packed or padded."""
        references = [example.reference for example in examples if example.reference is not None]
        positions = [len(example.labels) for example in examples]
        return {
            "labels": torch.tensor([label for example in examples for label in example.labels]),
            "rows": rows,
            "positions_by_text": positions,
            "terms": sum(positions) if self.together == 1 else len(rows) // self.together,
            "references": torch.tensor(references) if references else None,
        }

    def _types(self, values: list[int]) -> Tensor | None:
        return _row(values) if values else None


def pad_right(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """[rows, longest]."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def _places(examples: Sequence[Example], starts: Sequence[int]) -> Tensor:
    return torch.tensor([start + position for start, example in zip(starts, examples, strict=False)
                         for position in example.positions])  # fmt: skip


def _row(values: list[int]) -> Tensor:
    return torch.tensor(values).unsqueeze(0)


class TrainingPlan:
    """Every batch of a whole training, by step number.

    `num_train_epochs` may be a fraction: the last epoch is then cut short.
    """

    def __init__(
        self, collator: Collator, tokens_per_batch: int, seed: int, num_train_epochs: float, parts: int = 1
    ) -> None:
        self.collator = collator
        self.parts_per_step = parts
        epochs = [
            collator.plan(tokens_per_batch, seed * 1_000_003 + epoch) for epoch in range(math.ceil(num_train_epochs))
        ]
        partial = num_train_epochs - math.floor(num_train_epochs)
        self.steps_per_epoch = len(epochs[0])
        if partial:
            epochs[-1] = epochs[-1][: max(1, round(partial * len(epochs[-1])))]
        self.steps = [rows for epoch in epochs for rows in epoch]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> Batch:
        """The whole batch of a step."""
        return self.collator.collate(self.steps[step])

    def parts(self, step: int) -> list[Batch]:
        """The batch of a step in parts of like length, computed one after another for one update."""
        rows = self.steps[step]
        count = min(self.parts_per_step, len(rows))
        if count == 1:
            return [self[step]]
        groups: list[list[int]] = [[] for _ in range(count)]
        sizes = [0] * count
        for row in sorted(rows, key=lambda row: -self.collator.lengths[row]):
            smallest = sizes.index(min(sizes))
            groups[smallest].append(row)
            sizes[smallest] += self.collator.lengths[row]
        return [self.collator.collate(group) for group in groups]

    @property
    def largest_tokens(self) -> int:
        """Tokens of the largest batch that is computed at once, about."""
        lengths = self.collator.lengths
        return max(max(sum(lengths[row] for row in rows) // self.parts_per_step, max(lengths[row] for row in rows))
                   for rows in self.steps)  # fmt: skip
