"""Which groups of a stack compute in int8: those whose error on real rows stays within bounds.

The scheme is that of LLM.int8() (Dettmers et al. 2022, section 2.1), one scale a row and one a column,
for the input's gradient too. Groups with outliers, as the inputs of GLU down-projections often
have, stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from trimtab.engine.fused.formats import Rows, Want
from trimtab.engine.fused.linears import LinearGroup
from trimtab.engine.fused.stack import LayerStack

# Least cosine between what int8 and float32 give, over all elements of a group's product.
OUTPUT_COSINE = 0.999
GRADIENT_COSINE = 0.99

# Rows of a batch on which each group's error is measured; all groups' are held at once.
MEASURED_ROWS = 256


class GroupError(NamedTuple):
    """What a lower precision costs a group of linears; `gradient_cosine` is None where no input gradient is wanted."""

    layer: int
    group: str
    output_cosine: float
    gradient_cosine: float | None

    @property
    def is_within_bounds(self) -> bool:
        gradient = 1.0 if self.gradient_cosine is None else self.gradient_cosine
        return self.output_cosine >= OUTPUT_COSINE and gradient >= GRADIENT_COSINE


class _Seen:
    """The first rows that enter a group, and of the gradient that comes back, of one pass in float32."""

    def __init__(self, group: LinearGroup) -> None:
        self.group = group
        self.inputs: Tensor | None = None
        self.gradient: Tensor | None = None
        # The instance's methods stand before the class's until `forget`.
        group.forward = self._forward  # type: ignore[method-assign]
        group.backward = self._backward  # type: ignore[method-assign]

    def _forward(self, rows: Rows, addend: Tensor | None = None) -> Any:
        self.inputs = None if rows.values is None else rows.values[:MEASURED_ROWS].clone()
        return LinearGroup.forward(self.group, rows, addend)

    def _backward(self, grad: Rows, kept: Any, needs_input: bool = True, addend: Tensor | None = None) -> Any:
        self.gradient = grad.values[:MEASURED_ROWS].clone() if needs_input and grad.values is not None else None
        return LinearGroup.backward(self.group, grad, kept, needs_input, addend)

    def forget(self) -> None:
        del self.group.forward, self.group.backward


def quantise_stack(stack: LayerStack, run: Callable[[], None]) -> list[GroupError]:
    """Let every group compute in int8 whose error in one pass stays within bounds; returns all errors.

    Layers below the lowest adapted one, and below a prefix cache's, stay in float32: they run once for each text.

    Args:
        run: one forward through the stack, and one backward where it trains, on a batch of real rows.
    """
    for group in stack.groups:
        group.use_float32()
    stack.fits()  # reads the adapters
    lowest = max(stack.trained or 0, stack.cache.layer if stack.cache is not None else 0)
    places = [
        (number, group) for number, layer in enumerate(stack.layers) if number >= lowest for group in layer.groups
    ]
    seen = [_Seen(group) for _, group in places]
    try:
        run()
    finally:
        for group_seen in seen:
            group_seen.forget()
    errors = []
    for (number, group), group_seen in zip(places, seen, strict=True):
        if not group.can_quantise:
            errors.append(GroupError(number, group.name, 0.0, None))
            continue
        group.quantise()
        errors.append(_measure(number, group, group_seen))
        if not errors[-1].is_within_bounds:
            group.use_float32()
    return errors


def _measure(layer: int, group: LinearGroup, seen: _Seen) -> GroupError:
    assert seen.inputs is not None
    weight, kernels = group.weight, group.kernels
    rows = kernels.rows_of(seen.inputs, Want(False, True))
    output = cosine(kernels.linear(rows, weight), seen.inputs @ weight.values.t())
    gradient = None
    if seen.gradient is not None:
        rows = kernels.rows_of(seen.gradient, group.wants_gradient._replace(values=False))
        gradient = cosine(kernels.linear_backward(rows, weight), seen.gradient @ weight.values)
    return GroupError(layer, group.name, output, gradient)


def cosine(ours: Tensor, theirs: Tensor) -> float:
    return float(F.cosine_similarity(ours.flatten().double(), theirs.flatten().double(), 0))
