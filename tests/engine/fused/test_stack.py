"""All layers as one function against the stock model on each text alone: outputs, gradients, switches."""

import pytest
import torch

from adapted_models import adapt, make_examples, pack
from trimtab.engine.batches import Collator
from trimtab.engine.forward import PackedForward, PaddedForward, choose_forward
from trimtab.engine.frozen import trainable_parameters
from trimtab.engine.fused import linears, native, plain
from trimtab.engine.fused.formats import draw_masks
from trimtab.engine.fused.stack import build_stack
from trimtab.engine.prepare import prepare_adapted
from trimtab.methods import attach_adapter
from trimtab.study_config import build_study
from trimtab.tasks.classification import classification_loss
from trimtab.tasks.examples import Example
from trimtab.tasks.heads import backbone_of

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here: models keep their own forward")

LLAMA_LIKE = ["llama", "qwen2", "mistral"]
BERT_LIKE = ["bert", "roberta", "xlm-roberta", "electra"]
FAMILIES = LLAMA_LIKE + BERT_LIKE


def results(peft_model, logits, labels):
    """Logits, and the gradients of the adapter's parameters."""
    peft_model.zero_grad()
    classification_loss(logits, labels).backward()
    grads = {n: p.grad.clone() for n, p in trainable_parameters(peft_model).items() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


def alone(model, examples, rows):
    """Each text by itself through the stock forward and stock attention."""
    model.set_attn_implementation("eager")
    collator = Collator(examples, False, 0, 0)
    logits = torch.cat([PaddedForward(model).logits(collator.collate([i])) for i in range(len(examples))])[rows]
    model.set_attn_implementation("trimtab_packed")
    return logits


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    assert any("lora_A" in name and value.abs().max() > 1e-6 for name, value in theirs.items())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_lone_texts(tiny_model, family, targets):
    model = tiny_model(family)
    choice = choose_forward(model, 0, 64, False)
    assert choice.forward.stack is not None
    peft_model = adapt(model, choice, target_modules=targets)
    # ELECTRA's projection of its embeddings is a linear too; with an adapter on it, peft's forward is taken.
    assert choice.forward.stack.fits() or (family, targets) == ("electra", "all-linear")
    examples = make_examples(model)
    batch = pack(examples, choice)
    ours = results(peft_model, choice.forward.logits(batch), batch.labels)
    assert_equal(ours, results(peft_model, alone(model, examples, batch.rows), batch.labels))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_plain_kernels_give_the_same(tiny_model, family):
    model = tiny_model(family)
    choice = choose_forward(model, 0, 64, False)
    peft_model = adapt(model, choice)
    batch = pack(make_examples(model), choice)
    ours = results(peft_model, choice.forward.logits(batch), batch.labels)
    choice.forward.stack = build_stack(backbone_of(model), plain)
    assert_equal(ours, results(peft_model, choice.forward.logits(batch), batch.labels))


@pytest.mark.parametrize("family", ["llama", "bert", "mistral"])
def test_long_texts_and_windows(tiny_model, family):
    changes = {"sliding_window": 20} if family == "mistral" else {}
    model = tiny_model(family, max_position_embeddings=200, **changes)
    choice = choose_forward(model, 0, 200, False)
    assert choice.forward.stack is not None
    peft_model = adapt(model, choice)
    examples = make_examples(model, [150, 150, 30, 130])
    batch = pack(examples, choice)
    ours = results(peft_model, choice.forward.logits(batch), batch.labels)
    assert_equal(ours, results(peft_model, alone(model, examples, batch.rows), batch.labels))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_dropout_is_that_of_its_masks(tiny_model, family, monkeypatch):
    """With the very masks that were drawn, peft's own layers give the same outputs and gradients."""
    model = tiny_model(family)
    choice = choose_forward(model, 0, 64, False)
    peft_model = adapt(model, choice, lora_dropout=0.3)
    batch = pack(make_examples(model), choice)
    drawn = []

    def draw(dropout):
        drawn.append(draw_masks(dropout))
        return drawn[-1]

    monkeypatch.setattr(linears, "draw_masks", draw)
    ours = results(peft_model, choice.forward.logits(batch), batch.labels)
    kept = [plain._keep(batch.tokens, 2, 32, masks) * masks.scale for masks in drawn]
    assert len(kept) == 2
    assert all(abs(float(keep.eq(0).double().mean()) - 0.3) < 0.05 for keep in kept)
    masks = iter([part for keep in kept for part in keep.unbind(1)])  # by layer, then query and value
    for module in peft_model.modules():
        if hasattr(module, "lora_dropout"):
            module.__class__ = module.__class__.__mro__[1]  # peft's own layer
            mask = next(masks)
            module.lora_dropout["default"].forward = lambda x, mask=mask: x * mask
    assert_equal(ours, results(peft_model, PackedForward(model).logits(batch), batch.labels))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_text_leaves_its_neighbours_alone(tiny_model, family):
    model = tiny_model(family)
    choice = choose_forward(model, 0, 64, False)
    peft_model = adapt(model, choice)
    examples = make_examples(model)
    changed_row = 4
    other = Example([7] * len(examples[changed_row]), None, examples[changed_row].positions, [0])

    def run(rows):
        batch = pack(rows, choice)
        kept = [i for i, row in enumerate(batch.rows) if row != changed_row]
        return results(peft_model, choice.forward.logits(batch)[kept], batch.labels[kept])

    before, after = run(examples), run([other if i == changed_row else e for i, e in enumerate(examples)])
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_all_states_where_no_rows_are_asked_for(tiny_model, family):
    model = tiny_model(family)
    choice = choose_forward(model, 0, 64, False)
    batch = pack(make_examples(model), choice)
    with torch.no_grad():
        ours = choice.forward.hidden_states(batch)
        torch.testing.assert_close(ours, PackedForward(model).hidden_states(batch), atol=1e-5, rtol=1e-5)
        rows = torch.tensor([3, 8, 20])
        torch.testing.assert_close(choice.forward.hidden_states(batch, rows), ours[rows], atol=1e-6, rtol=1e-6)


def test_only_the_layers_from_the_lowest_adapter_up_are_kept_for_the_backward(tiny_model):
    model = tiny_model("llama", num_hidden_layers=4)
    choice = choose_forward(model, 0, 64, False)
    peft_model = adapt(model, choice)
    for name, parameter in peft_model.named_parameters():
        if "lora" in name and (".layers.0." in name or ".layers.1." in name):
            parameter.requires_grad_(False)
    for layer in backbone_of(model).layers[:2]:
        for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            linear.delete_adapter("default")
    examples = make_examples(model)
    batch = pack(examples, choice)
    ours = results(peft_model, choice.forward.logits(batch), batch.labels)
    assert choice.forward.stack.trained == 2
    assert_equal(ours, results(peft_model, alone(model, examples, batch.rows), batch.labels))


def test_a_disabled_or_merged_adapter_is_not_computed_twice(tiny_model):
    model = tiny_model("llama")
    choice = choose_forward(model, 0, 64, False)
    batch = pack(make_examples(model), choice)
    with torch.no_grad():
        base = choice.forward.logits(batch)
        peft_model = adapt(model, choice)
        tuned = choice.forward.logits(batch)
        assert (tuned - base).abs().max() > 1e-4
        with peft_model.disable_adapter():
            torch.testing.assert_close(choice.forward.logits(batch), base, atol=0, rtol=0)
        peft_model.merge_adapter()
        torch.testing.assert_close(choice.forward.logits(batch), tuned, atol=1e-5, rtol=1e-5)
        peft_model.unmerge_adapter()
        torch.testing.assert_close(choice.forward.logits(batch), tuned, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_other_methods_take_the_forward_of_peft(tiny_model, method):
    model = tiny_model("llama")
    choice = choose_forward(model, 0, 64, False)
    peft_model = adapt(model, choice, method=method)
    assert not choice.forward.stack.fits()
    examples = make_examples(model)
    batch = pack(examples, choice)
    torch.testing.assert_close(choice.forward.logits(batch), alone(model, examples, batch.rows), atol=1e-5, rtol=1e-5)
    assert peft_model is not None


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "distilbert", "modernbert", "opt"])
def test_another_build_has_no_stack(tiny_model, family):
    assert build_stack(backbone_of(tiny_model(family)), native) is None


