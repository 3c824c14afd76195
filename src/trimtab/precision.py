"""The number format of the frozen layers: chosen by measurement, told, and undone for scoring."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.engine.batches import Batch
from trimtab.engine.forward import Forward, PackedForward
from trimtab.engine.frozen import NumberFormat
from trimtab.engine.fused import native
from trimtab.engine.fused.precision import GroupError, quantise_stack
from trimtab.engine.fused.stack import LayerStack
from trimtab.engine.lower_precision import linears_by_place, lower_linears, measure_gain
from trimtab.engine.memory import give_back_freed_memory
from trimtab.machine import INT8_PAYS
from trimtab.progress import Progress
from trimtab.study_config import StudyConfig
from trimtab.tasks import Task


def choose_precision(study: StudyConfig, forward: Forward, progress: Progress) -> NumberFormat:
    """The number format in which this forward's frozen layers shall compute; says why where that is not the study's."""
    wanted = study.precision
    if study.quantize != "none":
        if wanted != "float32":
            progress.note(f"precision is left alone: the base is held in {study.quantize}")
        return "float32"
    on_cpu = next(forward.model.parameters()).device.type == "cpu"
    if wanted == "int8" and not (on_cpu and native.is_available()):
        progress.note("frozen layers in float32: int8 needs a processor and a C++ compiler, not a GPU")
        return "float32"
    if wanted != "auto":
        return wanted
    # float16 is left out: gradients underflow in it.
    has_int8 = on_cpu and native.has_int8()
    formats: tuple[NumberFormat, ...] = ("int8", "bfloat16") if has_int8 else ("bfloat16",)
    gains = {measure_gain(forward.model, number_format): number_format for number_format in formats}
    gain = max(gains)
    if gain < INT8_PAYS:
        progress.note(f"frozen layers in float32: {gains[gain]} multiplies only {gain:.1f} times as fast here")
        return "float32"
    progress.note(f"frozen layers in {gains[gain]}: it multiplies {gain:.1f} times as fast as float32 here")
    return gains[gain]


def use_precision(
    precision: NumberFormat, task: Task, forward: Forward, batch: Batch, progress: Progress, *, training: bool
) -> list[GroupError] | None:
    """Let the frozen layers compute as chosen; says so, and returns the error of each where that is not float32.

    Args:
        batch: training rows on which each group's error is measured.
        training: measure the input gradients' errors, too; layers below the lowest adapted one stay in float32.
    """
    stack = _stack_of(forward)
    if precision == "float32":
        return None

    def run() -> None:
        if training:
            task.loss(forward, batch).backward()  # type: ignore[no-untyped-call]
        else:
            task.outputs(forward, batch)

    random_state = torch.get_rng_state()  # the measurement may not change what training draws
    with torch.set_grad_enabled(training):
        if stack is not None and precision == "int8" and stack.fits():
            errors = quantise_stack(stack, run, training)
        else:
            if stack is not None and precision != "int8":
                stack.is_on = False
            errors = lower_linears(forward.model, precision, run)
    torch.set_rng_state(random_state)
    kept = sum(not error.is_within_bounds for error in errors)
    what = "training" if training else "scoring"
    if errors:
        count = f"{len(errors) - kept} of {len(errors)} groups of layers"
        progress.note(f"{what} in {precision}: {count}; {kept} stay in float32")
    else:
        progress.note(f"{what} in float32: no layer here computes in {precision}")
    return errors


def use_float32(forward: Forward) -> None:
    """Scores of systems are float32, whatever they were trained in."""
    stack = _stack_of(forward)
    if stack is not None:
        stack.is_on = True
        stack.use_float32()
    for layer in linears_by_place(forward.model).values():
        layer.compute_in("float32")
    give_back_freed_memory()  # what the lower precision took, and training


def use_trained_precision(forward: Forward, training: dict[str, Any]) -> bool:
    """Let the frozen layers compute as they did in training; False where that was float32, or is not to be had here.

    Args:
        training: a trial's training.json.
    """
    precision = training.get("precision", "float32")
    if precision == "float32":
        return False
    errors = [GroupError(**error) for error in training["errors"]]
    used = [(error.layer, error.group) for error in errors if error.is_within_bounds]
    stack = _stack_of(forward)
    if stack is not None and precision == "int8" and stack.fits():
        places = stack.places()
        if set(used) <= set(places):
            for place in used:
                places[place].quantise()
            return True
    layers = linears_by_place(forward.model)
    if not all(place in layers and layers[place].can_compute_in(precision) for place in used):
        return False
    if stack is not None:
        stack.is_on = False
    for place in used:
        layers[place].compute_in(precision)
    return True


def describe_precision(precision: NumberFormat, errors: list[GroupError] | None) -> dict[str, Any]:
    """What the trial keeps of it, and the report shows."""
    used = [error for error in errors or [] if error.is_within_bounds]
    if errors is None or not used:
        return {"precision": "float32"}
    return {
        "precision": precision,
        "least_output_cosine": min(error.output_cosine for error in used),
        "least_gradient_cosine": min((e.gradient_cosine for e in used if e.gradient_cosine is not None), default=None),
        "kept_in_float32": [f"layer {error.layer} {error.group}" for error in errors if error not in used],
        "errors": [error._asdict() for error in errors],
    }


def _stack_of(forward: Forward) -> LayerStack | None:
    return forward.stack if isinstance(forward, PackedForward) else None
