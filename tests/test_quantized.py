"""Bases in 8 and 4 bits: whole runs, stock peft on the same base, and methods that do not go with them."""

import json
import logging

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from samples import run_trimtab, write_reviews
from trimtab.data import read_rows
from trimtab.errors import MethodError, StudyError
from trimtab.methods import METHODS, check_method
from trimtab.models import count_parameters, keep_float32_products, load_base
from trimtab.progress import Silent
from trimtab.runs import RunFolder
from trimtab.sources import ModelSource
from trimtab.study import check_study
from trimtab.study_config import build_study
from trimtab.support import build_tiny_model, small_study, train_two_steps
from trimtab.tasks import get_task

BITS = ["8bit", "4bit"]
TASK = get_task("classification")


def load_quantised(folder, bits):
    return load_base(
        ModelSource("tiny", str(folder), True), TASK.auto_class, TASK.head_settings(["a", "b", "c"]), 0, bits
    )


@pytest.mark.parametrize("bits", ["4bit"])
def test_a_run_on_a_quantised_base(tmp_path, model_folder, bits):
    data = write_reviews(tmp_path / "reviews.csv")
    done = run_trimtab("run", "--model", model_folder("llama"), "--train-data", data, "--quantize", bits, "--precision",
                       "auto", "--num-train-epochs", "1", "--max-length-tokens", "32", "--out", tmp_path / "run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"precision is left alone: the base is held in {bits}" in done.stderr
    assert "bitsandbytes" not in done.stderr + done.stdout
    assert "kernels" not in done.stderr + done.stdout
    run = RunFolder(tmp_path / "run")
    comparison = json.loads(run.comparison.read_text())
    assert comparison["reload"]["passed"]
    whole = load_base(
        ModelSource("t", str(model_folder("llama")), True), TASK.auto_class, TASK.head_settings(["a", "b"]), 0
    )
    head = next(system for system in comparison["systems"] if system["name"] == "untrained-head")
    assert head["cost"]["total_parameters"] == count_parameters(whole.model)

    settings = {"load_in_8bit": True} if bits == "8bit" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # fmt: skip
    config = BitsAndBytesConfig(
        **settings, llm_int8_skip_modules=["score", "lm_head"], bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForSequenceClassification.from_pretrained(
        model_folder("llama"), num_labels=2, quantization_config=config, dtype=torch.float32
    )
    keep_float32_products(base)  # as the run did: bitsandbytes' bfloat16 layout does not take layers of 32
    trial = run.trial("lora", 0)
    peft_model = PeftModel.from_pretrained(base, str(trial.adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(trial.adapter)
    with torch.no_grad():
        logits = [
            peft_model(**tokenizer(row.text, return_tensors="pt", return_token_type_ids=False)).logits
            for row in read_rows(run.test_rows)
        ]
    torch.testing.assert_close(torch.cat(logits), load_file(trial.logits)["logits"], atol=2e-3, rtol=1e-3)

    said = {}
    for asked in ([], ["--quantize", bits], ["--quantize", "none"]):
        done = run_trimtab("predict", trial.adapter, "--input", data, *asked)
        assert done.returncode == 0, done.stderr
        said[tuple(asked)] = done.stdout
    assert said[()] == said["--quantize", bits] != said["--quantize", "none"]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_train_or_are_refused(model_folder, method, bits):
    study = small_study(method, "classification").model_copy(update={"quantize": bits})
    if bits in METHODS[method].refused_bits:
        with pytest.raises(
            MethodError, match=rf"{method} cannot be trained on a base in {bits} \(quantize\); what can: lora"
        ):
            check_method(lambda: build_tiny_model(TASK, "Llama"), study)
        return
    train_two_steps(load_quantised(model_folder("llama"), bits).model, TASK, study)


def test_scores_stay_in_float32(model_folder):
    """Where a processor has bfloat16 products, too: what a layer gives is its weights taken apart, times its input."""
    base = load_quantised(model_folder("llama"), "4bit")
    layer = base.model.model.layers[0].self_attn.q_proj
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        torch.testing.assert_close(layer(rows), rows @ weight.t(), atol=1e-6, rtol=1e-5)


def test_the_log_is_quiet(model_folder, caplog):
    with caplog.at_level(logging.DEBUG):
        train_two_steps(load_quantised(model_folder("llama"), "8bit").model, TASK, build_study({}))
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def test_a_missing_package_is_named(tmp_path, model_folder, reviews, monkeypatch):
    monkeypatch.setattr("trimtab.models.find_spec", lambda name: None)
    study = build_study(
        {
            "model": str(model_folder("llama")),
            "train_data": str(reviews),
            "quantize": "4bit",
            "out": str(tmp_path / "run"),
        }
    )
    with pytest.raises(StudyError, match=r"4bit needs bitsandbytes, which is missing; pip install 'trimtab\[quant\]'"):
        check_study(study, Silent())
