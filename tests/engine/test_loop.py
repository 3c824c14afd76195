"""The loop: every row once an epoch, bit-exact repeats and resumes, best state kept, bad losses stopped."""

import math
from collections import Counter

import psutil
import pytest
import torch

from trimtab.engine.batches import Collator, TrainingPlan, plan_batches
from trimtab.engine.forward import choose_forward
from trimtab.engine.frozen import freeze_linears, set_adapter_training, trainable_parameters
from trimtab.engine.loop import LoopSettings, make_state, train
from trimtab.machine import set_threads
from trimtab.methods import attach_adapter
from trimtab.study_config import build_study
from trimtab.tasks.classification import classification_loss
from trimtab.tasks.examples import Example

SETTINGS = LoopSettings(5e-3, 0.1, 1.0, steps_between_validations=5, early_stopping_patience=100)


@pytest.mark.parametrize("padded", [False, True])
def test_every_row_once_within_the_budget(padded):
    lengths = [*torch.randint(1, 90, (500,), generator=torch.Generator().manual_seed(0)).tolist(), 900]
    batches = plan_batches(lengths, 256, shuffle_seed=3, padded=padded)
    assert Counter(row for rows in batches for row in rows) == Counter(range(501))
    for rows in batches:
        cost = len(rows) * max(lengths[r] for r in rows) if padded else sum(lengths[r] for r in rows)
        assert cost <= 256 or len(rows) == 1
    assert batches == plan_batches(lengths, 256, shuffle_seed=3, padded=padded)
    assert batches != plan_batches(lengths, 256, shuffle_seed=4, padded=padded)
    if not padded:  # packing wastes little: nearly as few batches as the tokens allow
        assert len(batches) <= 1.25 * math.ceil(sum(lengths) / 256)


def test_fraction_of_an_epoch():
    examples = [Example([1] * 10, None, [9], [0])] * 100
    plan = TrainingPlan(Collator(examples, True, 0, 0), 100, 0, 1.5)
    assert (plan.steps_per_epoch, len(plan)) == (10, 15)


class Trial:
    """A tiny Llama with LoRA and dropout, on random texts whose first token gives the label."""

    def __init__(self, tiny_model, seed=0, parts=1, dropout=0.1):
        self.model = tiny_model("llama")
        choice = choose_forward(self.model, 0, 32, False)
        generator = torch.Generator().manual_seed(7)
        examples = []
        for i in range(60):
            length = int(torch.randint(3, 12, (1,), generator=generator))
            ids = torch.randint(5, 100, (length,), generator=generator).tolist()
            examples.append(Example([5 + i % 3, *ids], None, [length], [i % 3]))
        torch.manual_seed(seed)
        self.peft_model = attach_adapter(self.model, build_study({"lora_dropout": dropout}), [])
        freeze_linears(self.peft_model)
        self.forward = choice.forward
        self.collator = Collator(examples, True, 0, 0)
        self.plan = TrainingPlan(self.collator, 64, seed, 4, parts)
        self.state = make_state(trainable_parameters(self.peft_model), 0.01)
        set_adapter_training(self.peft_model, True)

    def loss(self, batch):
        return classification_loss(self.forward.logits(batch), batch.labels)

    def validate(self):
        set_adapter_training(self.peft_model, False)
        with torch.no_grad():
            loss = float(self.loss(self.collator.collate(range(60))))
        set_adapter_training(self.peft_model, True)
        return {"loss": loss, "score": -loss}

    def run(self, settings=SETTINGS, **kwargs):
        return train(self.state, self.plan, self.loss, self.validate, settings, **kwargs)


def same_weights(first, second):
    return all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()


def test_loss_falls_and_only_the_adapter_moves(tiny_model):
    trial = Trial(tiny_model)
    frozen = {n: p.clone() for n, p in trial.peft_model.named_parameters() if not p.requires_grad}
    before = trial.validate()["loss"]
    assert trial.run() == "finished"
    assert trial.validate()["loss"] < 0.7 * before
    assert trial.state.step == len(trial.plan)
    assert trial.state.tokens == 4 * sum(map(len, trial.collator.examples))
    after = dict(trial.peft_model.named_parameters())
    assert frozen
    assert all(torch.equal(after[name], value) for name, value in frozen.items())


