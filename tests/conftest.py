"""Fixtures that every test may use; what they are made of is in `samples`."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from samples import save_tiny_model, tiny_config, write_reviews
from trimtab.models import quiet_libraries

quiet_libraries()


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Build a tiny, seeded `AutoModelForSequenceClassification` of a family, in eval mode."""

    def build(family: str, num_labels: int = 3, seed: int = 0, **changes: Any) -> Any:
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)
        config = tiny_config(family, **changes)
        config.num_labels = num_labels
        model = AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():  # stock heads start so small that a wrong pooling would hide
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.2 if "embed" in name else 0.15)
        return model.requires_grad_(False).eval()

    return build


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write_reviews(tmp_path / "reviews.csv")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of a family on disk, with a tokenizer trained on the reviews, as a user would have it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make
