"""All that a training holds between two steps, as one object that can be saved and restored.

The plan of batches is a function of the study, and the learning rate of the step; everything
else that a next step depends on is here: weights, optimizer moments, random state, and the best
state so far.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Schedule(Protocol):
    """A method's own term of the loss, and its work after each step."""

    def penalty(self) -> Tensor:
        """A scalar to add to the loss of each step."""
        ...

    def after_step(self, step: int) -> None:
        """Called with the gradients of the step still there; `step` counts from 1."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainingState:
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_score: float = float("-inf")
    best_loss: float = float("inf")
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    validations_since_best: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    schedule: Schedule | None = None  # what the method does beside the optimizer

    _NUMBERS = ("step", "tokens", "seconds", "best_step", "best_score", "best_loss", "validations_since_best")

    def copy_weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])

    def judge(self, score: float, loss: float) -> None:
        """Keep the weights if their validation score is the highest so far; of equal scores, the lesser loss."""
        if (score, -loss) > (self.best_score, -self.best_loss):
            self.best_score, self.best_loss = score, loss
            self.best_step, self.validations_since_best = self.step, 0
            self.best_weights = self.copy_weights()
        else:
            self.validations_since_best += 1
        if not self.best_weights:  # a start that is not finite is still a start
            self.best_weights = self.copy_weights()

    def state_dict(self) -> dict[str, Any]:
        """Everything, in copies: later steps do not change what was taken."""
        return {
            **{name: getattr(self, name) for name in self._NUMBERS},
            "weights": self.copy_weights(),
            "best_weights": {name: weight.clone() for name, weight in self.best_weights.items()},
            "optimizer": _copy(self.optimizer.state_dict()),
            "history": [dict(entry) for entry in self.history],
            "schedule": _copy(self.schedule.state_dict()) if self.schedule is not None else None,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state taken by `state_dict`: the next step gives the same bits."""
        for name in self._NUMBERS:
            setattr(self, name, state[name])
        self.set_weights(state["weights"])
        self.best_weights = {name: weight.clone() for name, weight in state["best_weights"].items()}
        self.optimizer.load_state_dict(_copy(state["optimizer"]))
        self.history = [dict(entry) for entry in state["history"]]
        if self.schedule is not None:
            self.schedule.load_state_dict(_copy(state["schedule"]))
        torch.set_rng_state(state["random"])
        if state["random_cuda"]:
            torch.cuda.set_rng_state_all(state["random_cuda"])


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value
