"""Saved folders through transformers' own adapter calls, with no Trimtab code in the way."""

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from samples import run_here, write_reviews, write_tales
from trimtab.runs import RunFolder, read_jsonl
from trimtab.study_config import build_study


@pytest.fixture(scope="module", params=["classification", "causal_lm"])
def tuned(request, tmp_path_factory, model_folder):
    """The adapter, a function that loads its base, and inputs with what transformers gives for the base alone."""
    folder, is_labels = tmp_path_factory.mktemp("transformers"), request.param == "classification"
    auto = AutoModelForSequenceClassification if is_labels else AutoModelForCausalLM
    base = model_folder("llama", "AutoModel" if is_labels else "AutoModelForCausalLM")
    data = write_reviews(folder / "data.csv") if is_labels else write_tales(folder / "data.jsonl")
    run_here(build_study({"model": str(base), "task": request.param, "train_data": str(data), "num_train_epochs": 2,
                          "tokens_per_batch": 256, "max_length_tokens": 32, "learning_rate": 5e-3,
                          "out": str(folder / "run")}))  # fmt: skip
    run = RunFolder(folder / "run")
    trial = run.trial("lora", 0)
    tokenizer = AutoTokenizer.from_pretrained(trial.adapter)
    texts = [row["text"] for row in read_jsonl(run.test_rows)][:8]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")

    def load(path):
        model = auto.from_pretrained(path).eval()
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    def outputs(model):
        with torch.no_grad():
            return model(**inputs).logits

    return trial, base, load, outputs, is_labels


def test_from_pretrained_of_the_adapter_folder(tuned):
    trial, base, load, outputs, is_labels = tuned
    model = load(trial.adapter)
    found = outputs(model)
    if is_labels:
        saved = load_file(trial.logits)["logits"][: len(found)]
        assert torch.allclose(found, saved, atol=1e-4)
    else:
        assert not torch.allclose(found, outputs(load(base)), atol=1e-2)


def test_load_set_disable_and_enable(tuned):
    trial, base, load, outputs, is_labels = tuned
    model = load(base)
    before = outputs(model)
    model.load_adapter(trial.adapter, adapter_name="tuned")
    model.set_adapter("tuned")
    assert model.active_adapters() == ["tuned"]
    tuned_outputs = outputs(model)
    assert torch.allclose(tuned_outputs, outputs(load(trial.adapter)), atol=1e-5)
    model.disable_adapters()
    assert torch.equal(outputs(model), before)
    model.enable_adapters()
    if is_labels:  # transformers switches heads off, and leaves them so: its own set of layers differs in both calls
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(True)
    assert torch.equal(outputs(model), tuned_outputs)
