"""A language model's head by the kernels, beside its plain twin."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from trimtab.engine.batches import Collator
from trimtab.engine.forward import choose_forward
from trimtab.engine.frozen import thaw_linears
from trimtab.engine.fused import native, plain
from trimtab.engine.fused.vocabulary import VocabularyHead
from trimtab.engine.prepare import prepare_adapted
from trimtab.methods import attach_adapter
from trimtab.precision import use_precision
from trimtab.progress import Silent
from trimtab.study_config import build_study
from trimtab.tasks import get_task
from trimtab.tasks.examples import Example
from trimtab.tasks.token_loss import Readout

needs_compiler = pytest.mark.skipif(not native.is_available(), reason="no C++ compiler")
KERNELS = [pytest.param(native, marks=needs_compiler), plain]


def make(vocabulary=9_000, positions=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, 48, generator=generator)
    states = torch.randn(positions, 48, generator=generator).requires_grad_()
    return weight, states, torch.randint(vocabulary, (positions,), generator=generator)


def results(head, states, labels):
    loss = head.learnt_losses(states, labels).mean()
    return loss.detach(), torch.autograd.grad(3.0 * loss, states)[0]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("vocabulary", [90, 4096, 9_001])
def test_losses_and_gradients_are_the_plain_twins(kernels, vocabulary):
    weight, states, labels = make(vocabulary)
    head, readout = VocabularyHead(weight, kernels), Readout(weight, None, 1.0, None)
    torch.testing.assert_close(results(head, states, labels), results(readout, states, labels), atol=1e-5, rtol=1e-5)
    (losses, hits), (expected, expected_hits) = (one.losses(states, labels) for one in (head, readout))
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(hits, expected_hits)
    assert not losses.requires_grad


@pytest.mark.parametrize("kernels", KERNELS)
def test_int8_is_near(kernels):
    weight, states, labels = make()
    head = VocabularyHead(weight, kernels)
    loss, gradient = results(head, states, labels)
    head.quantise()
    rounded, by_int8 = results(head, states, labels)
    assert abs(rounded - loss) < 0.02 * loss
    assert cosine_similarity(by_int8.flatten(), gradient.flatten(), 0) > 0.99
    assert not torch.equal(by_int8, gradient)
    head.use_float32()
    assert torch.equal(results(head, states, labels)[1], gradient)


@needs_compiler
def test_int8_of_the_kernels_is_that_of_the_plain_twin():
    weight, states, labels = make()
    heads = [VocabularyHead(weight, kernels) for kernels in (native, plain)]
    for head in heads:
        head.quantise()
    ours, theirs = (results(head, states, labels) for head in heads)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    assert cosine_similarity(ours[1].flatten(), theirs[1].flatten(), 0) > 0.9999


def test_of_equal_logits_the_first_is_the_likeliest():
    weight = torch.randn(5_000, 8)
    weight[[3, 4_500]] = 9.0
    states = torch.ones(2, 8)
    for head in (VocabularyHead(weight, plain), Readout(weight, None, 1.0, None)):
        assert head.losses(states, torch.tensor([3, 4_500]))[1].tolist() == [True, False]


def test_a_truth_that_is_next_to_impossible_has_its_loss():
    head = VocabularyHead(torch.eye(4), plain)
    states, labels = torch.tensor([[200.0, 0, 0, 0], [0, 1.0, 0, 0]]).requires_grad_(), torch.tensor([1, 1])
    loss = head.learnt_losses(states, labels).mean()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(states, labels))
    assert torch.isfinite(torch.autograd.grad(loss, states)[0]).all()


def test_only_a_plain_frozen_head_is_served():
    weight = torch.randn(8, 4)
    head, readout = VocabularyHead(weight, plain), Readout(weight, None, 1.0, None)
    assert head.serves(readout)
    others = {"weight": weight.clone(), "bias": torch.zeros(8), "scale": 0.5, "softcap": 3.0, "adapted": object()}
    assert not any(head.serves(readout._replace(**{name: value})) for name, value in others.items())
    assert not head.serves(readout._replace(weight=torch.nn.Parameter(weight)))


@pytest.fixture
def language_model(tiny_model):
    model = tiny_model("llama", auto_class="AutoModelForCausalLM")
    return model, choose_forward(model, 0, 16, False)


@needs_compiler
def test_a_frozen_head_is_computed_by_the_kernels_whatever_adapts_the_layers(language_model):
    model, choice = language_model
    assert isinstance(choice.forward.head(), VocabularyHead)
    for method in ("lora", "dora"):
        study = build_study({"task": "causal_lm", "method": method})
        adapted = attach_adapter(model, study, [])
        assert prepare_adapted(adapted, choice).forward.head() is choice.forward.stack.head
        with adapted.disable_adapter():
            assert choice.forward.head() is choice.forward.stack.head
        thaw_linears(adapted.unload())


@needs_compiler
@pytest.mark.parametrize("settings", [{"method": "full"}, {"target_modules": "q_proj,lm_head"}])
def test_a_head_that_learns_is_not(language_model, settings):
    model, choice = language_model
    choice.forward.head().logits(torch.randn(2, model.config.hidden_size))
    adapted = attach_adapter(model, build_study({"task": "causal_lm"} | settings), [])
    assert isinstance(prepare_adapted(adapted, choice).forward.head(), Readout)
    assert not choice.forward.stack.head.is_laid_out


@needs_compiler
@pytest.mark.skipif(not native.has_int8(), reason="no int8 products")
@pytest.mark.parametrize("training", [True, False])
def test_int8_is_taken_within_bounds(language_model, training, monkeypatch):
    model, choice = language_model
    task, stack = get_task("causal_lm"), choice.forward.stack
    prepare_adapted(attach_adapter(model, build_study({"task": "causal_lm"}), []), choice)
    examples = [Example(list(range(5, 5 + n)), None, list(range(n - 1)), list(range(6, 5 + n))) for n in (9, 30)]
    batch = Collator(examples, True, choice.position_offset, 0).collate(range(2))
    errors = use_precision("int8", task, choice.forward, batch, Silent(), training=training)
    assert errors[-1].group == stack.head.name
    assert errors[-1].layer == len(stack.layers)
    assert (errors[-1].gradient_cosine is not None) == training
    assert stack.head.is_int8 == errors[-1].is_within_bounds
    stack.use_float32()
    assert not stack.head.is_int8
    monkeypatch.setattr("trimtab.engine.fused.precision.OUTPUT_COSINE", 1.1)
    use_precision("int8", task, choice.forward, batch, Silent(), training=training)
    assert not stack.head.is_int8
