"""Sequence to sequence: rows, states, answers and their metrics, and a T5 that learns to turn words around."""

import csv
import json
import shutil

import numpy as np
import pytest
import sacrebleu
import torch
from peft import AutoPeftModelForSeq2SeqLM
from rouge_score.rouge_scorer import RougeScorer
from transformers import AutoTokenizer

from samples import Notes, run_trimtab, save_small_t5, write_reversals, write_reviews
from trimtab import load_adapter
from trimtab.combining import combine_adapters
from trimtab.data import Row, prepare_data
from trimtab.engine.batches import Collator
from trimtab.engine.forward import EncoderDecoderForward, PaddedForward, choose_forward
from trimtab.engine.frozen import freeze_linears, set_adapter_training
from trimtab.engine.lower_precision import linears_by_place, lower_linears
from trimtab.errors import DataError, SourceError
from trimtab.evaluation.prediction_files import read_predictions
from trimtab.evaluation.predictions import compute_metrics
from trimtab.evaluation.statistics import bootstrap_metrics
from trimtab.evaluation.text_predictions import TextPredictions
from trimtab.generation import check_answers, write_answers
from trimtab.prediction import generate_records
from trimtab.progress import Silent
from trimtab.runs import RunFolder, read_json, read_jsonl
from trimtab.sampling import Sampling
from trimtab.study import check_study
from trimtab.study_config import build_study
from trimtab.tasks import get_task
from trimtab.tasks.examples import Example
from trimtab.untuned.answers import answer_by_nearest_row

