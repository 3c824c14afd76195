"""The number format of the frozen layers: chosen by measurement, told, and undone for scoring."""

from __future__ import annotations

from typing import Any, Literal

import torch

from trimtab.engine.batches import Batch
from trimtab.engine.forward import Forward, PackedForward
from trimtab.engine.fused import native
from trimtab.engine.fused.precision import GroupError, measure_int8_gain, quantise_stack
from trimtab.engine.fused.stack import LayerStack
from trimtab.machine import INT8_PAYS
from trimtab.progress import Progress
from trimtab.study_config import Precision
from trimtab.tasks import Task

NumberFormat = Literal["float32", "int8"]


def choose_precision(wanted: Precision, forward: Forward, progress: Progress) -> NumberFormat:
    """The number format in which this forward's frozen layers shall compute; says why where that is not `wanted`."""
    if wanted == "float32":
        return "float32"
    stack = _stack_of(forward)
    if stack is None:
        progress.note("frozen layers in float32: int8 needs a Llama or BERT build and a C++ compiler")
        return "float32"
    if wanted == "auto":
        if not native.has_int8():
            progress.note("frozen layers in float32: this processor has no instructions for int8 products")
            return "float32"
        gain = measure_int8_gain(stack)
        if gain < INT8_PAYS:
            progress.note(f"frozen layers in float32: int8 multiplies only {gain:.1f} times as fast here")
            return "float32"
        progress.note(f"frozen layers in int8: it multiplies {gain:.1f} times as fast as float32 here")
    return "int8"


def use_precision(
    precision: NumberFormat, task: Task, forward: Forward, batch: Batch, progress: Progress, *, training: bool
) -> list[GroupError] | None:
    """Let the frozen layers compute as chosen; says so, and returns the error of each where that is int8.

    Args:
        batch: training rows on which each group's error is measured.
        training: measure the input gradients' errors, too; layers below the lowest adapted one stay in float32.
    """
    stack = _stack_of(forward)
    if precision == "float32" or stack is None:
        return None
    if not stack.fits():
        progress.note("training in float32: int8 needs plain LoRA")
        return None

    def run() -> None:
        if training:
            task.loss(forward, batch).backward()  # type: ignore[no-untyped-call]
        else:
            task.outputs(forward, batch)

    random_state = torch.get_rng_state()  # the measurement may not change what training draws
    with torch.set_grad_enabled(training):
        errors = quantise_stack(stack, run)
    torch.set_rng_state(random_state)
    kept = sum(not error.is_within_bounds for error in errors)
    what = "training" if training else "features"
    progress.note(f"{what} in int8: {len(errors) - kept} of {len(errors)} groups of layers; {kept} stay in float32")
    return errors


def use_float32(forward: Forward) -> None:
    """Scores of systems are float32, whatever they were trained in."""
    stack = _stack_of(forward)
    for group in stack.groups if stack is not None else ():
        group.use_float32()


def use_trained_precision(forward: Forward, training: dict[str, Any]) -> bool:
    """Let the frozen layers compute as they did in training; False where that was float32, or is not to be had here.

    Args:
        training: a trial's training.json.
    """
    stack = _stack_of(forward)
    if stack is None or training.get("precision") != "int8" or not stack.fits():
        return False
    errors = [GroupError(**error) for error in training["errors"]]
    groups = [group for layer in stack.layers[errors[0].layer :] for group in layer.groups]
    for error, group in zip(errors, groups, strict=True):
        if error.is_within_bounds:
            group.quantise()
    return True


def describe_precision(errors: list[GroupError] | None) -> dict[str, Any]:
    used = [error for error in errors or [] if error.is_within_bounds]
    if errors is None or not used:
        return {"precision": "float32"}
    return {
        "precision": "int8",
        "least_output_cosine": min(error.output_cosine for error in used),
        "least_gradient_cosine": min((e.gradient_cosine for e in used if e.gradient_cosine is not None), default=None),
        "kept_in_float32": [f"layer {error.layer} {error.group}" for error in errors if error not in used],
        "errors": [error._asdict() for error in errors],
    }


def _stack_of(forward: Forward) -> LayerStack | None:
    return forward.stack if isinstance(forward, PackedForward) else None
