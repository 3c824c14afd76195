"""Which groups of a stack compute in int8: those whose error on real rows stays within bounds.

So does attention, in bfloat16, where that is faster.

The scheme is that of LLM.int8() (Dettmers et al. 2022, section 2.1), one scale a row and one a column,
for the input's gradient too. Groups with outliers, as the inputs of GLU down-projections often
have, stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trimtab.engine.fused.formats import Rows, Want
from trimtab.engine.fused.layers import Attention
from trimtab.engine.fused.linears import LinearGroup
from trimtab.engine.fused.stack import LayerStack
from trimtab.engine.fused.vocabulary import VocabularyHead
from trimtab.engine.memory import give_back_mapped_pages

# Least cosine between what int8 and float32 give, over all elements of a group's product.
OUTPUT_COSINE = 0.999
GRADIENT_COSINE = 0.99

# Rows of a batch on which each group's error is measured; attention's is measured on all, since texts are whole.
MEASURED_ROWS = 256
MEASURED_POSITIONS = 32  # of a language model's head, whose rows are as long as its vocabulary; all over the batch


class GroupError(NamedTuple):
    """What a lower precision costs linears, or attention; `gradient_cosine` is None where no gradient is wanted."""

    layer: int
    group: str
    output_cosine: float
    gradient_cosine: float | None

    @property
    def is_within_bounds(self) -> bool:
        gradient = 1.0 if self.gradient_cosine is None else self.gradient_cosine
        return self.output_cosine >= OUTPUT_COSINE and gradient >= GRADIENT_COSINE


class _Measured:
    """A group in one pass in float32, whose int8 is held against that as soon as all is seen that it computes from."""

    def __init__(self, layer: int, group: LinearGroup, has_backward: bool, runs_again: bool) -> None:
        self.layer, self.group, self.has_backward = layer, group, has_backward
        self._waits = runs_again  # for the forward that is run again right before the backward
        self.error = GroupError(layer, group.name, 0.0, None)
        self._inputs: Tensor | None = None
        # The instance's methods stand before the class's until `forget`.
        group.forward = self._forward  # type: ignore[method-assign]
        group.backward = self._backward  # type: ignore[method-assign]

    def _forward(self, rows: Rows, addend: Tensor | None = None) -> Any:
        if self._waits:
            self._waits = False
            return LinearGroup.forward(self.group, rows, addend)
        self._inputs = None if rows.values is None else rows.values[:MEASURED_ROWS].clone()
        found = LinearGroup.forward(self.group, rows, addend)
        if not self.has_backward:
            self._measure(None)
        return found

    def _backward(self, grad: Rows, kept: Any, needs_input: bool = True, addend: Tensor | None = None) -> Any:
        found = LinearGroup.backward(self.group, grad, kept, needs_input, addend)
        self._measure(grad.values[:MEASURED_ROWS] if needs_input and grad.values is not None else None)
        return found

    def _measure(self, gradient: Tensor | None) -> None:
        assert self._inputs is not None
        group, inputs, self._inputs = self.group, self._inputs, None
        if not group.can_quantise:
            return
        group.quantise()
        self.error = _error_of(self.layer, group, inputs, gradient)
        if not self.error.is_within_bounds:
            group.use_float32()

    def finish(self) -> None:
        """Measure what had no backward: nothing below it trains."""
        if self._inputs is not None:
            self._measure(None)

    def forget(self) -> None:
        del self.group.forward, self.group.backward


class _MeasuredAttention:
    """A layer's attention in one pass in float32, whose bfloat16 is held against that."""

    def __init__(self, layer: int, attention: Attention, has_backward: bool) -> None:
        self.attention, self.has_backward = attention, has_backward
        self.error = GroupError(layer, attention.name, 0.0, None)
        # As with groups, the instance's methods stand before the class's.
        attention.forward = self._forward  # type: ignore[method-assign]
        attention.backward = self._backward  # type: ignore[method-assign]

    def _forward(self, projected: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        found = Attention.forward(self.attention, projected, starts)
        if not self.has_backward:
            self._lower_within_bounds([found[0]], lambda: [Attention.forward(self.attention, projected, starts)[0]])
        return found

    def _backward(self, grad: Tensor, projected: Tensor, sums: Tensor, starts: Tensor) -> Tensor:
        def results() -> list[Tensor]:
            attended, sums = Attention.forward(self.attention, projected, starts)
            found = Attention.backward(self.attention, grad, projected, sums, starts)
            query, key_value, dim = self.attention.heads.shape
            return [attended, *torch.split(found, [query * dim, key_value * dim, key_value * dim], 1)]

        exact = results()
        self._lower_within_bounds(exact, results)
        return torch.cat(exact[1:], 1)

    def _lower_within_bounds(self, exact: list[Tensor], results: Callable[[], list[Tensor]]) -> None:
        self.attention.quantise()
        output, *gradients = map(cosine, results(), exact)
        self.error = self.error._replace(output_cosine=output, gradient_cosine=min(gradients, default=None))
        if not self.error.is_within_bounds:
            self.attention.use_float32()

    def forget(self) -> None:
        del self.attention.forward, self.attention.backward


class _MeasuredHead:
    """A language model's head in one pass in float32; its int8 is held against that afterwards, on a few rows."""

    def __init__(self, layer: int, head: VocabularyHead, has_backward: bool) -> None:
        self.layer, self.head, self.has_backward = layer, head, has_backward
        self._seen: tuple[Tensor, Tensor] | None = None
        # As with groups, the instance's methods stand before the class's.
        head.learnt_losses = self._learnt_losses  # type: ignore[method-assign]
        head.losses = self._losses  # type: ignore[method-assign]

    def _learnt_losses(self, states: Tensor, labels: Tensor) -> Tensor:
        self._keep(states, labels)
        losses = VocabularyHead.learnt_losses(self.head, states, labels)
        self.head.release()  # the gradient is there already
        return losses

    def _losses(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self._keep(states, labels)
        return VocabularyHead.losses(self.head, states, labels)

    def _keep(self, states: Tensor, labels: Tensor) -> None:
        places = torch.linspace(0, len(labels) - 1, min(len(labels), MEASURED_POSITIONS)).long()
        self._seen = states.detach()[places], labels[places]

    def forget(self) -> None:
        del self.head.learnt_losses, self.head.losses

    def measure(self) -> list[GroupError]:
        """The error, if there was a loss; int8 is kept within bounds."""
        if self._seen is None or not self.head.can_quantise:
            return []
        exact = self._results(*self._seen)
        self.head.quantise()
        output, gradient = map(cosine, self._results(*self._seen), exact)
        error = GroupError(self.layer, self.head.name, output, gradient if self.has_backward else None)
        if not error.is_within_bounds:
            self.head.use_float32()
        return [error]

    def _results(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, without what a row has in common, since that changes no probability; and the states' gradient."""
        logits = torch.cat(self.head.logits(states), 1)
        logits -= logits.mean(1, keepdim=True)
        return logits, self.head.losses_and_gradient(states, labels)[1]


def quantise_stack(stack: LayerStack, run: Callable[[], None], has_backward: bool) -> list[GroupError]:
    """Let every group compute in int8 whose error in one pass stays within bounds; returns all errors.

    Layers below the lowest adapted one, and below a prefix cache's, stay in float32: they run once for each text.

    Args:
        run: one forward through the stack, and one backward where it trains, on a batch of real rows.
        has_backward: whether there is one.
    """
    stack.use_float32()
    stack.fits()  # reads the adapters
    runs_again = has_backward and stack.trained is not None
    lowest = max(stack.trained or 0, stack.cache.layer if stack.cache is not None else 0)
    measured: list[_Measured] = []
    attention: list[_MeasuredAttention] = []
    for number, layer in enumerate(stack.layers[lowest:], lowest):
        measured += [_Measured(number, group, has_backward, runs_again) for group in layer.groups]
        if layer.attention.within_texts.can_quantise:
            attention.append(_MeasuredAttention(number, layer.attention.within_texts, runs_again))
    head = None if stack.head is None else _MeasuredHead(len(stack.layers), stack.head, has_backward)
    # While there are weights in both formats, there is no need for all that the layers compute.
    checkpointing, stack.checkpointing = stack.checkpointing, True
    try:
        with stack.in_passing():
            run()
        for one in measured:
            one.finish()
    finally:
        for one in measured:
            one.forget()
        for part in attention:
            part.forget()
        if head is not None:
            head.forget()
        stack.checkpointing = checkpointing
    errors = [one.error for one in measured]
    if any(error.is_within_bounds for error in errors):
        errors += [one.error for one in attention]
    else:  # the stack is in float32
        for layer in stack.layers:
            layer.attention.within_texts.use_float32()
    return errors + ([] if head is None else head.measure())


def _error_of(layer: int, group: LinearGroup, inputs: Tensor, gradient: Tensor | None) -> GroupError:
    weight, kernels, values = group.weight, group.kernels, group.weight.values
    rows = kernels.rows_of(inputs, Want(False, True))
    output, by_input = cosine(kernels.linear(rows, weight), inputs @ values.t()), None
    if gradient is not None:
        rows = kernels.rows_of(gradient, group.wants_gradient._replace(values=False))
        by_input = cosine(kernels.linear_backward(rows, weight), gradient @ values)
    give_back_mapped_pages(*weight.parts)
    return GroupError(layer, group.name, output, by_input)


def cosine(ours: Tensor, theirs: Tensor) -> float:
    return float(F.cosine_similarity(ours.flatten().double(), theirs.flatten().double(), 0))