TASK = get_task("seq2seq")
SETTINGS = ["--task=seq2seq", "--evaluations-per-epoch=1", "--max-validation-rows=200", "--max-test-rows=200"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_small_t5(tmp_path_factory.mktemp("t5"))


def random_examples(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for number in range(count):
        source, target = (
            torch.randint(3, 100, (length,), generator=generator).tolist()
            for length in (3 + number % 4, 2 + number % 3)
        )
        examples.append(Example(source, None, list(range(len(target))), target, [0, *target[:-1]]))
    return examples


def test_the_decoder_starts_and_ends_as_the_model_asks(t5):
    tokenizer, model = AutoTokenizer.from_pretrained(t5), torch.nn.Module()
    model.config = type("Config", (), {"decoder_start_token_id": 0})
    row = Row("train:1", "red one blue", completion="blue one red")
    example = TASK.encode([row], tokenizer, model, 8).examples[0]
    assert tokenizer.decode(example.labels) == "blue one red </s>"
    assert example.decoder_input_ids == [0, *example.labels[:-1]]
    assert example.positions == [0, 1, 2, 3]
    cut = TASK.encode([row, row], tokenizer, model, 3)
    assert cut.truncated == 2
    assert tokenizer.decode(cut.examples[0].labels) == "blue one </s>"
    assert len(cut.examples[0].input_ids) == 3


@pytest.mark.parametrize("family", ["t5", "mt5", "bart"])
def test_states_and_gradients_are_those_of_the_stock_forward(tiny_model, family):
    model = tiny_model(family, auto_class="AutoModelForSeq2SeqLM")
    if family == "bart":
        model.final_logits_bias.normal_(0, 1)
    choice = choose_forward(model, 0, 16, False)
    assert type(choice.forward) is EncoderDecoderForward
    batch = Collator(random_examples(), False, 0, 0).collate(range(7))
    decoder = model.get_decoder()
    weight = next(parameter for parameter in decoder.parameters() if parameter.ndim > 1 and len(parameter) == 32)
    weight.requires_grad_(True)
    plain = PaddedForward(model).logits(batch)
    assert torch.allclose(choice.forward.logits(batch), plain, atol=1e-5)
    stock = torch.nn.functional.cross_entropy(plain, batch.labels)
    ours = TASK.loss(choice.forward, batch)
    assert float(ours) == pytest.approx(float(stock), abs=1e-5)
    of_stock, of_ours = (torch.autograd.grad(loss, weight)[0] for loss in (stock, ours))
    assert torch.allclose(of_ours, of_stock, atol=1e-5 * float(of_stock.abs().max().clamp_min(1)))


def test_linears_of_both_stacks_are_lowered(tiny_model):
    model = tiny_model("t5", auto_class="AutoModelForSeq2SeqLM")
    freeze_linears(model)
    set_adapter_training(model, False)
    places = linears_by_place(model)
    assert sum(name.startswith("decoder.") for _, name in places) == 2 * (4 + 4 + 2)
    assert len(places) == 2 * (4 + 2) + 2 * (4 + 4 + 2)
    forward = EncoderDecoderForward(model)
    batch = Collator(random_examples(), False, 0, 0).collate(range(7))
    exact = TASK.outputs(forward, batch)
    errors = lower_linears(model, "bfloat16", lambda: TASK.outputs(forward, batch))
    assert len(errors) == len(places)
    lowered = TASK.outputs(forward, batch)
    assert not torch.equal(lowered, exact)
    assert torch.allclose(lowered[:, 0], exact[:, 0], atol=0.1)


def test_a_batch_of_sources_is_answered_as_each_alone(tiny_model, t5):
    tokenizer = AutoTokenizer.from_pretrained(t5)
    model = tiny_model("bart", auto_class="AutoModelForSeq2SeqLM", vocab_size=len(tokenizer))
    examples = [Example([3 + (number * k) % 15 for k in range(1, 2 + number)], None, [], []) for number in range(1, 7)]
    together = write_answers(model, tokenizer, examples, Sampling(6), Silent())
    alone = [write_answers(model, tokenizer, [example], Sampling(6), Silent())[0] for example in examples]
    assert together == alone
    assert any(together)


REFERENCES = ["the cat sat on the mat", "a dog barked loudly at night", "it rained", "Straße und Größe"]
WRITTEN = ["the cat sat on a mat", "the dog barked at night", "it rained ", ""]


def text_predictions(written=WRITTEN):
    numbers = np.arange(1.0, 1.0 + len(written))
    return TextPredictions([f"test:{n}" for n in range(len(written))], REFERENCES, list(written), numbers, numbers * 2)


def test_metrics_are_those_of_their_reference_packages():
    found = compute_metrics(text_predictions())
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(WRITTEN, [REFERENCES]).score)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for name in ("rouge1", "rouge2", "rougeL"):
        wanted = [scorer.score(*pair)[name].fmeasure for pair in zip(REFERENCES[:3], WRITTEN[:3], strict=True)]
        assert found[name] == pytest.approx(sum(wanted) / 4)
    assert found["exact_match"] == 0.25
    assert found["loss"] == pytest.approx(0.5)
    resampled = bootstrap_metrics({"one": text_predictions()}, resamples=50)["one"]
    generator = np.random.default_rng(0)
    rows = generator.integers(4, size=(50, 4))[7]
    wanted = sacrebleu.corpus_bleu([WRITTEN[row] for row in rows], [[REFERENCES[row] for row in rows]]).score
    assert resampled["bleu"][7] == pytest.approx(wanted)


def test_words_of_every_script_count():
    assert compute_metrics(text_predictions([*WRITTEN[:3], "Straße und größe"]))["rouge1"] > 0.75


def test_predictions_come_back_from_their_file(tmp_path):
    written = text_predictions()
    written.losses[1] = np.nan
    written.write(tmp_path / "predictions.jsonl")
    found = read_predictions(tmp_path / "predictions.jsonl")
    assert type(found) is TextPredictions
    assert (found.ids, found.references, found.written) == (written.ids, written.references, written.written)
    assert np.array_equal(found.losses, written.losses, equal_nan=True)
    (tmp_path / "predictions.jsonl").write_text('{"id": "1", "label": "a", "tokens": 2}\n')
    with pytest.raises(DataError, match=r"predictions.jsonl:1: needs id, label, prediction, loss and tokens"):
        read_predictions(tmp_path / "predictions.jsonl")


def test_the_nearest_row_answers():
    train = [Row("1", "red one blue", completion="blue one red"), Row("2", "gold two", completion="two gold")]
    assert answer_by_nearest_row(train, [Row("3", "a two of gold"), Row("4", "blue one")]) == [
        "two gold",
        "blue one red",
    ]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"source": "red", "target": ""}], {}, r"rows.jsonl:21: no text in column 'target' \(found ''\)"),
        ([{"source": "red"}], {}, r"rows.jsonl:21: no text in column 'target' \(found None\)"),
        ([{"source": "red", "target": 7}], {}, r"rows.jsonl:21: no text in column 'target' \(found 7\)"),
        ([], {"target_column": "tarjet"}, r"no column 'tarjet'; did you mean 'target'\?"),
        ([], {"target_column": "source"}, r"source and target are both column 'source'"),
    ],
)
def test_bad_rows_are_told_with_their_place(tmp_path, rows, settings, message):
    path = write_reversals(tmp_path / "rows.jsonl", 20, 0)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(DataError, match=message):
        prepare_data(build_study({"task": "seq2seq", "train_data": str(path)} | settings), Silent())


