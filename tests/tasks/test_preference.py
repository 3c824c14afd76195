"""Preference: rows, DPO's loss beside trl's, and a run that learns which answers are wanted."""

import math
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapted_models import enliven
from samples import run_here, write_rows
from trimtab.combining import combine_adapters
from trimtab.data import Row, prepare_data
from trimtab.engine.batches import Collator, TrainingPlan
from trimtab.engine.forward import PaddedForward, choose_forward, use_stock_attention
from trimtab.engine.frozen import trainable_parameters
from trimtab.engine.fused import native
from trimtab.engine.prepare import prepare_adapted
from trimtab.errors import DataError
from trimtab.evaluation.prediction_files import read_predictions
from trimtab.evaluation.preference_predictions import PreferencePredictions
from trimtab.progress import Silent
from trimtab.runs import RunFolder, read_json, read_jsonl
from trimtab.study_config import build_study
from trimtab.tasks import get_task
from trimtab.tasks.examples import EncodedRows, Example
from trimtab.tasks.preference import dpo_losses, log_probabilities, refer_to
from trimtab.untuned.preference import length_margins, word_margins

TASK = get_task("preference")
PROMPTS = ["the best film", "number one", "a fine story", "weak acting and no story", "truly"]
CHOSEN = ["a joy to watch", "warm funny and wise", "superb acting"]
REJECTED = ["a dull mess", "painfully slow and loud", "the worst film of the year"]


def make_rows(count=40):
    return [
        {
            "prompt": f"{PROMPTS[number % 5]} {number}",
            "chosen": CHOSEN[number % 3],
            "rejected": REJECTED[number // 3 % 3],
        }
        for number in range(count)
    ]


@pytest.fixture
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder("llama"))


def encode(tokenizer, *rows, length=32):
    return TASK.encode(rows, tokenizer, None, length)


def test_both_answers_are_learnt_from_one_prompt(tokenizer):
    row = Row("train:1", "the best film", completion="a joy", rejected="a dull mess")
    encoded = encode(tokenizer, row, row)
    assert encoded.together == 2
    assert encoded.rows == [0, 0, 1, 1]
    chosen, rejected = encoded.examples[:2]
    assert tokenizer.decode(chosen.input_ids) == "the best film a joy [SEP]"
    assert tokenizer.decode(rejected.labels) == "a dull mess [SEP]"


def test_of_a_chat_only_the_last_turn_is_learnt(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {{ eos_token }} {% endfor %}"
        "{% if add_generation_prompt %}number {% endif %}"
    ).replace("{{ m.content }}", "{% if m.role == 'assistant' %}number {% endif %}{{ m.content }}")
    turns = [{"role": "user", "content": "the best"}, {"role": "assistant", "content": "film"},
             {"role": "user", "content": "of"}]  # fmt: skip
    row = Row("train:1", "", messages=turns, completion="the year", rejected="a mess")
    chosen, rejected = encode(tokenizer, row).examples
    assert tokenizer.decode(chosen.labels) == "the year [SEP]"
    assert tokenizer.decode(rejected.labels) == "a mess [SEP]"
    assert "film" in tokenizer.decode(chosen.input_ids)


def test_answers_that_are_cut_to_the_same_are_refused(tokenizer):
    row = Row("train:1", "film", completion="truly truly truly joy", rejected="truly truly truly mess")
    with pytest.raises(DataError, match=r"row train:1: chosen and rejected are the same in their first 4 tokens"):
        encode(tokenizer, row, length=4)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"prompt": "film", "chosen": "a joy", "rejected": "a joy"}, {}, r"rows.jsonl:21: chosen and rejected are the"),
        ({"prompt": "film", "chosen": "a joy", "rejected": ""}, {}, r"rows.jsonl:21: no text in column 'rejected'"),
        ({"prompt": "", "chosen": "a joy", "rejected": "no"}, {}, r"rows.jsonl:21: no text in column 'prompt'"),
        ({"prompt": "film", "chosen": "a", "rejected": "b"}, {"chosen_column": "choosen"}, r"did you mean 'chosen'\?"),
    ],
)
def test_bad_rows_are_told_with_their_place(tmp_path, row, settings, message):
    path = write_rows(tmp_path / "rows.jsonl", [*make_rows(20), row])
    with pytest.raises(DataError, match=message):
        prepare_data(build_study({"task": "preference", "train_data": str(path)} | settings), Silent())


