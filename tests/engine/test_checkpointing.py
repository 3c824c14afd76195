"""Checkpointed layers keep less and give the same gradients, dropout included."""

import pytest
import torch

from adapted_models import adapt, pack
from trimtab.engine import checkpointing
from trimtab.engine.checkpointing import checkpoint_layers, kept_bytes, should_checkpoint
from trimtab.engine.forward import choose_forward
from trimtab.engine.frozen import set_adapter_training, trainable_parameters
from trimtab.engine.fused import native
from trimtab.engine.fused.precision import quantise_stack
from trimtab.tasks import get_task
from trimtab.tasks.examples import Example


class Case:
    def __init__(self, tiny_model, family, task="causal_lm"):
        self.task = get_task(task)
        sizes = {"hidden_size": 64, "intermediate_size": 128} if family != "gpt2" else {}
        model = tiny_model(family, auto_class=self.task.auto_class, **sizes)
        self.choice = choose_forward(model, 0, 64, False)
        self.peft_model = adapt(model, self.choice, task=task, lora_dropout=0.2)
        generator = torch.Generator().manual_seed(1)
        examples = []
        for length in (9, 30, 9, 4):
            ids = torch.randint(5, 100, (length,), generator=generator).tolist()
            places = list(range(length - 1)) if task == "causal_lm" else [0]
            examples.append(Example(ids, None, places, ids[1:] if task == "causal_lm" else [length % 3]))
        self.batch = pack(examples, self.choice)

    def loss(self):
        torch.manual_seed(5)
        return self.task.loss(self.choice.forward, self.batch)

    def gradients(self, is_on):
        assert checkpoint_layers(self.choice.forward, is_on)
        set_adapter_training(self.peft_model, True)
        return torch.autograd.grad(self.loss(), list(trainable_parameters(self.peft_model).values()))


@pytest.fixture(
    params=[("llama", "causal_lm"), ("qwen2", "causal_lm"), ("gpt2", "causal_lm"), ("bert", "classification")]
)
def case(request, tiny_model):
    return Case(tiny_model, *request.param)


def test_gradients_are_the_same(case):
    plain, again = case.gradients(False), case.gradients(True)
    assert any(gradient.abs().max() > 0 for gradient in plain)
    torch.testing.assert_close(again, plain, atol=0, rtol=0)


def test_less_is_kept(case):
    case.gradients(False)
    whole = kept_bytes(case.loss)
    case.gradients(True)
    assert 0 < kept_bytes(case.loss) < 0.7 * whole


@pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here: training is in float32")
def test_gradients_are_the_same_in_int8(tiny_model):
    case = Case(tiny_model, "llama")
    case.gradients(False)
    quantise_stack(case.choice.forward.stack, lambda: case.loss().backward(), has_backward=True)
    torch.testing.assert_close(case.gradients(True), case.gradients(False), atol=0, rtol=0)


def test_what_does_not_fit_is_checkpointed(monkeypatch):
    class Memory:
        available = 1000

    monkeypatch.setattr(checkpointing.psutil, "virtual_memory", lambda: Memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert should_checkpoint(100, 10, 61)
    assert not should_checkpoint(100, 10, 60)
