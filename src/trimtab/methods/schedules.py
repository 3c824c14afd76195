"""What some methods do beside the optimizer: a term of the loss, and work after each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.methods.table import Method


class AdaLoraSchedule:
    """AdaLoRA's orthogonality term and its budget of ranks (Zhang et al. 2023, equations 4 and 12).

    peft allots the ranks; here are the calls that it leaves to whoever trains.
    """

    def __init__(self, peft_model: Any, total_steps: int) -> None:
        self.model = peft_model.base_model
        self.config = peft_model.peft_config["default"]
        self.allocator = self.model.rankallocator
        # A tenth to warm up and a third to settle, as in the paper's experiments on GLUE (table 8).
        self.config.total_step = total_steps
        self.config.tinit, self.config.tfinal = total_steps // 10, total_steps // 3
        self.allocator.set_total_step(total_steps)

    def penalty(self) -> Tensor:
        """Mean distance of A A^T and B^T B from the identity, weighted."""
        found = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and ("lora_A" in name or "lora_B" in name):
                square = parameter @ parameter.t() if "lora_A" in name else parameter.t() @ parameter
                found.append(torch.linalg.norm(square - torch.eye(len(square), device=square.device)))
        mean: Tensor = torch.stack(found).mean() * self.config.orth_reg_weight
        return mean

    def after_step(self, step: int) -> None:
        self.model.update_and_allocate(step)

    def finish(self) -> None:
        """Save every rank: the best step's may not be those that the last one kept."""
        self.config.rank_pattern = None

    def state_dict(self) -> dict[str, Any]:
        kept = {name: dict(getattr(self.allocator, name)) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        return kept | {"rank_pattern": self.config.rank_pattern}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
            setattr(self.allocator, name, dict(state[name]))
        self.config.rank_pattern = state["rank_pattern"]


def make_schedule(method: Method, peft_model: Any, total_steps: int) -> AdaLoraSchedule | None:
    return AdaLoraSchedule(peft_model, total_steps) if method.name == "adalora" else None