def test_chats_must_share_all_but_their_last_turn(tmp_path):
    def chat(*contents):
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]

    rows = [{"chosen": chat(f"film {n}", "a joy"), "rejected": chat(f"film {n}", "a mess")} for n in range(20)]
    study = {"task": "preference", "train_data": str(tmp_path / "rows.jsonl")}
    write_rows(tmp_path / "rows.jsonl", rows)
    first = prepare_data(build_study(study), Silent()).train[0]
    assert (first.completion, first.rejected, len(first.messages)) == ("a joy", "a mess", 1)
    write_rows(tmp_path / "rows.jsonl", [*rows, {"chosen": chat("film", "a joy"), "rejected": chat("movie", "a mess")}])
    with pytest.raises(DataError, match=r"rows.jsonl:21: the chats in 'chosen' and 'rejected' must be the same up to"):
        prepare_data(build_study(study), Silent())


def test_pairs_stay_in_one_batch_and_weigh_alike():
    examples = [Example([5] * length, None, [0], [1], reference=-float(n)) for n, length in enumerate(range(3, 15))]
    collator = Collator(examples, True, 0, 0, together=2)
    plan = TrainingPlan(collator, 40, 0, 2, parts=2)
    assert sorted(pair for step in plan.steps for pair in step) == sorted([*range(6), *range(6)])
    for step in range(len(plan)):
        batch = plan[step]
        assert batch.terms == len(batch.rows) // 2
        assert sorted(batch.rows) == sorted(text for pair in plan.steps[step] for text in (2 * pair, 2 * pair + 1))
        assert batch.references.tolist() == [-float(row) for row in batch.rows]
        assert sum(part.terms for part in plan.parts(step)) == batch.terms


