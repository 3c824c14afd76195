"""Whole runs with the methods that train, save or reload in a way of their own."""

import json

import pytest
import torch
from typer.testing import CliRunner

from samples import run_here, write_reviews, write_tales
from trimtab.cli import app
from trimtab.errors import StudyError
from trimtab.methods import check_method
from trimtab.study_config import build_study
from trimtab.support import FAMILIES, build_tiny_model, probe_all
from trimtab.tasks import get_task


@pytest.mark.parametrize(
    ("method", "task"),
    [
        ("prefix_tuning", "classification"),
        ("adalora", "classification"),
        ("hira", "classification"),  # no row of the table
        ("linear_probe", "classification"),
        ("full", "causal_lm"),
    ],
)
def test_ends_with_a_full_comparison(tmp_path, model_folder, method, task):
    if task == "classification":
        model, data = model_folder("llama"), write_reviews(tmp_path / "reviews.csv")
    else:
        model, data = model_folder("llama", "AutoModelForCausalLM"), write_tales(tmp_path / "tales.jsonl")
    study = build_study(
        {"model": str(model), "train_data": str(data), "task": task, "method": method, "num_train_epochs": 2,
         "tokens_per_batch": 256, "max_length_tokens": 32, "out": str(tmp_path / "run")}
    )  # fmt: skip
    comparison = run_here(study)
    assert comparison["reload"]["passed"]
    tuned = next(system for system in comparison["systems"] if system["kind"] == "tuned")
    assert tuned["name"] == f"{method}-s0"
    assert tuned["cost"]["trainable_parameters"] > 0
    assert comparison["contrasts"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "ia3", "r": 8}, r"r: \(IA\)3 has none; leave it out, or use one of: lora, rslora"),
        (
            {"method": "lora", "method_options": {"use_dorra": True}},
            r"lora has no 'use_dorra'; did you mean 'use_dora'\?",
        ),
        ({"method": "prompt_tuning", "target_modules": "q_proj"}, "prompt tuning goes into no layer"),
        ({"method": "full", "layers_to_transform": "upper-half"}, "trains every layer; leave it at all"),
        ({"method": "linear_probe", "layers_to_transform": "upper-half"}, "trains no layer; leave it at all"),
        ({"method": "full", "method_options": {"r": 4}}, "is no adapter and has none; leave out r"),
        ({"method": "lorra"}, r"unknown method 'lorra'; did you mean 'lora'\?"),
    ],
)
def test_settings_that_a_method_does_not_have(settings, said):
    with pytest.raises(StudyError, match=said):
        check_method(lambda: build_on_meta("Llama"), build_study(settings))


def build_on_meta(family):
    with torch.device("meta"):
        return build_tiny_model(get_task("classification"), family)


class Counts:
    def __init__(self):
        self.tried = 0

    def stage(self, title):
        pass

    def note(self, text):
        pass

    def advance(self, done, total, unit, **figures):
        self.tried = done


def test_what_was_probed_is_remembered_by_version(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    monkeypatch.setattr("trimtab.support.METHODS", ("lora", "loha"))
    first, again, other = Counts(), Counts(), Counts()
    found = probe_all(first)
    assert first.tried == len(found) > 0
    assert probe_all(again) == found
    assert again.tried == 0
    monkeypatch.setattr("trimtab.support.package_versions", lambda: {"peft": "0"})
    assert probe_all(other) == found
    assert other.tried == len(found)


def test_methods_command(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    shown = CliRunner().invoke(app, ["methods", "--task", "classification"], env={"COLUMNS": "160"})
    assert shown.exit_code == 0, shown.output
    heading = next(line for line in shown.output.splitlines() if "what it is" in line)
    assert heading.split("┃")[3:-1] == [f" {family} " for family in FAMILIES]
    assert "loha on GPT-2" in shown.output
    assert "Conv1D" in shown.output
    assert "no every method on T5: T5 has no model for classification here (an encoder with decoder" in shown.output
    rows = json.loads(CliRunner().invoke(app, ["methods", "--json", "--quiet", "--task", "classification"]).stdout)
    refused = {row["method"] for row in rows if row["family"] == "GPT-2" and not row["works"]}
    assert refused == {"loha", "lokr", "oft", "boft", "hra", "c3a", "shira", "road", "miss"}
    takes = {row["family"] for row in rows if row["method"] == "adaption_prompt" and row["works"]}
    assert takes == {"Llama", "Mistral", "GPT-2"}
