"""Frozen linears outside of fused layers in lower precision: close to float32, within bounds, and left without a trace."""

import pytest
import torch

from adapted_models import adapt, make_examples
from trimtab.engine import lower_precision
from trimtab.engine.batches import Collator
from trimtab.engine.forward import choose_forward
from trimtab.engine.frozen import FrozenLinear, trainable_parameters
from trimtab.engine.fused import native, precision
from trimtab.engine.lower_precision import linears_by_place
from trimtab.precision import choose_precision, describe_precision, use_float32, use_precision, use_trained_precision
from trimtab.progress import Silent
from trimtab.study_config import build_study
from trimtab.tasks import get_task

needs_compiler = pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here: no int8")
FORMATS = [pytest.param("int8", marks=needs_compiler), "bfloat16"]
# Conv1D, a build without fused layers, a method that no fused layer computes, one that reads its base's weight,
# one that adds to its base's output in place.
CASES = [("gpt2", "lora"), ("distilbert", "lora"), ("llama", "ia3"), ("bert", "dora"), ("mpnet", "lora"),
         ("llama", "adalora")]  # fmt: skip


class Case:
    def __init__(self, model, method):
        self.choice = choose_forward(model, 0, 64, False)
        self.forward = self.choice.forward
        self.peft_model = adapt(model, self.choice, method=method)
        examples = make_examples(model)
        collator = Collator(examples, self.forward.packed, self.choice.position_offset, 0)
        self.batch = collator.collate(range(len(examples)))
        self.task = get_task("classification")

    def results(self):
        self.peft_model.zero_grad()
        logits = self.forward.logits(self.batch)
        self.task.loss(self.forward, self.batch).backward()
        grads = [p.grad.flatten() for p in trainable_parameters(self.peft_model).values() if p.grad is not None]
        return logits.detach().flatten(), torch.cat(grads)

    def use(self, number_format):
        return use_precision(number_format, self.task, self.forward, self.batch, Silent(), training=True)


@pytest.fixture(params=CASES, ids="-".join)
def case(request, tiny_model):
    family, method = request.param
    sizes = {"n_embd": 64} if family == "gpt2" else {"dim": 64} if family == "distilbert" else {"hidden_size": 64}
    return Case(tiny_model(family, **sizes), method)


@pytest.mark.parametrize("number_format", FORMATS)
def test_close_to_float32_and_undone_to_the_bit(case, number_format):
    plain = case.results()
    errors = case.use(number_format)
    assert len(errors) >= 8
    assert sum(error.is_within_bounds for error in errors) >= len(errors) - 1, errors
    assert any(error.gradient_cosine is not None for error in errors)
    assert min(error.output_cosine for error in errors) < 1 - 1e-9
    lowered = case.results()
    for ours, theirs in zip(lowered, plain, strict=True):
        assert not torch.equal(ours, theirs)
        assert torch.cosine_similarity(ours, theirs, 0) > 0.99
    use_float32(case.forward)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(case.results(), plain, strict=True))


@pytest.mark.parametrize("number_format", FORMATS)
def test_a_reload_computes_as_training_did(case, number_format):
    told = describe_precision(number_format, case.use(number_format))
    assert told["precision"] == number_format
    trained = case.results()
    use_float32(case.forward)
    assert use_trained_precision(case.forward, told)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(case.results(), trained, strict=True))


@pytest.mark.parametrize("number_format", FORMATS)
def test_linears_beyond_the_bound_stay_in_float32(tiny_model, number_format, monkeypatch):
    case = Case(tiny_model("gpt2", n_embd=64), "lora")
    cosines = sorted(error.output_cosine for error in case.use(number_format))
    use_float32(case.forward)
    monkeypatch.setattr(precision, "OUTPUT_COSINE", cosines[len(cosines) // 2])
    errors = case.use(number_format)
    formats = {place: layer.number_format for place, layer in linears_by_place(case.forward.model).items()}
    assert {(error.layer, error.group): error.is_within_bounds for error in errors} == {
        place: used == number_format for place, used in formats.items()
    }
    assert len(set(formats.values())) == 2


@needs_compiler
def test_sides_that_int8_does_not_take_stay_in_float32(tiny_model):
    layer = FrozenLinear(torch.nn.Parameter(torch.randn(6, 8), requires_grad=False), None, False)
    assert not layer.can_compute_in("int8")
    assert layer.can_compute_in("bfloat16")


def test_auto_takes_the_format_that_pays_most(tiny_model, monkeypatch):
    case = Case(tiny_model("gpt2", n_embd=64), "lora")
    gains = {"int8": 3.0, "bfloat16": 2.5}
    monkeypatch.setattr("trimtab.precision.measure_gain", lambda model, number_format: gains[number_format])
    monkeypatch.setattr(native, "has_int8", lambda: True)
    assert choose_precision(build_study({"precision": "auto"}), case.forward, Silent()) == "int8"
    gains["bfloat16"] = 4.0
    assert choose_precision(build_study({"precision": "auto"}), case.forward, Silent()) == "bfloat16"
    monkeypatch.setattr(native, "has_int8", lambda: False)
    gains["bfloat16"] = 1.9
    assert choose_precision(build_study({"precision": "auto"}), case.forward, Silent()) == "float32"


@pytest.mark.parametrize("number_format", FORMATS)
def test_the_gain_is_measured_on_the_models_own_layers(tiny_model, number_format):
    gain = lower_precision.measure_gain(tiny_model("gpt2"), number_format)
    assert 0 < gain < 100
