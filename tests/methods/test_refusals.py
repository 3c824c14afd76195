"""What cannot work is refused from names and shapes alone, with what would work; all else is let through."""

import shutil
import warnings

import pytest
import torch

from gaps import CONV1D, NO_LLAMA_ADAPTER, expected_gap
from samples import run_trimtab
from trimtab.errors import MethodError
from trimtab.methods import METHODS, check_method
from trimtab.progress import Silent
from trimtab.study import check_study
from trimtab.study_config import build_study
from trimtab.support import FAMILIES, build_tiny_model, small_study
from trimtab.tasks import get_task

FAMILY_OF_TASK = {"seq2seq": ["T5"], "causal_lm": ["GPT-2", "Llama", "Qwen2", "Mistral"],
                  "classification": [family for family in FAMILIES if family != "T5"]}  # fmt: skip
REFUSED = [
    *((method, "classification", "GPT-2") for method in sorted(CONV1D)),
    *(("adaption_prompt", "seq2seq" if family == "T5" else "classification", family)
      for family in sorted(NO_LLAMA_ADAPTER)),
    ("prefix_tuning", "classification", "DistilBERT"),
    ("linear_probe", "seq2seq", "T5"),
]  # fmt: skip


def check_on_meta(method, task, family):
    """As before a run: the study's method on a model without weights."""

    def build():
        with torch.device("meta"):
            return build_tiny_model(get_task(task), family)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_method(build, small_study(method, task))


@pytest.mark.parametrize(("method", "task", "family"), REFUSED, ids=lambda value: value)
def test_a_refusal_names_the_reason_and_what_works(method, task, family):
    with pytest.raises(MethodError) as refused:
        check_on_meta(method, task, family)
    said, _, working = str(refused.value).partition("; what can: ")
    assert said.startswith(f"{method} cannot ")
    assert expected_gap(method, task, family) in said
    assert "\n" not in said
    able = [name for name in METHODS if expected_gap(name, task, family) is None]
    assert working.split(", ") == able


@pytest.mark.parametrize(
    ("task", "family"), [(task, of) for task, families in FAMILY_OF_TASK.items() for of in families]
)
def test_what_works_is_let_through(task, family):
    for method in METHODS:
        if expected_gap(method, task, family) is None:
            check_on_meta(method, task, family)


def test_weights_are_not_read_first(tmp_path, model_folder, reviews):
    folder = shutil.copytree(model_folder("gpt2"), tmp_path / "base")
    (folder / "model.safetensors").write_bytes(b"no weights at all")
    study = build_study(
        {"model": str(folder), "train_data": str(reviews), "method": "c3a", "out": str(tmp_path / "run")}
    )
    with pytest.raises(MethodError, match=r"c3a cannot go into GPT2.*Conv1D.*what can: lora"):
        check_study(study, Silent())
    assert not (tmp_path / "run").exists()


def test_the_command_refuses_in_one_line(tmp_path, model_folder, reviews):
    done = run_trimtab("run", "--model", model_folder("gpt2"), "--train-data", reviews, "--method", "loha",
                       "--out", tmp_path / "run")  # fmt: skip
    assert done.returncode == 2
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("trimtab: loha cannot go into GPT2ForSequenceClassification: Target module of type")
    assert "what can: lora, rslora, dora, pissa, loraplus, adalora, ia3, vera, fourierft" in said
    assert not (tmp_path / "run").exists()
