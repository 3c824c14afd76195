"""Packed against one-by-one: outputs and gradients of every family, and no leak between neighbours."""

import pytest
import torch

from adapted_models import LENGTHS, enliven, make_examples, pack
from trimtab.engine.batches import Collator
from trimtab.engine.forward import PackedForward, PaddedForward, choose_forward
from trimtab.engine.frozen import freeze_linears, set_adapter_training, trainable_parameters
from trimtab.methods import attach_adapter
from trimtab.study_config import build_study
from trimtab.tasks.classification import classification_loss
from trimtab.tasks.examples import Example

REQUIRED = ["bert", "roberta", "distilbert", "gpt2", "llama", "qwen2", "mistral"]
ALSO_PACKED = ["xlm-roberta", "electra", "albert", "modernbert", "qwen3", "gemma2", "gemma3", "phi3", "opt",
               "gpt_neox", "olmo2", "smollm3"]  # fmt: skip


def alone(model, examples, choice):
    """Each text through transformers' own forward, by itself, with its own attention."""
    model.set_attn_implementation("eager")
    collator = Collator(examples, False, 0, 0)
    logits = torch.cat([PaddedForward(model).logits(collator.collate([i])) for i in range(len(examples))])
    model.set_attn_implementation("trimtab_packed")
    return logits


def adapted(model):
    """The model with LoRA whose B is not zero, so that every gradient path is alive."""
    peft_model = attach_adapter(model, build_study({"lora_dropout": 0.0}), [])
    freeze_linears(peft_model)
    enliven(peft_model)
    set_adapter_training(peft_model, True)
    return peft_model


def gradients(peft_model, loss):
    peft_model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in trainable_parameters(peft_model).items() if p.grad is not None}


@pytest.mark.parametrize("family", REQUIRED + ALSO_PACKED)
def test_packed_gives_what_each_text_gives_alone(tiny_model, family):
    model = tiny_model(family)
    choice = choose_forward(model, 0, 64, False)
    assert choice.forward.packed, choice.reason
    peft_model = adapted(model)
    examples = make_examples(model)
    batch = pack(examples, choice)

    packed = PackedForward(model).logits(batch)
    single = alone(model, examples, choice)[batch.rows]
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=1e-5)

    from_packed = gradients(peft_model, classification_loss(PackedForward(model).logits(batch), batch.labels))
    from_single = gradients(peft_model, classification_loss(alone(model, examples, choice)[batch.rows], batch.labels))
    assert from_packed.keys() == from_single.keys()
    assert any("lora_A" in name and grad.abs().max() > 1e-6 for name, grad in from_single.items())
    for name, grad in from_single.items():
        torch.testing.assert_close(from_packed[name], grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", REQUIRED)
def test_hidden_states_equal_those_of_the_lone_text(tiny_model, family):
    model = tiny_model(family)
    choice = choose_forward(model, 0, 64, False)
    examples = make_examples(model)
    batch = pack(examples, choice)
    with torch.no_grad():
        packed = PackedForward(model).hidden_states(batch)
        start = 0
        for row in batch.rows:
            one = PackedForward(model).hidden_states(pack([examples[row]], choice))
            torch.testing.assert_close(packed[start : start + len(one)], one, atol=1e-5, rtol=1e-5)
            start += len(one)
    assert start == sum(LENGTHS)


@pytest.mark.parametrize("family", REQUIRED)
def test_a_changed_text_leaves_its_neighbours_alone(tiny_model, family):
    """Outputs, and gradients with respect to the neighbours' embeddings."""
    model = tiny_model(family)
    choice = choose_forward(model, 0, 64, False)
    examples = make_examples(model)
    changed_row = 4
    other = Example([7] * len(examples[changed_row]), None, examples[changed_row].positions, [0])
    changed = [other if i == changed_row else example for i, example in enumerate(examples)]

    def run(rows):
        batch = pack(rows, choice)
        embeddings = model.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
        handle = model.get_input_embeddings().register_forward_hook(lambda *_: embeddings)
        logits = PackedForward(model).logits(batch)
        handle.remove()
        neighbours = [i for i, row in enumerate(batch.rows) if row != changed_row]
        logits.square().sum().backward()
        bounds = [0]
        for row in batch.rows:
            bounds.append(bounds[-1] + len(rows[row]))
        grads = [embeddings.grad[0, bounds[i] : bounds[i + 1]] for i in neighbours]
        return logits.detach()[neighbours], grads

    before, before_grads = run(examples)
    after, after_grads = run(changed)
    torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-6)
    for a, b in zip(before_grads, after_grads, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "modernbert"])
def test_windows_shorter_than_a_text_are_kept(tiny_model, family):
    window = {"local_attention": 8} if family == "modernbert" else {"sliding_window": 6}
    model = tiny_model(family, **window)
    choice = choose_forward(model, 0, 64, False)
    if not choice.forward.packed:
        pytest.fail(choice.reason)
    examples = make_examples(model, [3, 20, 20, 33])
    batch = pack(examples, choice)
    with torch.no_grad():
        torch.testing.assert_close(
            PackedForward(model).logits(batch), alone(model, examples, choice)[batch.rows], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", ["mpnet", "gpt_neo"])
def test_a_model_that_ignores_packing_is_padded_and_says_why(tiny_model, family):
    model = tiny_model(family)
    choice = choose_forward(model, 0, 64, False)
    assert not choice.forward.packed
    assert choice.reason
    examples = make_examples(model)
    batch = Collator(examples, False, 0, 0).collate(range(len(examples)))
    with torch.no_grad():
        together = choice.forward.logits(batch)
        lone = torch.cat([choice.forward.logits(Collator([e], False, 0, 0).collate([0])) for e in examples])
    torch.testing.assert_close(together, lone[batch.rows], atol=1e-5, rtol=1e-5)
