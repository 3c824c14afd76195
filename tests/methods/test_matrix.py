"""Every method on every task and family that it supports: start, learning, stock peft's reload, and the way back."""

import warnings

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import trimtab
from gaps import expected_gap
from trained_models import Trained, close, enlarge_head
from trimtab.adapters import loading
from trimtab.adapters.files import write_facts
from trimtab.adapters.switching import base_alone
from trimtab.fingerprints import fingerprint_model
from trimtab.methods import METHODS, get_method
from trimtab.models import load_base
from trimtab.sources import ModelSource
from trimtab.support import FAMILIES, build_tiny_model, probe
from trimtab.tasks import TASKS, get_task

COMBINATIONS = [(method, task, family) for method in METHODS for task in TASKS for family in FAMILIES]
WORKING = [combination for combination in COMBINATIONS if expected_gap(*combination) is None]
GAPS = [combination for combination in COMBINATIONS if expected_gap(*combination)]


@pytest.mark.parametrize(("method", "task", "family"), WORKING, ids=lambda value: value)
def test_learns_and_comes_back(method, task, family, tmp_path, base_on_disk):
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
    if family == LOADED.get(task, "BERT" if method != "adaption_prompt" else "Llama"):
        found = load_by_itself(tuned, method, task, base_on_disk(task, family), tmp_path / "adapter")
        assert close(found, tuned.trained)
        assert torch.equal(found, tuned.trained) or method in OTHER_PATHS


# A family for each task: every method is loaded by `load_adapter` on one, since stock peft reads it on all.
LOADED = {"causal_lm": "Llama", "preference": "Llama", "seq2seq": "T5"}
# What is loaded computes the same along another path, so that the last digits differ; all others are equal to the bit.
OTHER_PATHS = {
    "pissa": "is saved as LoRA of twice its rank, on the base as it was",
    "trainable_tokens": "trains in packed layers, and answers in fused ones",
    "full": "trains with a last layer that leaves out what is not pooled, and is loaded as a stock model",
    "linear_probe": "the same",
}


@pytest.fixture(scope="session")
def base_on_disk(tmp_path_factory):
    """The matrix's base of a task and a family, in a folder, with a tokenizer of as many words."""
    made = {}

    def make(task, family):
        if (task, family) not in made:
            folder = made[task, family] = tmp_path_factory.mktemp("base")
            base = build_tiny_model(get_task(task), family)
            enlarge_head(base)
            base.save_pretrained(folder)
            words = Tokenizer(WordLevel({str(number): number for number in range(96)}, unk_token="3"))
            PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2").save_pretrained(folder)
        return made[task, family]

    return make


def load_by_itself(tuned, method, task, base, folder):
    """What `load_adapter` gives, which finds base and adapter by itself."""
    names = ["a", "b", "c"] if task in ("classification", "multilabel", "token_classification") else []
    virtual = getattr(getattr(tuned.peft_model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    if not get_method(method).is_adapter:
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    source = ModelSource(str(base), str(base), True)
    write_facts(folder, {"base": str(base), "base_sha256": fingerprint_model(source), "task": task, "label_names": names,
                         "max_length_tokens": 16, "virtual_tokens": virtual, "method": method, "seed": 0})  # fmt: skip
    attention = tuned.choice.forward.model.config._attn_implementation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_base", load_aligned)
        tuned.choice = trimtab.load_adapter(folder).scorer.choice
    if task == "seq2seq":  # whose attention is stock: the matrix's own is eager, a user's is sdpa
        tuned.choice.forward.model.set_attn_implementation(attention)
    return tuned.outputs()


def load_aligned(*arguments, **named):
    """Weights where torch would put them: in a file that is mapped they lie elsewhere, and products round otherwise."""
    base = load_base(*arguments, **named)
    for tensor in (*base.model.parameters(), *base.model.buffers()):
        tensor.data = tensor.data.clone()
    return base


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
