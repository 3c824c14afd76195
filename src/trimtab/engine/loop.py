"""The training loop: one function, its parts given as arguments.

What is learnt (loss, batches), how it is judged (validate) and who listens (on_step) come from
outside; between two steps everything lies in the `TrainingState`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.engine.batches import Batch, TrainingPlan
from trimtab.engine.state import Schedule, TrainingState

Ending = Literal["finished", "early_stop", "not_finite"]


@dataclass(frozen=True)
class LoopSettings:
    """How the optimizer moves and how often validation looks."""

    learning_rate: float
    warmup_ratio: float
    max_grad_norm: float
    steps_between_validations: int
    early_stopping_patience: int

    def rate_at(self, step: int, total_steps: int) -> float:
        """Linear warm-up from near zero, then a cosine to zero after the last step."""
        warmup = math.ceil(self.warmup_ratio * total_steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        progress = (step - warmup) / max(1, total_steps - warmup)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_state(
    parameters: dict[str, nn.Parameter],
    weight_decay: float,
    rates: Callable[[str], float] = lambda name: 1.0,
    schedule: Schedule | None = None,
) -> TrainingState:
    """AdamW (Loshchilov & Hutter 2019) over `parameters`; biases and norms do not decay.

    Args:
        rates: a parameter's factor of the learning rate, by its name.
        schedule: what the method does beside the optimizer.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault((parameter.ndim > 1, rates(name)), []).append(parameter)
    settings: list[dict[str, Any]] = [
        {"params": members, "weight_decay": weight_decay if decays else 0.0, "rate_factor": factor}
        for (decays, factor), members in groups.items()
    ]
    return TrainingState(parameters, torch.optim.AdamW(settings, lr=0.0, fused=True), schedule=schedule)


def train(
    state: TrainingState,
    plan: TrainingPlan,
    compute_loss: Callable[[Batch], Tensor],
    validate: Callable[[], dict[str, float]],
    settings: LoopSettings,
    on_step: Callable[[TrainingState, dict[str, float]], None] = lambda state, figures: None,
    before_first_step: Callable[[], None] = lambda: None,
) -> Ending:
    """Train from where `state` stands to the end of `plan`; the best weights are set at the end.

    Args:
        compute_loss: mean loss of a batch, with a graph to the parameters.
        validate: figures on the validation rows; the highest `score` is best, then the least `loss`.
        on_step: called after each step with its figures; may save `state.state_dict()`.
        before_first_step: may change the weights that training goes on from; the start was validated without it.

    Returns:
        How it ended. On "not_finite" the step that failed changed nothing, and the best
        validated weights are set as in the other cases.
    """
    if state.step == 0:
        _validate(state, validate, settings)
        before_first_step()
    ending: Ending = "finished"
    while state.step < len(plan):
        started = time.perf_counter()
        figures = _step(state, plan, compute_loss, settings)
        if figures is None:
            ending = "not_finite"
            break
        state.seconds += time.perf_counter() - started
        figures["tokens_per_second"] = state.tokens / state.seconds
        state.history.append({"step": state.step, **figures})
        last = state.step == len(plan)
        if last or state.step % settings.steps_between_validations == 0:
            _validate(state, validate, settings)
        on_step(state, figures)
        if state.validations_since_best >= settings.early_stopping_patience and not last:
            ending = "early_stop"
            break
    state.set_weights(state.best_weights)
    return ending


def _step(
    state: TrainingState, plan: TrainingPlan, compute_loss: Callable[[Batch], Tensor], settings: LoopSettings
) -> dict[str, float] | None:
    """One update; None, and nothing changed, if the loss or a gradient is not finite.

    A batch in parts gives the update of the whole: each part weighs as much as the positions, or pairs, that it learns.
    """
    parts = plan.parts(state.step)
    terms = sum(part.terms for part in parts)
    parameters = list(state.parameters.values())
    state.optimizer.zero_grad(set_to_none=True)
    loss = 0.0
    for part in parts:
        share = compute_loss(part) * (part.terms / terms)
        share.backward()  # type: ignore[no-untyped-call]
        loss += float(share.detach())
    if state.schedule is not None:
        state.schedule.penalty().backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(float(norm))):
        return None
    rate = settings.rate_at(state.step, len(plan))
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    state.optimizer.step()
    state.step += 1
    if state.schedule is not None:
        state.schedule.after_step(state.step)
    state.tokens += sum(part.tokens for part in parts)
    return {"loss": loss, "grad_norm": float(norm), "learning_rate": rate}


def _validate(state: TrainingState, validate: Callable[[], dict[str, float]], settings: LoopSettings) -> None:
    figures = validate()
    state.history.append(
        {"step": state.step, **{f"validation_{name}": value for name, value in figures.items() if name != "score"}}
    )
    state.judge(figures["score"], figures["loss"])
