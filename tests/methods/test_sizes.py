"""Ranks and block sizes that do not suit a layer are fitted with a note, for every method that has one."""

import pytest

from samples import Notes
from trimtab.errors import StudyError
from trimtab.methods import METHODS, build_config
from trimtab.study_config import build_study
from trimtab.support import build_tiny_model, small_study, train_two_steps
from trimtab.tasks import get_task

TASK = get_task("classification")
# Wanted and found on a tiny Llama, whose query goes from 32 to 32 and whose value goes from 32 to 16.
FITTED = {"pissa": (40, 16), "oft": (12, 8), "boft": (10, 8), "hra": (7, 6), "fourierft": (5000, 512), "miss": (40, 32),
          "vblora": (12, 8), "c3a": (12, 8), "shira": (20, 10), "road": (12, 8)}  # fmt: skip


def test_every_method_with_a_size_is_below():
    assert FITTED.keys() == {name for name, method in METHODS.items() if method.size is not None}


@pytest.mark.parametrize("method", FITTED)
def test_a_size_that_does_not_fit_is_fitted(method):
    field = METHODS[method].size.field
    wanted, found = FITTED[method]
    setting = {"r": wanted} if METHODS[method].settings.get("r") == field else {"method_options": {field: wanted}}
    study, notes = build_study({"method": method} | setting), Notes()
    model = build_tiny_model(TASK, "Llama")
    assert getattr(build_config(model, study, progress=notes), field) == found
    assert notes.notes == [f"{method}: {field} {wanted} does not suit these layers; {found} does"]
    train_two_steps(model, TASK, study)


@pytest.mark.parametrize("r", [1, 7, 1024])
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if "r" in row.settings])
def test_any_rank_trains(method, r):
    study = small_study(method, "classification").model_copy(update={"r": r})
    train_two_steps(build_tiny_model(TASK, "Llama"), TASK, study)


def test_a_size_below_all_that_fit_is_raised():
    notes = Notes()
    config = build_config(build_tiny_model(TASK, "Llama"), build_study({"method": "hra", "r": 1}), progress=notes)
    assert config.r == 2
    assert notes.notes == ["hra: r 1 does not suit these layers; 2 does"]


@pytest.mark.parametrize(("method", "given"), [("oft", {"r": 4}), ("boft", {"boft_block_num": 4})])
def test_pefts_other_way_to_give_a_size(method, given):
    study = build_study({"method": method, "method_options": given})
    train_two_steps(build_tiny_model(TASK, "Llama"), TASK, study)


@pytest.mark.parametrize("value", [0, -2, "many", 2.5])
def test_what_is_no_size(value):
    study = build_study({"method": "c3a", "method_options": {"block_size": value}})
    with pytest.raises(StudyError, match=r"c3a: block_size is .*; a whole number of at least 1 is expected"):
        build_config(build_tiny_model(TASK, "Llama"), study)


def test_layers_that_no_size_suits():
    study = build_study({"method": "road", "target_modules": "score"})
    with pytest.raises(
        StudyError, match="road: no group_size suits layers from 32 to 3; choose other --target-modules"
    ):
        build_config(build_tiny_model(TASK, "Llama"), study)
