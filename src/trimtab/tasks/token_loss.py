"""Cross-entropy over a vocabulary without ever holding all logits.

The states are taken in chunks; each chunk's logits become its losses and, where the head is frozen,
at once the states' gradient, so that nothing of the vocabulary's width is kept. The plain twin is
`cross_entropy(head(states), labels)`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Logits that are held at once: 50 MB, whatever the vocabulary; products of fewer rows take longer a row.
_CHUNK_LOGITS = 256 * 49_152
_MOST_POSITIONS, _FEWEST_POSITIONS = 256, 32
# Probabilities below this have lost digits in float32.
_SMALLEST = 1e-30


class LanguageHead(Protocol):
    """What tasks ask of a language model's head: the losses, in nats, of `labels` given `states`."""

    def learnt_losses(self, states: Tensor, labels: Tensor) -> Tensor:
        """[positions], with a graph where the states have one."""
        ...

    def losses(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and whether the likeliest token is the true one; both [positions], without gradients."""
        ...


class Readout(NamedTuple):
    """logits = cap(scale x (states weight^T + bias)), cap(x) = softcap tanh(x / softcap) where there is one."""

    weight: Tensor  # [vocabulary, hidden]
    bias: Tensor | None
    scale: float
    softcap: float | None
    adapted: Any = None  # the head itself, where an adapter is around it and its weight does not tell all

    def logits(self, states: Tensor) -> Tensor:
        logits = F.linear(states, self.weight, self.bias) if self.adapted is None else self.adapted(states)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def write_logits(self, states: Tensor, out: Tensor) -> Tensor:
        """`logits` in float32, in the first rows of `out`; without gradients."""
        out = out[: len(states)]
        if self.adapted is not None or {self.weight.dtype, states.dtype} != {torch.float32}:
            return out.copy_(self.logits(states))
        torch.mm(states, self.weight.t(), out=out)
        if self.bias is not None:
            out += self.bias
        if self.scale != 1.0:
            out *= self.scale
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def learnt_losses(self, states: Tensor, labels: Tensor) -> Tensor:
        """[positions], in nats: -log p(`labels` [positions] given `states` [positions, hidden]), with a graph."""
        is_frozen = self.adapted is None and not (self.weight.requires_grad or _trains(self.bias))
        if states.requires_grad and is_frozen:
            frozen: Tensor = _FrozenReadout.apply(states, self, labels)  # type: ignore[no-untyped-call]
            return frozen
        size = chunk_positions(len(self.weight))
        chunks = zip(torch.split(states, size), torch.split(labels, size), strict=True)
        return torch.cat([checkpoint(self._losses_of, *chunk, use_reentrant=False) for chunk in chunks])

    def _losses_of(self, states: Tensor, labels: Tensor) -> Tensor:
        """Of a chunk, whose logits are computed again for the backward."""
        return F.cross_entropy(self.logits(states).float(), labels, reduction="none")

    @torch.no_grad()
    def losses(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each position, and whether its likeliest token is the true one; both [positions]."""
        losses, hits = [], []
        logits_buffer, probabilities_buffer = _chunk_buffers(len(self.weight), states.device)
        for part, wanted in zip(*(torch.split(rows, len(logits_buffer)) for rows in (states, labels)), strict=True):
            logits = self.write_logits(part, logits_buffer)
            probabilities = torch.softmax(logits, -1, out=probabilities_buffer[: len(part)])
            losses.append(_losses(logits, probabilities, wanted.unsqueeze(1)))
            hits.append(logits.argmax(-1) == wanted)
        return torch.cat(losses), torch.cat(hits)


def chunk_positions(vocabulary: int) -> int:
    """Positions whose logits are held at once."""
    return max(_FEWEST_POSITIONS, min(_MOST_POSITIONS, _CHUNK_LOGITS // vocabulary))


@functools.lru_cache(maxsize=1)
def _chunk_buffers(vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits and probabilities of a chunk [positions, vocabulary], kept from batch to batch.

    Between batches the allocator would give parts of such a room to smaller tensors, and find another one for the next.
    """
    shape = chunk_positions(vocabulary), vocabulary
    with torch.inference_mode(False):  # whoever asks first, training can write to them, too
        return torch.empty(shape, device=device), torch.empty(shape, device=device)


def _trains(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


class _FrozenReadout(torch.autograd.Function):
    """The gradient of a chunk's states, (softmax - truth) weight, is taken while its logits are there."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, readout: Readout, labels: Tensor) -> Tensor:
        losses = []
        grad = torch.empty_like(states)
        logits_buffer, probabilities_buffer = _chunk_buffers(len(readout.weight), states.device)
        for start in range(0, len(states), len(logits_buffer)):
            part = slice(start, start + len(logits_buffer))
            logits, wanted = readout.write_logits(states[part], logits_buffer), labels[part].unsqueeze(1)
            by_logits = torch.softmax(logits, -1, out=probabilities_buffer[: len(logits)])
            losses.append(_losses(logits, by_logits, wanted))
            by_logits.scatter_add_(1, wanted, by_logits.new_full(wanted.shape, -1.0))
            if readout.softcap is not None:
                by_logits *= 1.0 - (logits / readout.softcap).square_()
            torch.mm(by_logits.to(readout.weight.dtype), readout.weight, out=grad[part])
        ctx.save_for_backward(grad.mul_(readout.scale))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grad.unsqueeze(1), None, None


def _losses(logits: Tensor, probabilities: Tensor, labels: Tensor) -> Tensor:
    """[positions]: -log of each label's probability, from the logits where that is too small to have a logarithm."""
    of_labels = probabilities.gather(1, labels).squeeze(1)
    losses = -of_labels.log()
    tiny = (of_labels < _SMALLEST).nonzero().squeeze(1)
    if len(tiny):
        rows = logits.index_select(0, tiny)
        losses[tiny] = rows.logsumexp(-1) - rows.gather(1, labels[tiny]).squeeze(1)
    return losses
