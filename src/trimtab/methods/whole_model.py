"""What stands in the place of an adapter: full fine-tuning, and the linear probe. The whole model is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


class WholeModel(nn.Module):
    """A model without an adapter, with as much of `peft.PeftModel` as a trial asks for.

    Every weight is trained; or those of `trained` alone, a part of the model.
    """

    def __init__(self, model: Any, trained: nn.Module | None = None) -> None:
        super().__init__()
        self.base_model = model.requires_grad_(trained is None)
        if trained is not None:
            trained.requires_grad_(True)
        self.config = model.config

    def get_base_model(self) -> Any:
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)

    def save_pretrained(self, folder: Path, safe_serialization: bool = True) -> None:
        self.base_model.save_pretrained(folder, safe_serialization=safe_serialization)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, **kwargs: Any) -> torch.Tensor:
        written: torch.Tensor = self.base_model.generate(**kwargs)
        return written
