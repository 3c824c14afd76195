"""Fixtures that every test may use; what they are made of is in `samples`."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # one thread a worker: two that share cores wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from samples import save_tiny_model, tiny_config, write_reviews
from trimtab.models import quiet_libraries

quiet_libraries()


# Files of which a test or two take a minute: at the end one worker would wait for the other.
_LONGEST = ("tests/test_starters.py", "tests/tasks/test_seq2seq.py", "tests/test_run.py", "tests/hub/")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a run stay on one worker, or each worker would make the run anew; the longest come first."""
    items.sort(key=lambda item: not item.nodeid.startswith(_LONGEST))
    for item in items:
        known = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009
        shared = [name for name, found in known.items() if found[-1].scope == "module"]
        if shared:
            params = getattr(item, "callspec", None)
            chosen = [str(params.params[name]) for name in shared if params and name in params.params]
            item.add_marker(pytest.mark.xdist_group("-".join([item.nodeid.partition("::")[0], *chosen])))


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Build a tiny, seeded model of a family, for classification if no other class is asked for, in eval mode."""

    def build(
        family: str,
        num_labels: int = 3,
        seed: int = 0,
        auto_class: str = "AutoModelForSequenceClassification",
        **changes: Any,
    ) -> Any:
        torch.manual_seed(seed)
        config = tiny_config(family, **changes)
        if auto_class == "AutoModelForSequenceClassification":
            config.num_labels = num_labels
        model = getattr(transformers, auto_class).from_config(config)
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
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny model of a family on disk, with a tokenizer trained on the reviews, as a user would have it."""
    made: dict[tuple[str, str], Path] = {}

    def make(family: str, auto_class: str = "AutoModel") -> Path:
        if (family, auto_class) not in made:
            made[family, auto_class] = save_tiny_model(family, tmp_path_factory.mktemp(family), auto_class)
        return made[family, auto_class]

    return make
