"""Every method on every task and family that it supports: start, learning, stock peft's reload, and the way back."""

import warnings

import pytest
import torch

from gaps import expected_gap
from trained_models import Trained, close
from trimtab.adapters.switching import base_alone
from trimtab.methods import METHODS, get_method
from trimtab.support import FAMILIES, probe
from trimtab.tasks import TASKS

COMBINATIONS = [(method, task, family) for method in METHODS for task in TASKS for family in FAMILIES]
WORKING = [combination for combination in COMBINATIONS if expected_gap(*combination) is None]
GAPS = [combination for combination in COMBINATIONS if expected_gap(*combination)]


@pytest.mark.parametrize(("method", "task", "family"), WORKING, ids=lambda value: value)
def test_learns_and_comes_back(method, task, family, tmp_path):
    tuned = Trained(method, task, family, tmp_path)
    row = get_method(method)
    if row.starts_at_base:
        assert close(tuned.untrained, tuned.start)
    assert tuned.losses[1] < tuned.losses[0]
    assert not close(tuned.trained, tuned.untrained, 1e-4)
    base, peft_model = tuned.reload(tmp_path / "adapter")
    assert close(tuned.alone(base, peft_model), tuned.trained)
    if peft_model is not None:
        with base_alone(peft_model, tuned.untrained_heads):
            assert torch.equal(tuned.alone(base), tuned.start)
        tuned.holds_merged(peft_model, tmp_path / "merged")
        if task == "classification":
            assert close(tuned.outputs_as_loaded(tmp_path / "adapter"), tuned.trained)


@pytest.mark.parametrize(("method", "task", "family"), GAPS, ids=lambda value: value)
def test_gaps_are_told_with_their_reason(method, task, family):
    found = probe(method, task, family)
    assert not found.works
    assert expected_gap(method, task, family) in found.reason


@pytest.mark.parametrize("family", ["BERT", "GPT-2"])
def test_the_probe_says_what_the_matrix_shows(family):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(probe(method, "classification", family).works for method, task, of in WORKING
                   if task == "classification" and of == family)  # fmt: skip
