"""What one trial does around the loop: where the head starts, and what it goes on from."""

import pytest
import torch

from samples import labelled_rows, run_here, write_reviews, write_rows
from trimtab.data import Row
from trimtab.engine.prepare import prepare_adapted
from trimtab.evaluation.baselines import LinearProbe
from trimtab.evaluation.evaluate import make_scorer
from trimtab.methods import attach_adapter
from trimtab.models import load_base
from trimtab.progress import Silent
from trimtab.runs import RunFolder, read_jsonl
from trimtab.sources import ModelSource
from trimtab.study_config import build_study
from trimtab.tasks import get_task
from trimtab.tasks.heads import final_linear
from trimtab.tuning import soften_head, start_head_at_probe


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "distilbert", "roberta", "mpnet"])
def test_the_head_starts_at_the_linear_probe_and_goes_on_less_sure(family, model_folder):
    """At the start the adapted model's logits are the probe's on the frozen base's features; softened, a part of them."""
    names = ["bad", "fine", "good"]
    task = get_task("classification")
    base = load_base(
        ModelSource("tiny", str(model_folder(family)), True), task.auto_class, task.head_settings(names), 0
    )
    scorer = make_scorer(task, base, 32, Silent())
    texts = ["a joy to watch", "a dull mess", "warm, funny and wise", "the worst film of the year number 3"]
    encoded = scorer.encode([Row(str(i), text, None, i % 3, None) for i, text in enumerate(texts)])
    features = scorer.score(encoded, features=True).features
    has_bias = final_linear(base.model).bias is not None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, features.shape[1], generator=generator)
    probe = LinearProbe(weight, torch.randn(3, generator=generator) if has_bias else None, 1.0)
    peft_model = attach_adapter(base.model, build_study({}), base.new_modules)
    scorer.choice = prepare_adapted(peft_model, scorer.choice)
    start_head_at_probe(base.model, probe)
    torch.testing.assert_close(scorer.score(encoded).outputs, probe.outputs(features), atol=1e-4, rtol=1e-4)
    soften_head(base.model, 10.0)
    torch.testing.assert_close(scorer.score(encoded).outputs, probe.outputs(features) / 10, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("task", "method", "is_softened"), [
    ("classification", "lora", True),
    ("classification", "linear_probe", False),
    ("classification", "trainable_tokens", False),
    ("multilabel", "lora", True),
    ("regression", "lora", False),
    ("token_classification", "lora", True),
])  # fmt: skip
def test_only_outputs_that_are_logits_are_softened(task, method, is_softened, model_folder, tmp_path):
    """At a rate of nothing the last validation is of the weights that the first step began with.

    Tiny BERT's features hardly differ, so that a probe of two classes makes much of their last digits.
    """
    if task == "classification":
        family, data = "llama", write_reviews(tmp_path / "rows.csv", 120)
    else:
        family, data = "bert", write_rows(tmp_path / "rows.jsonl", labelled_rows(task, 120))
    run_here(build_study(
        {"model": str(model_folder(family)), "train_data": str(data), "task": task, "method": method,
         "num_train_epochs": 1, "learning_rate": 1e-12, "max_length_tokens": 32, "out": str(tmp_path / "run")}
    ))  # fmt: skip
    history = read_jsonl(RunFolder(tmp_path / "run").trial(method, 0).history)
    first, *_, last = (entry for entry in history if "validation_loss" in entry)
    judged = next(name for name in ("accuracy", "f1", "rmse") if f"validation_{name}" in first)
    assert last[f"validation_{judged}"] == pytest.approx(first[f"validation_{judged}"], rel=1e-5)
    assert (abs(last["validation_loss"] - first["validation_loss"]) > 1e-3) == is_softened
