"""Ranks and block sizes that suit the layers they go to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from trimtab.errors import StudyError
from trimtab.methods.table import Method
from trimtab.methods.targets import is_linear, modules_called


def fit_size(method: Method, options: dict[str, Any], model: Any, targets: Sequence[str] | str | None) -> str | None:
    """The largest size up to the wanted one that every adapted layer takes, else the next above it, set in `options`.

    Returns:
        A note where it is not the wanted one.

    Raises:
        StudyError: no size does.
    """
    if method.size is None or targets is None:
        return None
    field, allows = method.size.field, method.size.allows
    wanted = _whole_number(method, field, options[field])
    shapes = _shapes(model, targets)
    sizes = chain(range(wanted, 0, -1), range(wanted + 1, max(map(max, shapes), default=0) + 1))
    found = next((value for value in sizes if all(allows(value, *shape) for shape in shapes)), None)
    if found is None:
        shape = " and ".join(f"{inputs} to {outputs}" for inputs, outputs in sorted(shapes)[:3])
        raise StudyError(f"{method.name}: no {field} suits layers from {shape}; choose other --target-modules")
    options[field] = found
    return None if found == wanted else f"{method.name}: {field} {wanted} does not suit these layers; {found} does"


def _whole_number(method: Method, field: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise StudyError(f"{method.name}: {field} is {value!r}; a whole number of at least 1 is expected")
    return value


def _shapes(model: Any, targets: Sequence[str] | str) -> set[tuple[int, int]]:
    """(inputs, outputs) of the linears to adapt."""
    modules = dict(model.named_modules()) if isinstance(targets, str) else modules_called(model, targets)
    return {shape_of(module) for module in modules.values() if is_linear(module)}


def shape_of(linear: Any) -> tuple[int, int]:
    """(inputs, outputs), whichever way the weight is stored."""
    if hasattr(linear, "nf"):  # Conv1D
        inputs, outputs = linear.weight.shape
        return inputs, outputs
    return linear.in_features, linear.out_features  # a quantised weight is packed