def test_a_test_set_without_targets_is_left_out(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_reversals(folder / "train.jsonl", 60, 0)
    (folder / "test.jsonl").write_text('{"source": "red one", "target": null}\n' * 20)
    data = prepare_data(build_study({"task": "seq2seq", "train_data": str(folder)}), Silent())
    assert all(row.completion for row in data.test)


def test_other_models_are_refused(tmp_path, model_folder, t5):
    rows, reviews = write_reversals(tmp_path / "rows.jsonl", 20, 0), write_reviews(tmp_path / "reviews.csv")
    study = {"task": "seq2seq", "model": str(model_folder("bert")), "train_data": str(rows)}
    with pytest.raises(
        SourceError, match="is a 'bert' model, which cannot be used for seq2seq; choose an encoder with"
    ):
        check_study(build_study(study), Silent(), claim=False)
    with pytest.raises(SourceError, match="is a 't5' model, which cannot be used for classification"):
        check_study(build_study({"model": str(t5), "train_data": str(reviews)}), Silent(), claim=False)


@pytest.fixture(scope="module")
def reversing(t5, tmp_path_factory):
    """The run in which every weight of the small T5 learns to turn words around."""
    folder = tmp_path_factory.mktemp("reversing")
    rows = write_reversals(folder / "rows.jsonl", 8000, 0)
    done = run_trimtab("run", *SETTINGS, "--model", t5, "--train-data", rows, "--method=full", "--learning-rate=3e-3",
                       "--num-train-epochs=8", "--out", folder / "run", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return RunFolder(folder / "run"), json.loads(done.stdout)


def metric(comparison, name, metric="exact_match"):
    return next(system["metrics"][metric]["value"] for system in comparison["systems"] if system["name"] == name)


def test_a_small_t5_learns_to_turn_words_around(reversing):
    run, comparison = reversing
    assert comparison["primary_metric"] == "rougeL"
    assert metric(comparison, "full-s0") >= 0.9
    assert metric(comparison, "base-model") < 0.1
    assert metric(comparison, "copied-source", "loss") is None
    assert all(contrast["verdict"] == "better" for contrast in comparison["contrasts"])
    report = run.report_html.read_text()
    assert "ROUGE-L" in report
    assert "NaN" not in run.comparison.read_text()


@pytest.fixture(scope="module")
def counting_on(reversing, tmp_path_factory):
    """LoRA on the model of the run before, for a task that has changed."""
    folder = tmp_path_factory.mktemp("counting")
    rows = write_reversals(folder / "rows.jsonl", 2000, 1, counted_on=True)
    done = run_trimtab("run", *SETTINGS, "--model", reversing[0].trial("full", 0).adapter, "--train-data", rows,
                       "--target-modules=all-linear", "--learning-rate=1e-2", "--num-train-epochs=8",
                       "--precision=int8", "--out", folder / "run", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return RunFolder(folder / "run"), json.loads(done.stdout)


def test_lora_moves_it_to_a_changed_task(counting_on):
    run, comparison = counting_on
    assert metric(comparison, "lora-s0") > metric(comparison, "base-model") + 0.6
    against_base = next(found for found in comparison["contrasts"] if found["against"] == "base-model")
    assert against_base["verdict"] == "better"
    assert comparison["reload"]["max_abs_logit_difference"] <= 1e-4
    sample = next(read_jsonl(run.trial("lora", 0).samples))
    assert list(sample) == ["id", "prompt", "truth", "base", "tuned"]
    assert sample["prompt"] in run.report_html.read_text()


def test_stock_peft_writes_the_same(counting_on):
    run, _ = counting_on
    trial = run.trial("lora", 0)
    found = read_predictions(trial.predictions)
    facts = read_json(trial.facts_in(trial.adapter))
    model = AutoPeftModelForSeq2SeqLM.from_pretrained(trial.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(trial.adapter)
    texts = [row["text"] for row in read_jsonl(run.test_rows)]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=facts["max_new_tokens"], do_sample=False)
    assert tokenizer.batch_decode(written, skip_special_tokens=True) == found.written


def test_combinations_write_answers_too(counting_on, tmp_path):
    run, comparison = counting_on
    adapter, other = run.trial("lora", 0).adapter, tmp_path / "other"
    shutil.copytree(adapter, other)
    lines = [{"source": row["text"], "target": row["completion"]} for row in read_jsonl(run.test_rows)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = combine_adapters({adapter: 1.0, other: 0.0}, tmp_path / "both", "linear", data=str(rows))
    assert [system["name"] for system in found["systems"]][-1] == "combined"
    assert found["systems"][0]["metrics"]["exact_match"]["value"] == metric(comparison, "lora-s0")


def test_virtual_tokens_stand_before_a_source_while_it_is_answered(t5, tmp_path):
    rows = write_reversals(tmp_path / "rows.jsonl", 120, 0)
    done = run_trimtab("run", *SETTINGS, "--model", t5, "--train-data", rows, "--method=prompt_tuning",
                       "--num-train-epochs=2", "--out", tmp_path / "run", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reload"]["passed"]


def test_new_sources_are_answered_as_the_run_did(counting_on, tmp_path):
    run, _ = counting_on
    adapter = run.trial("lora", 0).adapter
    done = run_trimtab(
        "predict", adapter, "--input", run.test_rows, "--text-column", "text", "--out", tmp_path / "new.csv"
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "new.csv").open(newline="") as file:
        found = [row["prediction"] for row in csv.DictReader(file)]
    assert found == read_predictions(run.trial("lora", 0).predictions).written


def test_long_sources_are_cut_as_in_training_and_told(counting_on):
    """`generate` and `predict` answer the same: a source's last token, most often the end of the text, is read."""
    loaded = load_adapter(counting_on[0].trial("lora", 0).adapter)
    loaded.scorer.max_length_tokens = 3
    texts, heard = ["one red two blue", "gold two"], Notes()
    said = [record["prediction"] for record in loaded.predict(texts)]
    records = [({"source": text}, line) for line, text in enumerate(texts, 1)]
    found = list(generate_records(loaded, records, "rows", text_column="source", progress=heard))
    assert [record["generated"] for record in found] == said
    assert said[0] == loaded.predict(["one red blue"])[0]["prediction"]  # whose last token is the whole's
    assert heard.notes == ["1 of 2 rows are longer than 3 tokens: cut there"]


def test_more_new_tokens_than_a_decoder_has_positions_are_refused(tiny_model):
    check_answers(tiny_model("bart", auto_class="AutoModelForSeq2SeqLM"), 128)
    check_answers(tiny_model("t5", auto_class="AutoModelForSeq2SeqLM"), 5000)  # whose positions are relative
    with pytest.raises(
        DataError, match=r"129 new tokens are more than the 128 positions of this model's decoder; lower"
    ):
        check_answers(tiny_model("bart", auto_class="AutoModelForSeq2SeqLM"), 129)
