"""int8 in fused layers: close to float32 in outputs and gradients, row by row, and left again without a trace."""

import pytest
import torch

from adapted_models import adapt, make_examples, pack
from trimtab.engine.forward import choose_forward
from trimtab.engine.frozen import trainable_parameters
from trimtab.engine.fused import native, precision
from trimtab.engine.fused.layers import Attention
from trimtab.engine.fused.precision import quantise_stack
from trimtab.precision import choose_precision, describe_precision, use_float32, use_precision
from trimtab.progress import Silent
from trimtab.study_config import build_study
from trimtab.tasks import get_task
from trimtab.tasks.classification import classification_loss
from trimtab.tasks.examples import Example

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here: training is in float32")


class Case:
    """A tiny model with a LoRA adapter that is alive, and its float32 results."""

    def __init__(self, model):
        self.choice = choose_forward(model, 0, 64, False)
        self.stack = self.choice.forward.stack
        self.peft_model = adapt(model, self.choice)
        self.examples = make_examples(model, seed=1)

    def results(self, examples=None, rows=slice(None)):
        batch = pack(examples or self.examples, self.choice)
        self.peft_model.zero_grad()
        logits = self.choice.forward.logits(batch)[rows]
        classification_loss(logits, batch.labels[rows]).backward()
        grads = [p.grad.flatten() for p in trainable_parameters(self.peft_model).values() if p.grad is not None]
        return logits.detach(), torch.cat(grads)

    def quantise(self):
        return quantise_stack(self.stack, self.results, has_backward=True)


def is_lowered(part):
    return part.is_bfloat16 if isinstance(part, Attention) else part.weight.int8 is not None


@pytest.fixture(params=["llama", "bert", "qwen2"])
def case(tiny_model, request):
    return Case(tiny_model(request.param, hidden_size=64, intermediate_size=128))


def test_outputs_and_gradients_stay_close_to_float32(case):
    logits, grads = case.results()
    errors = case.quantise()
    assert len(errors) == 8 + 2 * native.has_bfloat16()  # attention, too
    assert all(error.is_within_bounds for error in errors), errors
    assert errors[0].gradient_cosine is None  # nothing below the lowest adapter is asked for
    assert min(error.output_cosine for error in errors) < 1 - 1e-8
    quantised, quantised_grads = case.results()
    assert torch.cosine_similarity(quantised.flatten(), logits.flatten(), 0) > 0.995
    assert (quantised - logits).abs().max() > 0
    assert torch.cosine_similarity(quantised_grads, grads, 0) > 0.99


def test_float32_comes_back_to_the_last_bit(case):
    logits, grads = case.results()
    case.quantise()
    case.stack.use_float32()
    again, again_grads = case.results()
    assert torch.equal(again, logits)
    assert torch.equal(again_grads, grads)


def test_a_changed_text_leaves_its_neighbours_alone(case):
    case.quantise()
    changed_row = 4
    other = Example([7] * len(case.examples[changed_row]), None, case.examples[changed_row].positions, [0])
    rows = [i for i, row in enumerate(pack(case.examples, case.choice).rows) if row != changed_row]
    before = case.results(rows=rows)
    after = case.results([other if i == changed_row else e for i, e in enumerate(case.examples)], rows)
    for ours, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_groups_beyond_the_bound_stay_in_float32(case, monkeypatch):
    errors = case.quantise()
    bound = sorted(error.output_cosine for error in errors)[4]
    monkeypatch.setattr(precision, "OUTPUT_COSINE", bound)
    again = case.quantise()
    assert [error.output_cosine for error in again] == [error.output_cosine for error in errors]
    quantised = [is_lowered(case.stack.places()[error.layer, error.group]) for error in errors]
    assert quantised == [error.output_cosine >= bound for error in errors]
    assert 0 < sum(quantised) < len(errors)
    case.results()


def test_nothing_within_bounds_is_told_as_float32(case, monkeypatch):
    monkeypatch.setattr(precision, "OUTPUT_COSINE", 1.1)
    errors = case.quantise()
    assert not any(map(is_lowered, case.stack.places().values()))
    assert describe_precision("int8", errors) == {"precision": "float32"}


@pytest.mark.parametrize("training", [False, True])
def test_the_choice_draws_nothing_from_the_generator(case, training):
    batch = pack(case.examples, case.choice)
    for wanted in ("float32", "int8", "auto"):
        torch.manual_seed(3)
        chosen = choose_precision(build_study({"precision": wanted}), case.choice.forward, Silent())
        use_precision(chosen, get_task("classification"), case.choice.forward, batch, Silent(), training=training)
        use_float32(case.choice.forward)
        drawn = torch.rand(1)
        torch.manual_seed(3)
        assert torch.equal(drawn, torch.rand(1)), wanted


def test_scoring_in_int8_measures_outputs_alone(case):
    logits, _ = case.results()
    errors = use_precision(
        "int8",
        get_task("classification"),
        case.choice.forward,
        pack(case.examples, case.choice),
        Silent(),
        training=False,
    )
    assert all(error.gradient_cosine is None for error in errors)
    with torch.no_grad():
        quantised = case.choice.forward.logits(pack(case.examples, case.choice))
    assert (quantised - logits).abs().max() > 0
    assert torch.cosine_similarity(quantised.flatten(), logits.flatten(), 0) > 0.995


def test_layers_without_adapters_are_measured_by_their_outputs(tiny_model):
    model = tiny_model("llama", hidden_size=64, intermediate_size=128).requires_grad_(False)
    choice = choose_forward(model, 0, 64, False)
    batch = pack(make_examples(model, seed=1), choice)
    errors = quantise_stack(choice.forward.stack, lambda: choice.forward.logits(batch), has_backward=True)
    assert len(errors) == 8 + 2 * native.has_bfloat16()
    assert all(error.output_cosine > 0.999 and error.gradient_cosine is None for error in errors)


def test_attention_is_in_float32_where_all_else_is(case, monkeypatch):
    monkeypatch.setattr(precision, "_error_of", lambda layer, group, *_: precision.GroupError(layer, group.name, 0, 0))
    errors = case.quantise()
    assert not any(error.is_within_bounds for error in errors)
    assert not any(map(is_lowered, case.stack.places().values()))
