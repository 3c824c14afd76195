"""Every method of the installed peft that the table has no row for: it works through its name, or one line says why not."""

import warnings

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from trained_models import Trained, close
from trimtab.adapters.switching import base_alone
from trimtab.errors import MethodError, StudyError
from trimtab.methods import METHODS, check_method
from trimtab.methods.table import UNUSABLE
from trimtab.study_config import build_study
from trimtab.support import build_tiny_model, small_study, train_two_steps
from trimtab.tasks import get_task

KNOWN = {row.peft_type for row in METHODS.values()}
OTHERS = sorted(kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind.value not in KNOWN)
# Sizes of their own that suit layers of 32, where peft's defaults do not.
SIZES = {"psoft": {"r": 8}, "waveft": {"method_options": {"n_frequency": 64}}}
# What peft lets them do; all others do every task that adapters do.
TASK_OF = {"cpt": "causal_lm"}
WORKING = [name for name in OTHERS if name not in UNUSABLE]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build_on_meta(task, family):
    with torch.device("meta"):
        return build_tiny_model(get_task(task), family)


@pytest.mark.parametrize("method", WORKING)
def test_learns_and_comes_back(method, tmp_path):
    """On a Llama: checked, trained, and read back by stock peft; without the adapter the base is as it was."""
    task = TASK_OF.get(method, "classification")
    study = small_study(method, task).model_copy(update=SIZES.get(method, {}))
    check_method(lambda: build_on_meta(task, "Llama"), study)
    tuned = Trained(method, task, "Llama", tmp_path, **SIZES.get(method, {}))
    assert tuned.losses[1] < tuned.losses[0]
    base, peft_model = tuned.reload(tmp_path / "adapter")
    assert close(tuned.alone(base, peft_model), tuned.trained)
    with base_alone(peft_model, tuned.untrained_heads):
        assert torch.equal(tuned.alone(base), tuned.start)


@pytest.mark.parametrize("method", [name for name in WORKING if name not in SIZES])
def test_its_name_is_enough(method):
    task = TASK_OF.get(method, "classification")
    check_method(lambda: build_on_meta(task, "Llama"), build_study({"method": method, "task": task}))


@pytest.mark.parametrize("method", [name for name in WORKING if name not in TASK_OF])
def test_trains_on_an_encoder(method):
    task = get_task("classification")
    study = small_study(method, task.name).model_copy(update=SIZES.get(method, {}))
    train_two_steps(build_tiny_model(task, "BERT"), task, study)


@pytest.mark.parametrize("family", ["Llama", "BERT"])
@pytest.mark.parametrize("method", UNUSABLE)
def test_what_asks_for_more_is_refused(method, family):
    with pytest.raises(MethodError) as refused:
        check_method(lambda: build_on_meta("classification", family), build_study({"method": method}))
    said = str(refused.value)
    assert said.startswith(f"{method} cannot be trained here: {UNUSABLE[method]}; what can: lora, ")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "cpt"}, "cpt: peft refuses these settings: CPTConfig only supports task_type = CAUSAL_LM"),
        (
            {"method": "psoft"},
            r"psoft cannot go into Llama.*`r` \(32\) must be less than or equal to .*; what can: lora",
        ),
        ({"method": "waveft"}, "waveft cannot go into Llama.*`n_frequency` should be less than .*; what can: lora"),
        ({"method": "hira", "method_options": {"rr": 4}}, r"hira has no 'rr'; did you mean 'r'\?; it has: "),
        ({"method": "delora", "lora_alpha": 4}, "lora_alpha: delora has none; leave it out, or use one of: lora"),
    ],
)
def test_settings_that_do_not_fit_are_told(settings, said):
    with pytest.raises(StudyError, match=said):
        check_method(lambda: build_on_meta("classification", "Llama"), build_study(settings))


def test_a_method_that_fails_when_it_computes_is_refused_before_weights_are_read(monkeypatch):
    """As one of a later peft would be, that nobody here knows."""
    monkeypatch.setattr("trimtab.methods.attach.UNUSABLE", {})
    with pytest.raises(
        MethodError, match="poly cannot go into LlamaForSequenceClassification: task_ids should not be None"
    ):
        check_method(lambda: build_on_meta("classification", "Llama"), build_study({"method": "poly"}))
