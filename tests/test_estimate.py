"""Estimates before weights are read: exact counts, all checks, and what the report says of them."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from samples import run_here, run_trimtab, write_reviews
from trimtab.adapters import save_start, write_weights
from trimtab.errors import MethodError
from trimtab.estimate import estimate_job
from trimtab.methods import METHODS, attach_adapter
from trimtab.models import load_base
from trimtab.progress import Silent
from trimtab.runs import RunFolder
from trimtab.study import check_study
from trimtab.study_config import build_study
from trimtab.support import small_study
from trimtab.tasks import get_task

TASK = get_task("classification")


def make_study(folder, model, **settings):
    data = write_reviews(folder / "reviews.csv")
    return build_study({"model": str(model), "train_data": str(data), "max_length_tokens": 32, "num_train_epochs": 1,
                        "out": str(folder / "run")} | settings)  # fmt: skip


@pytest.mark.parametrize(
    ("family", "method"),
    [("bert", "vera"), ("gpt2", "full"), ("llama", "p_tuning")],
)
def test_parameters_and_adapter_are_those_of_the_run(tmp_path, model_folder, family, method):
    study = make_study(tmp_path, model_folder(family), method=method)
    estimate = estimate_job(check_study(study, Silent(), claim=False))
    assert not (tmp_path / "run").exists()
    comparison = run_here(study)
    cost = next(system["cost"] for system in comparison["systems"] if system["kind"] == "tuned")
    assert estimate.trainable_parameters == cost["trainable_parameters"]
    assert estimate.total_parameters == cost["total_parameters"]
    # Beside the weights a file of safetensors holds names and shapes.
    assert 0 <= cost["adapter_bytes"] - estimate.adapter_bytes < 20_000
    assert sum(estimate.memory_bytes.values()) == estimate.peak_memory_bytes
    assert estimate.low_seconds < estimate.total_seconds < estimate.high_seconds
    run = RunFolder(tmp_path / "run")
    assert json.loads(run.estimate.read_text())["trainable_parameters"] == estimate.trainable_parameters
    assert "Estimated before the run, and measured" in run.report_html.read_text()
    assert "Estimated before the run, and measured" in run.report_markdown.read_text()


@pytest.fixture(scope="module")
def job(tmp_path_factory, model_folder):
    """A checked study, whose method each test below changes."""
    return check_study(make_study(tmp_path_factory.mktemp("job"), model_folder("llama")), Silent(), claim=False)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_is_counted(tmp_path, job, method, monkeypatch):
    """Without weights, and around a model with them: the same numbers, and the same bytes of adapter."""
    monkeypatch.setattr("trimtab.estimate.measure_rate", lambda product: 100.0)  # only time follows from it
    options = small_study(method, "classification").method_options
    study = job.study.model_copy(update={"method": method, "method_options": options})
    estimate = estimate_job(replace(job, study=study))
    base = load_base(job.source, TASK.auto_class, TASK.head_settings(["bad", "good"]), 0)
    peft_model = attach_adapter(base.model, study, base.new_modules, list(range(5, 60)))
    assert (estimate.trainable_parameters, estimate.total_parameters) == peft_model.get_nb_trainable_parameters()
    save_start(peft_model, tmp_path / "start")
    write_weights(peft_model, base.new_modules, tmp_path / "adapter", tmp_path / "start" if method == "pissa" else None)
    (file,) = (tmp_path / "adapter").glob("*.safetensors")
    assert estimate.adapter_bytes == sum(weight.nbytes for weight in load_file(file).values())


def test_more_work_takes_longer_and_a_larger_batch_more_memory(tmp_path, model_folder):
    def estimate(**settings):
        return estimate_job(check_study(make_study(tmp_path, model_folder("llama"), **settings), Silent(), claim=False))

    small, long, large = estimate(tokens_per_batch=64), estimate(num_train_epochs=4), estimate()
    assert long.train_tokens == 4 * small.train_tokens
    assert long.seconds["tune"] > small.seconds["tune"]
    assert large.memory_bytes["activations"] > 7 * small.memory_bytes["activations"]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_language_models_blocks_are_as_long_as_its_texts(tmp_path, model_folder, monkeypatch, precision):
    monkeypatch.setattr("trimtab.estimate.measure_rate", lambda product: 100.0)
    model = shutil.copytree(model_folder("llama", "AutoModelForCausalLM"), tmp_path / "base")
    config = (
        (model / "config.json").read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 999')
    )
    (model / "config.json").write_text(config)

    def activations(words, length):
        rows = "".join(json.dumps({"text": "truly " * words + str(number)}) + "\n" for number in range(40))
        (tmp_path / "rows.jsonl").write_text(rows)
        study = make_study(tmp_path, model, task="causal_lm", precision=precision, tokens_per_batch=16,
                           train_data=str(tmp_path / "rows.jsonl"), max_length_tokens=length)  # fmt: skip
        return estimate_job(check_study(study, Silent(), claim=False)).memory_bytes["activations"]

    assert activations(3, 900) == activations(3, 16)
    assert activations(600, 900) > activations(600, 16)


def test_a_method_that_cannot_be_counted_says_so(job):
    study = job.study.model_copy(update={"method": "frod"})
    with pytest.raises(MethodError, match=r"frod starts from the base's weights.*; trimtab run works all the same"):
        estimate_job(replace(job, study=study))


def test_all_checks_are_made(tmp_path, model_folder):
    with pytest.raises(MethodError, match="loha cannot go into GPT2"):
        check_study(make_study(tmp_path, model_folder("gpt2"), method="loha"), Silent(), claim=False)


def test_the_command(tmp_path, model_folder):
    data = write_reviews(tmp_path / "reviews.csv")
    done = run_trimtab("estimate", "--model", model_folder("llama"), "--train-data", data, "--method", "dora")
    assert done.returncode == 0, done.stderr
    assert "trainable of" in done.stdout
    assert "base weights" in done.stdout
    assert "about" in done.stdout
    assert not (tmp_path / "runs").exists()
