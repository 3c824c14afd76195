"""The number format of the frozen layers in training: chosen by measurement, told, and undone for scoring."""

from __future__ import annotations

from typing import Any

import torch

from trimtab.engine.batches import Batch
from trimtab.engine.forward import Forward, PackedForward
from trimtab.engine.fused import native
from trimtab.engine.fused.precision import GroupError, quantise_stack
from trimtab.machine import INT8_PAYS, measure_gemm_rates
from trimtab.progress import Progress
from trimtab.study_config import Precision
from trimtab.tasks.classification import classification_loss


def choose_precision(wanted: Precision, forward: Forward, batch: Batch, progress: Progress) -> list[GroupError] | None:
    """Let the frozen layers compute as `wanted`; says so, and returns the error of each where that is int8.

    Args:
        batch: training rows on which each group's error is measured.
    """
    if wanted == "float32":
        return None
    stack = forward.stack if isinstance(forward, PackedForward) else None
    if stack is None or not stack.fits():
        progress.note("training in float32: int8 needs a Llama or BERT build, plain LoRA and a C++ compiler")
        return None
    random_state = torch.get_rng_state()  # neither measurement may change what training draws
    if wanted == "auto" and not native.has_int8():
        progress.note("training in float32: this processor has no instructions for int8 products")
        return None
    if wanted == "auto":
        rates = measure_gemm_rates(("float32", "int8"))
        torch.set_rng_state(random_state)
        whole, real = rates["int8"] or 0.0, rates["float32"] or 1.0
        if whole < INT8_PAYS * real:
            progress.note(f"training in float32: int8 multiplies only {whole / real:.1f} times as fast here")
            return None

    def run() -> None:
        classification_loss(forward(batch), batch.labels).backward()  # type: ignore[no-untyped-call]

    errors = quantise_stack(stack, run)
    torch.set_rng_state(random_state)
    kept = sum(not error.is_within_bounds for error in errors)
    progress.note(f"training in int8: {len(errors) - kept} of {len(errors)} groups of layers; {kept} stay in float32")
    return errors


def use_float32(forward: Forward) -> None:
    """Scores are float32 for every system, whatever it was trained in."""
    if isinstance(forward, PackedForward) and forward.stack is not None:
        for group in forward.stack.groups:
            group.use_float32()


def use_trained_precision(forward: Forward, training: dict[str, Any]) -> bool:
    """Let the frozen layers compute as they did in training; False where that was float32, or is not to be had here.

    Args:
        training: a trial's training.json.
    """
    stack = forward.stack if isinstance(forward, PackedForward) else None
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
