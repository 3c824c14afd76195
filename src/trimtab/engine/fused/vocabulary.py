"""Cross-entropy over a language model's frozen head by the kernels, a slice of the vocabulary at a time.

A slice's logits stay in the cache while they are looked at, and its weight in a product's panels. The plain twin is
`tasks.token_loss.Readout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trimtab.engine.fused.formats import Want, Weight, quantise_weight
from trimtab.engine.fused.linears import Kernels
from trimtab.engine.memory import give_back_mapped_pages, own_pages
from trimtab.tasks.token_loss import Readout, chunk_positions

# Tokens of the vocabulary in a slice: the rounded panel of one takes 256 KiB.
_SLICE = 4096


class VocabularyHead:
    """logits = states weight^T with a weight [vocabulary, hidden] that never trains, in float32 or in int8."""

    name = "vocabulary head"

    def __init__(self, weight: Tensor, kernels: Kernels) -> None:
        self.weight = weight.detach()
        self.kernels = kernels
        self.is_int8 = False
        self._slices: list[Weight] = []
        self._buffer = torch.empty(0)

    def serves(self, readout: Readout) -> bool:
        """Whether this is all that the model's head does, as it stands."""
        weight = readout.weight
        is_this = weight.data_ptr() == self.weight.data_ptr() and weight.dtype == torch.float32
        does_more = (readout.bias, readout.softcap, readout.adapted) != (None, None, None) or readout.scale != 1.0
        return is_this and not weight.requires_grad and not does_more and not torch.is_autocast_enabled("cpu")

    @property
    def can_quantise(self) -> bool:
        return not any(side % 4 for side in self.weight.shape)

    def quantise(self) -> None:
        """Compute with int8 from now on: a scale for each token of the vocabulary, and one for each row."""
        self.is_int8 = True
        self.release()

    def use_float32(self) -> None:
        if self.is_int8:
            self.is_int8 = False
            self.release()

    @property
    def is_laid_out(self) -> bool:
        return bool(self._slices)

    def release(self) -> None:
        """Give back what the weight was laid out in, and the room for logits."""
        self._slices, self._buffer = [], torch.empty(0)
        give_back_mapped_pages(self.weight)

    def learnt_losses(self, states: Tensor, labels: Tensor) -> Tensor:
        """[positions], in nats: -log p(`labels` [positions] given `states` [positions, hidden]), with a graph."""
        if not (torch.is_grad_enabled() and states.requires_grad):
            return self.losses(states, labels)[0]
        losses: Tensor = _LearntLosses.apply(states, self, labels)  # type: ignore[no-untyped-call]
        return losses

    @torch.no_grad()
    def losses(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each position, and whether its likeliest token is the true one; both [positions]."""
        losses, hits = [], []
        for part, wanted in self._chunks(states, labels):
            slices = self.logits(part)
            hits.append(_likeliest(slices) == wanted)
            losses.append(self._normalise(slices, wanted)[0])
        return torch.cat(losses), torch.cat(hits)

    def losses_and_gradient(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each position, and the gradient [positions, hidden] of their sum."""
        losses, gradients = [], []
        for part, wanted in self._chunks(states, labels):
            slices = self.logits(part)
            loss, total = self._normalise(slices, wanted)
            losses.append(loss)
            gradients.append(self._gradient(slices, total, wanted))
        return torch.cat(losses), torch.cat(gradients)

    def logits(self, states: Tensor) -> list[Tensor]:
        """Of each slice, [positions, tokens of the slice], in a room that the next call writes to again.

        `states` are as many as `chunk_positions` says, at most.
        """
        if not self._slices:
            self._lay_out()
        rows = self.kernels.rows_of(states.contiguous(), Want(not self.is_int8, self.is_int8))
        found, start = [], 0
        for weight in self._slices:
            stop = start + len(states) * weight.shape[0]
            out = self._buffer[start:stop].view(len(states), weight.shape[0])
            found.append(self.kernels.linear(rows, weight, out=out))
            start = stop
        return found

    def _chunks(self, states: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        size = chunk_positions(len(self.weight))
        return zip(torch.split(states, size), torch.split(labels, size), strict=True)

    def _lay_out(self) -> None:
        with own_pages():
            for part in torch.split(self.weight, _SLICE):
                if self.is_int8:
                    self._slices.append(Weight((part,), int8=quantise_weight(part)))
                else:
                    self._slices.append(Weight((part,), tiles=self.kernels.lay_out(part)))
        give_back_mapped_pages(self.weight)
        with own_pages(), torch.inference_mode(False):  # whoever asks first, training can write to it, too
            self._buffer = torch.empty(chunk_positions(len(self.weight)) * len(self.weight))

    def _normalise(self, slices: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses, and each position's sum of what the logits become in their place: exp(logit - highest)."""
        highest = torch.stack([part.amax(1) for part in slices]).amax(0)
        of_labels, total = torch.full_like(highest, torch.nan), torch.zeros_like(highest)
        for number, part in enumerate(slices):
            inside = (labels // _SLICE == number).nonzero().squeeze(1)
            of_labels[inside] = part[inside, labels[inside] % _SLICE]
            total += part.sub_(highest.unsqueeze(1)).exp_().sum(1)
        return total.log() + (highest - of_labels), total

    def _gradient(self, slices: list[Tensor], total: Tensor, labels: Tensor) -> Tensor:
        """(softmax - truth) weight; the truth apart, since in int8 all others would be small beside it."""
        gradient: Tensor | None = None
        for part, weight in zip(slices, self._slices, strict=True):
            scale = weight.int8.column_scale if weight.int8 is not None else None
            rows = self.kernels.rows_of(part, Want(not self.is_int8, self.is_int8, scale))
            gradient = self.kernels.linear_backward(rows, weight, gradient, out=gradient)
        assert gradient is not None
        return gradient.div_(total.unsqueeze(1)).sub_(self.weight.index_select(0, labels))


def _likeliest(slices: list[Tensor]) -> Tensor:
    """[positions]: the token of the highest logit, the first one where there are several."""
    highest, places = zip(*(part.max(1) for part in slices), strict=True)
    which = torch.stack(highest).argmax(0)
    return which * _SLICE + torch.stack(places).gather(0, which.unsqueeze(0)).squeeze(0)


class _LearntLosses(torch.autograd.Function):
    """The states' gradient is taken while their logits are there."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: VocabularyHead, labels: Tensor) -> Tensor:
        losses, gradient = head.losses_and_gradient(states, labels)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grad.unsqueeze(1), None, None
