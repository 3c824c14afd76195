"""What some methods do beside the optimizer: AdaLoRA's budget and term of the loss, rates that differ by parameter."""

import pytest
import torch

from trimtab.engine.batches import Collator, TrainingPlan
from trimtab.engine.forward import PaddedForward, choose_forward
from trimtab.engine.frozen import set_adapter_training, trainable_parameters
from trimtab.engine.loop import LoopSettings, make_state, train
from trimtab.engine.prepare import prepare_adapted
from trimtab.errors import StudyError
from trimtab.methods import METHODS, attach_adapter, build_config, get_method, make_schedule
from trimtab.study_config import build_study
from trimtab.support import build_tiny_model, head_names, make_rows
from trimtab.tasks import get_task

TASK = get_task("classification")


def kept_ranks(peft_model):
    """Of each adapted layer, how many singular values are not zero."""
    return [int((value != 0).sum()) for name, value in peft_model.named_parameters() if "lora_E" in name]


@pytest.mark.parametrize("epochs", [1, 2, 12])
@pytest.mark.parametrize(
    ("family", "path"), [("Llama", "fused"), ("BERT", "fused"), ("GPT-2", "packed"), ("Llama", "padded")]
)
def test_ranks_of_adalora_fall_to_their_target(family, path, epochs):
    """Through the loop, on models whose base runs in fused layers, packed, or padded; also where steps are few."""
    model = build_tiny_model(TASK, family)
    choice = choose_forward(model, 0, 16, False)
    if path == "padded":
        model.set_attn_implementation("eager")
        choice = choice._replace(forward=PaddedForward(model))
    study = build_study({"method": "adalora", "r": 2, "method_options": {"init_r": 6}})
    peft_model = attach_adapter(model, study, head_names(model))
    choice = prepare_adapted(peft_model, choice)
    layers = len(kept_ranks(peft_model))
    rows = make_rows(TASK, model)
    plan = TrainingPlan(Collator(rows.examples, choice.forward.packed, choice.position_offset, 0), 16, 0, epochs)
    schedule = make_schedule(get_method("adalora"), peft_model, len(plan))
    state = make_state(trainable_parameters(peft_model), 0.0, schedule=schedule)
    budgets = []

    def on_step(state, figures):
        budgets.append(sum(kept_ranks(peft_model)))

    set_adapter_training(peft_model, True)
    train(state, plan, lambda batch: TASK.loss(choice.forward, batch), lambda: {"score": float(state.step), "loss": 0.0},
          LoopSettings(5e-3, 0.0, 1.0, 1, 1000), on_step)  # fmt: skip
    assert len(budgets) == len(plan)
    assert sum(kept_ranks(peft_model)) == budgets[-1] == 2 * layers
    if epochs == 12:
        warm, settled = len(plan) // 10, len(plan) - len(plan) // 3
        assert budgets[:warm] == [6 * layers] * warm
        assert budgets == sorted(budgets, reverse=True)
        assert len(set(budgets)) > 5  # not in one fall
        assert set(budgets[settled:]) == {2 * layers}
    schedule.finish()
    assert peft_model.peft_config["default"].rank_pattern is None


def test_the_penalty_is_the_papers():
    """Zhang et al. 2023, equation 4: how far P and Q are from orthogonal, weighted by gamma."""
    model = build_tiny_model(TASK, "Llama")
    peft_model = attach_adapter(model, build_study({"method": "adalora"}), head_names(model))
    schedule = make_schedule(get_method("adalora"), peft_model, 30)
    named = dict(peft_model.named_parameters())
    expected = []
    for name, weight in named.items():
        if "lora_A" in name:
            expected.append((weight @ weight.T - torch.eye(13)).norm())
        if "lora_B" in name:
            expected.append((weight.T @ weight - torch.eye(13)).norm())
    assert len(expected) == 8
    torch.testing.assert_close(schedule.penalty(), 0.5 * torch.stack(expected).mean())
    schedule.penalty().backward()
    assert all(weight.grad is not None for name, weight in named.items() if "lora_A" in name or "lora_B" in name)


def test_a_step_takes_the_penalty_in():
    model = build_tiny_model(TASK, "Llama")
    peft_model = attach_adapter(model, build_study({"method": "adalora"}), head_names(model))
    schedule = make_schedule(get_method("adalora"), peft_model, 30)
    state = make_state(trainable_parameters(peft_model), 0.0, schedule=schedule)
    rows = make_rows(TASK, model)
    plan = TrainingPlan(Collator(rows.examples, False, 0, 0), 16, 0, 10)
    before = float(schedule.penalty())
    nothing = lambda batch: sum((value * 0.0).sum() for value in state.parameters.values())  # noqa: E731
    train(
        state, plan, nothing, lambda: {"score": float(state.step), "loss": 0.0}, LoopSettings(1e-2, 0.0, 1.0, 10**6, 1)
    )
    assert float(schedule.penalty()) < before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"init_r": 8}, r"init_r \(8\) falls to target_r \(8\)"),
        ({"tinit": 5}, "tinit follows from the number of steps"),
    ],
)
def test_a_budget_that_cannot_fall_is_refused(options, said):
    with pytest.raises(StudyError, match=said):
        build_config(build_tiny_model(TASK, "Llama"), build_study({"method": "adalora", "method_options": options}))


def test_a_larger_target_starts_higher():
    study = build_study({"method": "adalora", "method_options": {"target_r": 20}})
    assert build_config(build_tiny_model(TASK, "Llama"), study).init_r == 31


@pytest.mark.parametrize(("method", "mark", "ratio"), [("loraplus", "lora_B", 16.0), ("vblora", "vblora_logits", 10.0)])
def test_parameters_that_learn_faster(method, mark, ratio):
    """The first step of AdamW moves each number by the rate, whatever the gradient."""
    model = build_tiny_model(TASK, "Llama")
    options = {"vector_length": 8} if method == "vblora" else {}
    peft_model = attach_adapter(model, build_study({"method": method, "method_options": options}), head_names(model))
    state = make_state(trainable_parameters(peft_model), 0.0, METHODS[method].rates)
    before = state.copy_weights()
    pull = lambda batch: sum(value.sum() for value in state.parameters.values())  # noqa: E731
    plan = TrainingPlan(Collator(make_rows(TASK, model).examples, False, 0, 0), 1000, 0, 1)
    train(state, plan, pull, lambda: {"score": float(state.step), "loss": 0.0}, LoopSettings(1e-3, 0.0, 1e9, 1, 1))
    moved = {name: float((before[name] - value).abs().mean()) for name, value in state.parameters.items()}
    assert any(mark in name for name in moved)
    for name, distance in moved.items():
        assert distance == pytest.approx(1e-3 * (ratio if mark in name else 1.0), rel=1e-3), name
