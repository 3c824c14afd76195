"""Saved folders through transformers' own adapter calls, beside the logits that Trimtab gives."""

import csv
import shutil
from typing import Any, NamedTuple

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trimtab
from samples import run_here, write_tales
from trimtab.adapters.files import write_facts
from trimtab.data import Row
from trimtab.engine.batches import Collator
from trimtab.runs import RunFolder, read_json
from trimtab.study_config import build_study
from trimtab.tasks.examples import Example

TEXTS = ["a joy to watch", "a dull mess number 4", "the best film of the year truly truly", "weak acting and no story"]


class Tuned(NamedTuple):
    """An adapter of a run, another one of the same base, and how to load them with transformers alone.

    `tolerance` is of the largest logit: BERT's head starts at a probe of features that hardly differ here, so it makes
    much of their last digits.
    """

    folder: Any
    other: Any
    base: Any
    auto: Any
    labels: dict[str, int]
    tolerance: float

    def equal(self, ours, theirs):
        return float((ours - theirs).abs().max()) <= self.tolerance * max(1.0, float(theirs.abs().max()))

    def load(self, path):
        model = self.auto.from_pretrained(path, **self.labels).eval()
        model.config.pad_token_id = AutoTokenizer.from_pretrained(self.folder).pad_token_id
        return model

    def logits(self, model):
        """[texts, labels], or [tokens, vocabulary], of a padded batch."""
        batch = AutoTokenizer.from_pretrained(self.folder)(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            found = model(**batch).logits
        return found if self.labels else found[batch["attention_mask"].bool()]

    def trimtabs(self, folder):
        """The same from `load_adapter`, through Trimtab's own forward."""
        loaded = trimtab.load_adapter(folder)
        if self.labels:
            return loaded.scorer.score(loaded.scorer.encode([Row(text, text, label=0) for text in TEXTS])).outputs
        ids = [loaded.scorer.base.tokenizer(text)["input_ids"] for text in TEXTS]
        examples = [Example(text, None, list(range(len(text))), [0] * len(text)) for text in ids]
        forward = loaded.scorer.choice.forward
        with torch.no_grad():
            return torch.cat([forward.logits(Collator(examples, True, 0, 0).collate([n])) for n in range(len(ids))])


def write_three(path):
    """Reviews of three kinds."""
    kinds = {"good": "a joy to watch", "bad": "a dull mess", "fine": "the best film of the year"}
    with path.open("w", newline="") as file:
        rows = [[f"{kinds[label]} number {number}", label] for number in range(60) for label in kinds]
        csv.writer(file).writerows([["text", "label"], *rows])
    return path


@pytest.fixture(scope="module", params=["llama", "bert", "causal_lm"])
def tuned(request, tmp_path_factory, model_folder):
    folder, is_labels = tmp_path_factory.mktemp("transformers"), request.param != "causal_lm"
    base = model_folder(request.param) if is_labels else model_folder("llama", "AutoModelForCausalLM")
    data = write_three(folder / "data.csv") if is_labels else write_tales(folder / "data.jsonl")
    run_here(build_study({"model": str(base), "task": "classification" if is_labels else "causal_lm",
                          "train_data": str(data), "num_train_epochs": 2, "tokens_per_batch": 256,
                          "max_length_tokens": 32, "learning_rate": 5e-3, "out": str(folder / "run")}))  # fmt: skip
    adapter, other = RunFolder(folder / "run").trial("lora", 0).adapter, folder / "other"
    shutil.copytree(adapter, other)
    weights = {name: value * (1 if "lora_A" in name else -2)
               for name, value in load_file(adapter / "adapter_model.safetensors").items()}  # fmt: skip
    save_file(weights, other / "adapter_model.safetensors", metadata={"format": "pt"})
    write_facts(other, read_json(other / "trimtab.json"))
    auto = AutoModelForSequenceClassification if is_labels else AutoModelForCausalLM
    return Tuned(adapter, other, base, auto, {"num_labels": 3} if is_labels else {},
                 1e-4 if request.param == "bert" else 3e-5)  # fmt: skip


def test_from_pretrained_of_the_adapter_folder(tuned):
    found = tuned.logits(tuned.load(tuned.folder))
    assert found.shape[1] == (3 if tuned.labels else 120)
    assert tuned.equal(found, tuned.trimtabs(tuned.folder))
    assert not torch.allclose(found, tuned.logits(tuned.load(tuned.base)), atol=1e-2)


def test_load_adapter_on_the_base(tuned):
    model = tuned.load(tuned.base)
    model.load_adapter(tuned.folder)
    assert tuned.equal(tuned.logits(model), tuned.trimtabs(tuned.folder))


def test_set_adapter_among_two(tuned):
    model = tuned.load(tuned.base)
    model.load_adapter(tuned.folder, adapter_name="tuned")
    model.load_adapter(tuned.other, adapter_name="other")
    for name, folder in (("tuned", tuned.folder), ("other", tuned.other), ("tuned", tuned.folder)):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert tuned.equal(tuned.logits(model), tuned.trimtabs(folder))
    assert not torch.allclose(tuned.trimtabs(tuned.folder), tuned.trimtabs(tuned.other), atol=1e-2)


def test_disable_adapters_and_enable_them(tuned):
    model = tuned.load(tuned.base)
    before = tuned.logits(model)
    model.load_adapter(tuned.folder)
    model.disable_adapters()
    assert torch.equal(tuned.logits(model), before)
    model.enable_adapters()
    if tuned.labels:  # transformers switches heads off, and leaves them so: its own set of layers differs in both calls
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.enable_adapters(True)
    assert tuned.equal(tuned.logits(model), tuned.trimtabs(tuned.folder))