def test_a_build_that_only_looks_known_is_found_out_by_its_outputs(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 0.3)
    assert build_stack(backbone_of(model), native) is not None
    choice = choose_forward(model, 0, 64, False)
    assert choice.forward.packed
    assert choice.forward.stack is None


@pytest.mark.parametrize(("family", "target"), [("llama", "embed_tokens"), ("electra", "embeddings_project")])
def test_an_adapter_outside_of_the_layers_is_trained_too(tiny_model, family, target):
    model = tiny_model(family)
    choice = choose_forward(model, 0, 64, False)
    assert choice.forward.stack is not None
    peft_model = attach_adapter(model, build_study({"lora_dropout": 0.0, "target_modules": target}), [])
    prepare_adapted(peft_model, choice)
    assert not choice.forward.stack.fits()
    batch = pack(make_examples(model), choice)
    found = results(peft_model, choice.forward.logits(batch), batch.labels)
    assert sum("lora" in name for name in found) == 2


def test_a_base_weight_that_was_replaced_is_noticed(tiny_model):
    model = tiny_model("llama")
    choice = choose_forward(model, 0, 64, False)
    peft_model = adapt(model, choice)
    batch = pack(make_examples(model), choice)
    with torch.no_grad():
        tuned = choice.forward.logits(batch)
        peft_model.merge_adapter(safe_merge=True)  # gives every base layer a new tensor
        torch.testing.assert_close(choice.forward.logits(batch), tuned, atol=1e-5, rtol=1e-5)


def test_another_forward_before_the_backward_changes_no_gradient(tiny_model):
    model = tiny_model("llama")
    choice = choose_forward(model, 0, 64, False)
    peft_model = adapt(model, choice)
    batch = pack(make_examples(model), choice)
    expected = results(peft_model, choice.forward.logits(batch), batch.labels)
    logits = choice.forward.logits(batch)
    with torch.no_grad(), peft_model.disable_adapter():
        choice.forward.logits(batch)
    assert_equal(results(peft_model, logits, batch.labels), expected)


def test_a_build_with_its_norms_elsewhere_is_packed_all_the_same(tiny_model):
    model = tiny_model("roberta-prelayernorm")
    choice = choose_forward(model, 0, 64, False)
    assert choice.forward.packed, choice.reason
    assert choice.forward.stack is None