@pytest.mark.parametrize("packed", [True, False])
def test_the_loss_and_its_gradients_are_those_of_trl(model_folder, tmp_path, packed):
    from trl import DPOConfig, DPOTrainer

    folder = model_folder("llama", "AutoModelForCausalLM")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    settings = DPOConfig(str(tmp_path), per_device_train_batch_size=6, beta=0.3, report_to="none", use_cpu=True,
                         gradient_checkpointing=False, bf16=False, disable_dropout=True)  # fmt: skip
    trainer = DPOTrainer(base, args=settings, peft_config=adapter, train_dataset=Dataset.from_list(make_rows(6)),
                         processing_class=tokenizer)  # fmt: skip
    enliven(trainer.model)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    trained = trainable_parameters(trainer.model)
    wanted = torch.autograd.grad(theirs, list(trained.values()))

    mine = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False).eval()
    choice = choose_forward(mine, 0, 16, False)
    ours_model = get_peft_model(mine, adapter)
    choice = prepare_adapted(ours_model, choice)
    assert choice.forward.packed
    if not packed:
        use_stock_attention(mine)
        choice = choice._replace(forward=PaddedForward(mine))
    pairs = len(batch["input_ids"]) // 2
    examples = []
    for pair in range(pairs):
        for row in (pair, pairs + pair):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
            answer = batch["completion_mask"][row][batch["attention_mask"][row].bool()].tolist()
            places = [place - 1 for place, learnt in enumerate(answer) if learnt]
            examples.append(Example(ids, None, places, [ids[place + 1] for place in places]))
    encoded = EncodedRows(examples, [n // 2 for n in range(2 * pairs)], 0, 2)

    def collate(rows):
        return Collator(rows.examples, choice.forward.packed, choice.position_offset, 0, 2).collate(range(pairs))

    with torch.no_grad(), ours_model.disable_adapter():
        whole = collate(encoded)
        outputs = TASK.outputs(choice.forward, whole)
    parts = dict(zip(whole.rows, torch.split(outputs, whole.positions_by_text), strict=True))
    in_order = torch.cat([parts[row] for row in range(2 * pairs)])
    ours_parameters = trainable_parameters(ours_model)
    with torch.no_grad():
        for parameter, value in zip(ours_parameters.values(), trained.values(), strict=True):
            parameter.copy_(value)
    encoded = refer_to(encoded, log_probabilities(in_order, encoded))
    ours = get_task("preference", 0.3).loss(choice.forward, collate(encoded))
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    assert abs(float(ours.detach()) - 0.6931) > 1e-3
    for found, gradient in zip(torch.autograd.grad(ours, list(ours_parameters.values())), wanted, strict=True):
        assert torch.allclose(found, gradient, atol=1e-5 * max(1.0, float(gradient.abs().max())))


def test_a_model_that_has_not_moved_has_the_loss_of_a_coin():
    log_ratios = torch.zeros(3, 2)
    assert dpo_losses(log_ratios, 0.1).tolist() == pytest.approx([0.6931] * 3, abs=1e-4)
    assert float(dpo_losses(torch.tensor([[4.0, -4.0]]), 0.5)[0]) == pytest.approx(0.0181, abs=1e-4)


def test_baselines_see_lengths_and_words():
    rows = [Row(str(n), row["prompt"], completion=row["chosen"], rejected=row["rejected"])
            for n, row in enumerate(make_rows())]  # fmt: skip
    assert (word_margins(rows[:30], rows[30:]) > 0).all()
    shorter = [Row("1", "film", completion="no", rejected="a long answer")] * 3
    assert (length_margins(shorter, shorter) > 0).all()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("preference")
    comparison = run_here(build_study(
        {"model": str(model_folder("llama", "AutoModelForCausalLM")), "task": "preference",
         "train_data": str(write_rows(folder / "rows.jsonl", make_rows(160))), "num_train_epochs": 4,
         "tokens_per_batch": 256, "max_length_tokens": 32, "learning_rate": 5e-3, "out": str(folder / "run")}
    ))  # fmt: skip
    return RunFolder(folder / "run"), comparison


def test_a_run_learns_what_is_preferred(finished):
    _, comparison = finished
    assert comparison["primary_metric"] == "accuracy"
    systems = {system["name"]: system for system in comparison["systems"]}
    assert set(systems) == {"answer-length", "tfidf-preference", "base-model", "lora-s0"}
    tuned = systems["lora-s0"]["metrics"]
    assert tuned["accuracy"]["value"] > 0.9
    assert tuned["loss"]["value"] < systems["base-model"]["metrics"]["loss"]["value"] == pytest.approx(0.6931, abs=1e-4)
    assert systems["answer-length"]["metrics"]["loss"]["value"] is None
    assert {contrast["test"] for contrast in comparison["contrasts"]} == {"mcnemar_exact"}
    assert comparison["reload"]["passed"]


@pytest.mark.skipif(not native.has_int8(), reason="no int8 products")
def test_in_int8_both_models_round_alike(tmp_path, model_folder):
    run_here(build_study(
        {"model": str(model_folder("llama", "AutoModelForCausalLM")), "task": "preference", "precision": "int8",
         "train_data": str(write_rows(tmp_path / "rows.jsonl", make_rows(60))), "num_train_epochs": 1,
         "max_length_tokens": 32, "out": str(tmp_path / "run")}
    ))  # fmt: skip
    trial = RunFolder(tmp_path / "run").trial("lora", 0)
    assert read_json(trial.training)["precision"] == "int8"
    validated, first_step, *_ = read_jsonl(trial.history)
    for loss in (validated["validation_loss"], first_step["loss"]):
        assert loss == pytest.approx(math.log(2), abs=1e-6)


def test_combinations_are_scored_beside_the_base(finished, tmp_path):
    run, comparison = finished
    adapter, other = run.trial("lora", 0).adapter, tmp_path / "other"
    shutil.copytree(adapter, other)
    found = combine_adapters({adapter: 0.5, other: 0.5}, tmp_path / "both", "svd")
    trained = next(system["metrics"] for system in comparison["systems"] if system["name"] == "lora-s0")
    for system in found["systems"]:
        assert system["metrics"]["loss"]["value"] == pytest.approx(trained["loss"]["value"], abs=1e-4)


def test_its_predictions_and_samples_are_in_the_report(finished):
    run, _ = finished
    trial = run.trial("lora", 0)
    found = read_predictions(trial.predictions)
    assert type(found) is PreferencePredictions
    base = read_predictions(run.baseline("base-model").predictions)
    ratios = torch.from_numpy(found.log_probabilities - base.log_probabilities)
    assert (ratios[:, 0] - ratios[:, 1]).tolist() == pytest.approx(found.margins.tolist())
    assert dpo_losses(ratios, 0.1).tolist() == pytest.approx(found.losses.tolist())
    report = run.report_html.read_text()
    assert "DPO" in report
    assert next(read_jsonl(trial.samples))["prompt"] in report