def test_same_seed_twice_gives_the_same_bits(tiny_model):
    first, second, other = Trial(tiny_model), Trial(tiny_model), Trial(tiny_model, seed=1)
    for trial in (first, second, other):
        torch.manual_seed(0)
        trial.run()
    assert same_weights(first.state.copy_weights(), second.state.copy_weights())
    assert first.state.history[0] == second.state.history[0]
    assert not same_weights(first.state.copy_weights(), other.state.copy_weights())


def test_a_restored_state_goes_on_to_the_same_bits(tiny_model):
    whole = Trial(tiny_model)
    taken = {}

    def take(state, figures):
        if state.step == 7:
            taken.update(state.state_dict())

    torch.manual_seed(0)
    whole.run(on_step=take)
    resumed = Trial(tiny_model)
    torch.manual_seed(999)  # what the restored state must not depend on
    resumed.state.load_state_dict(taken)
    resumed.run()
    assert same_weights(whole.state.copy_weights(), resumed.state.copy_weights())
    assert whole.state.best_step == resumed.state.best_step
    strip = [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in whole.state.history]
    assert strip == [{k: v for k, v in entry.items() if k != "tokens_per_second"} for entry in resumed.state.history]


def test_what_comes_before_the_first_step_is_done_once_and_is_not_the_start(tiny_model):
    trial = Trial(tiny_model)
    start, done, taken = trial.state.copy_weights(), [], {}

    def move():
        done.append(trial.state.step)
        with torch.no_grad():
            for weight in trial.state.parameters.values():
                weight.add_(1.0)

    def take(state, figures):
        if state.step == 1:
            assert same_weights(state.best_weights, start)
            taken.update(state.state_dict())

    trial.run(on_step=take, before_first_step=move)
    trial.state.load_state_dict(taken)
    trial.run(before_first_step=move)
    assert done == [0]


def test_a_loss_that_is_not_finite_stops_with_the_best_state(tiny_model):
    trial = Trial(tiny_model)
    honest = trial.loss

    def loss(batch):
        value = honest(batch)
        return value * float("nan") if trial.state.step == 12 and torch.is_grad_enabled() else value

    trial.loss = loss
    assert trial.run() == "not_finite"
    assert trial.state.step == 12
    assert trial.state.best_step == 10
    assert same_weights(trial.state.copy_weights(), trial.state.best_weights)
    assert all(torch.isfinite(weight).all() for weight in trial.state.best_weights.values())


def test_early_stop_keeps_the_best(tiny_model):
    trial = Trial(tiny_model)
    judged = iter([(0.5, 1.0), (0.7, 0.5), (0.7, 0.6), (0.6, 0.1), (0.9, 0.1)])
    trial.validate = lambda: dict(zip(("score", "loss"), next(judged), strict=True))
    settings = LoopSettings(5e-3, 0.1, 1.0, steps_between_validations=2, early_stopping_patience=2)
    assert trial.run(settings) == "early_stop"
    assert (trial.state.best_step, trial.state.step) == (2, 6)


def test_learning_rate_rises_then_falls_to_zero():
    rates = [SETTINGS.rate_at(step, 100) for step in range(101)]
    assert rates[0] < rates[5] < rates[9] <= 5e-3
    assert max(rates) == rates[10] == 5e-3
    assert rates[100] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_batch_in_parts_gives_the_same_update(tiny_model):
    whole, split = Trial(tiny_model, dropout=0.0), Trial(tiny_model, parts=3, dropout=0.0)
    sizes = []
    honest = split.loss
    split.loss = lambda batch: sizes.append(len(batch.rows)) or honest(batch)
    split.validate = lambda: {"loss": 0.0, "score": 0.0}
    whole.validate = split.validate
    whole.run()
    split.run()
    assert len(sizes) == 3 * len(split.plan)
    assert whole.state.tokens == split.state.tokens
    first, second = whole.state.history[1], split.state.history[1]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
    last, second_last = whole.state.history[-2], split.state.history[-2]
    assert last["loss"] == pytest.approx(second_last["loss"], rel=1e-2)


def test_parts_hold_every_row_once(tiny_model):
    plan = Trial(tiny_model, parts=4).plan
    for step in range(len(plan)):
        assert sorted(row for part in plan.parts(step) for row in part.rows) == sorted(plan.steps[step])
    assert plan.largest_tokens <= 64


def test_physical_cores_unless_the_user_says_otherwise(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        torch.set_num_threads(1)
        assert 1 <= set_threads() <= psutil.cpu_count(logical=False)
        torch.set_num_threads(1)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert set_threads() == 1
    finally:
        torch.set_num_threads(before)
