"""Tasks with labels: what rows become, what is scored, and whole runs on tiny models."""

import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score as entity_f1
from sklearn import metrics as reference

from samples import LABELLED_WORDS, Notes, labelled_rows, run_here, run_trimtab, save_tiny_model, write_rows
from trimtab.adapters import load_adapter
from trimtab.data import Row, prepare_data
from trimtab.errors import DataError, RowError
from trimtab.evaluation.multilabel_predictions import MultilabelPredictions
from trimtab.evaluation.prediction_files import read_predictions
from trimtab.evaluation.predictions import compute_metrics
from trimtab.evaluation.tag_predictions import TagPredictions
from trimtab.evaluation.value_predictions import ValuePredictions
from trimtab.prediction import predict_records
from trimtab.progress import Silent
from trimtab.record_files import read_records
from trimtab.runs import RunFolder, read_jsonl
from trimtab.study_config import build_study
from trimtab.tasks import get_task
from trimtab.tasks.classification import Classification, balance_classes, classification_loss


@pytest.fixture(scope="module", params=["multilabel", "regression", "token_classification"])
def finished(request, tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp(request.param)
    data = write_rows(folder / "rows.jsonl", labelled_rows(request.param))
    family = {"multilabel": "llama", "regression": "bert", "token_classification": "bert"}[request.param]
    comparison = run_here(build_study(
        {"model": str(model_folder(family)), "train_data": str(data), "task": request.param, "num_train_epochs": 4,
         "tokens_per_batch": 128, "max_length_tokens": 32, "out": str(folder / "run")}
    ))  # fmt: skip
    return request.param, RunFolder(folder / "run"), comparison


def test_a_run_ends_with_a_comparison_and_a_report(finished):
    task, run, comparison = finished
    assert comparison["reload"]["passed"]
    assert (
        comparison["primary_metric"] == {"multilabel": "f1", "regression": "rmse", "token_classification": "f1"}[task]
    )
    systems = {system["name"]: system["metrics"] for system in comparison["systems"]}
    constant, counting = {
        "multilabel": ("label-shares", "tfidf-logistic-regression"),
        "regression": ("mean-value", "tfidf-ridge-regression"),
        "token_classification": ("majority-tag", "word-tags"),
    }[task]
    assert systems.keys() == {constant, counting, "linear-probe", "untrained-head", "lora-s0"}
    metric = comparison["primary_metric"]
    sign = -1 if metric == "rmse" else 1
    assert sign * systems[counting][metric]["value"] > sign * systems[constant][metric]["value"]
    assert sign * systems["lora-s0"][metric]["value"] > sign * systems[constant][metric]["value"]
    report = run.report_html.read_text()
    assert {"multilabel": "Exact match", "regression": "Pearson", "token_classification": "whole entities"}[
        task
    ] in report
    assert "#confusion" not in report


def test_predictions_are_read_as_they_were_written(finished, tmp_path):
    _, run, comparison = finished
    for folder in run.systems():
        found = read_predictions(folder.predictions)
        system = next(one for one in comparison["systems"] if one["name"] == folder.name)
        values = compute_metrics(found)
        assert {name: score["value"] for name, score in system["metrics"].items()} == pytest.approx(values)
        found.write(tmp_path / "again.jsonl")
        assert (tmp_path / "again.jsonl").read_text() == folder.predictions.read_text()


def test_multilabel_metrics_are_scikit_learns():
    generator = np.random.default_rng(0)
    truth, probabilities = generator.random((80, 4)) < 0.3, generator.random((80, 4))
    truth[:, 3] = False
    found = compute_metrics(MultilabelPredictions(list(map(str, range(80))), list("abcd"), truth, probabilities))
    said = probabilities > 0.5
    assert found["f1"] == pytest.approx(reference.f1_score(truth, said, average="micro"))
    assert found["precision"] == pytest.approx(reference.precision_score(truth, said, average="micro"))
    assert found["recall"] == pytest.approx(reference.recall_score(truth, said, average="micro"))
    assert found["exact_match"] == pytest.approx(reference.accuracy_score(truth, said))
    assert found["f1_macro"] == pytest.approx(reference.f1_score(truth[:, :3], said[:, :3], average="macro"))
    assert found["loss"] == pytest.approx(np.mean([reference.log_loss(t, p, labels=[0, 1]) for t, p in
                                                   zip(truth.ravel()[:, None].T, probabilities.ravel()[:, None].T, strict=True)]))  # fmt: skip


def test_value_metrics_are_scikit_learns():
    generator = np.random.default_rng(0)
    truth = generator.normal(1e4, 2, 60)
    said = truth + generator.normal(0, 1, 60)
    found = compute_metrics(ValuePredictions(list(map(str, range(60))), truth, said))
    assert found["rmse"] == pytest.approx(reference.root_mean_squared_error(truth, said))
    assert found["mae"] == pytest.approx(reference.mean_absolute_error(truth, said))
    assert found["r2"] == pytest.approx(reference.r2_score(truth, said))
    assert found["pearson"] == pytest.approx(np.corrcoef(truth, said)[0, 1])
    constant = compute_metrics(ValuePredictions(list(map(str, range(60))), truth, np.full(60, truth.mean())))
    assert constant["pearson"] == 0.0
    assert constant["r2"] == pytest.approx(0.0)


def test_entities_are_counted_as_seqeval_does():
    generator = np.random.default_rng(0)
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    truth, said = ([[tags[i] for i in generator.integers(5, size=7)] for _ in range(40)] for _ in range(2))
    found = compute_metrics(TagPredictions(list(map(str, range(40))), truth, said, np.ones(40)))
    assert found["f1"] == pytest.approx(entity_f1(truth, said))
    right = [a == b for one, other in zip(truth, said, strict=True) for a, b in zip(one, other, strict=True)]
    assert found["accuracy"] == pytest.approx(np.mean(right))


def test_words_without_entities_are_judged_by_accuracy():
    assert TagPredictions(["1"], [["NOUN", "VERB"]], [["NOUN", "NOUN"]], np.ones(1)).primary_metric == "accuracy"


def test_a_word_is_read_at_its_first_token(tmp_path):
    from tokenizers.normalizers import BertNormalizer
    from transformers import AutoTokenizer

    folder = save_tiny_model("bert", tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = Row("1", "number 12 film", words=["number", "12", "film"], labels=[0, 1, 0])
    encoded = get_task("token_classification").encode([row], tokenizer, None, 32)
    (example,) = encoded.examples  # [CLS] number 1 2 film [SEP]
    assert example.positions == [1, 2, 4]
    assert encoded.truncated == 0
    short = get_task("token_classification").encode([row], tokenizer, None, 4)  # [CLS] number 1 [SEP]
    assert short.examples[0].positions == [1, 2]
    assert short.examples[0].labels == [0, 1]
    assert short.truncated == 1
    tokenizer.backend_tokenizer.normalizer = BertNormalizer(lowercase=False)  # drops signs that only direct
    unseen = Row("7", "number \u200e film", words=["number", "\u200e", "film"], labels=[0, 1, 0])
    with pytest.raises(RowError, match=r"row 7: the tokenizer gives no token for word 2, '\\u200e'; remove it"):
        get_task("token_classification").encode([unseen], tokenizer, None, 32)


def test_conll_files_are_read(tmp_path):
    path = tmp_path / "train.conll"
    path.write_text("-DOCSTART- -X- O O\n\nRome NNP B-LOC\nis VBZ O\n\n# a remark\nAnn NNP B-PER\n\n" * 8)
    data = prepare_data(
        build_study({"task": "token_classification", "train_data": str(path), "out": str(tmp_path)}), Silent()
    )
    assert data.label_names == ["B-LOC", "B-PER", "O"]
    rows = {row.text for row in data.train}
    assert rows == {"Rome is", "Ann"}


@pytest.mark.parametrize(
    ("task", "rows", "said"),
    [
        (
            "token_classification",
            [{"tokens": ["a", "b"], "tags": ["O"]}],
            r":1: 2 words and 1 tags; each word needs one",
        ),
        ("token_classification", [{"tokens": ["a"], "tags": [None]}], r":1: word 1 has no tag"),
        ("token_classification", [{"tokens": [], "tags": []}], r":1: column 'tokens' holds no list of words"),
        (
            "regression",
            [{"text": "a", "score": 1}, {"text": "b", "score": "high"}],
            r":2: column 'score' holds 'high' where",
        ),
        ("regression", [{"text": "a", "score": None}], r":1: column 'score' holds None where a number is needed"),
        ("regression", [{"text": "a", "score": 1}] * 4, "holds one value only"),
        ("multilabel", [{"text": "a", "labels": ["x"]}] * 4, "holds 1 different labels; several are needed"),
        ("multilabel", [{"text": "", "labels": ["x", "y"]}] * 4, ":1: no text in column 'text'"),
    ],
)
def test_bad_rows_are_named(tmp_path, task, rows, said):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=said):
        prepare_data(build_study({"task": task, "train_data": str(path), "out": str(tmp_path / "run")}), Silent())


def test_a_tag_that_train_does_not_have(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", labelled_rows("token_classification", 40))
    test = write_rows(tmp_path / "test.jsonl", [{"tokens": ["joy"], "tags": ["B-ODD"]}])
    study = {
        "task": "token_classification",
        "train_data": str(train),
        "test_data": str(test),
        "out": str(tmp_path / "run"),
    }
    with pytest.raises(
        DataError, match=r"test.jsonl:1: tag 'B-ODD' does not occur in the training rows \(B-MOOD, B-THING, O\)"
    ):
        prepare_data(build_study(study), Silent())


def test_several_labels_in_one_cell(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,labels\n" + "one,a;b\ntwo,\nthree,b | c\n" * 20)
    data = prepare_data(build_study({"task": "multilabel", "train_data": str(path), "out": str(tmp_path)}), Silent())
    assert data.label_names == ["a", "b", "c"]
    assert {row.text: row.labels for row in data.train} == {"one": [0, 1], "two": [], "three": [1, 2]}


def test_balanced_weights_add_up_over_parts_of_a_batch():
    labels = torch.tensor([0, 0, 0, 1])
    weights = balance_classes(labels.tolist(), 2)
    assert weights[labels].mean() == pytest.approx(1.0)
    assert weights[1] == pytest.approx(3 * weights[0])
    logits = torch.randn(4, 2)
    whole = classification_loss(logits, labels, weights)
    parts = [classification_loss(logits[part], labels[part], weights) for part in (slice(0, 3), slice(3, 4))]
    assert whole == pytest.approx(parts[0] * 0.75 + parts[1] * 0.25)
    assert Classification().class_weights is None


def test_balanced_weights_in_a_whole_run(tmp_path, model_folder):
    """One row in eight is of the rare class, and the words tell it half of the time: only weights make it worth a guess."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(320):
        label = ["common", "rare"][number % 8 == 0]
        hint = "joy" if (label == "rare" or generator.random() < 0.3) else "dull"
        rows.append(
            {
                "text": f"{hint} {generator.choice(LABELLED_WORDS[2:])} {generator.choice(LABELLED_WORDS[2:])}",
                "label": label,
            }
        )
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recalls = {}
    for weights in ("none", "balanced"):
        comparison = run_here(build_study(
            {"model": str(model_folder("bert")), "train_data": str(data), "class_weights": weights, "num_train_epochs": 2,
             "tokens_per_batch": 128, "max_length_tokens": 16, "out": str(tmp_path / weights)}
        ))  # fmt: skip
        assert comparison["reload"]["passed"]
        recalls[weights] = {system["name"]: system["metrics"]["recall"]["value"] for system in comparison["systems"]}
    for name in ("tfidf-logistic-regression", "linear-probe", "lora-s0"):
        assert recalls["balanced"][name] > recalls["none"][name], name


def test_balanced_weights_are_for_classes(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", labelled_rows("regression"))
    done = run_trimtab("run", "--task", "regression", "--train-data", path, "--class-weights", "balanced",
                       "--model", save_tiny_model("bert", tmp_path / "bert"), "--out", tmp_path / "run")  # fmt: skip
    assert done.returncode == 2
    assert "class_weights: regression has no classes to weigh" in done.stderr


def test_each_tag_has_its_probability_and_words_alone_are_read(finished, tmp_path):
    task, run, _ = finished
    if task != "token_classification":
        pytest.skip(f"{task} says no tags")
    loaded = load_adapter(run.trial("lora", 0).adapter)
    sentences = [LABELLED_WORDS[:6], ["joy"], LABELLED_WORDS * 5]  # the last is longer than 32 tokens
    (tmp_path / "new.conll").write_text("\n\n".join("\n".join(words) for words in sentences))
    told = Notes()
    records = read_records(str(tmp_path / "new.conll"))
    found = list(predict_records(loaded, records, "new.conll", progress=told))
    assert [row["words"] for row in found] == sentences
    for words, row in zip(sentences, found, strict=True):
        (alone,) = loaded.predict([" ".join(words)])
        assert (alone["words"], alone["prediction"]) == (row["words"], row["prediction"])
        read = sum(tag is not None for tag in row["prediction"])
        assert row["prediction"][read:] == row["probabilities"][read:] == [None] * (len(words) - read)
        encoded = loaded.scorer.encode([Row("1", " ".join(words), words=words, labels=[0] * len(words))])
        shares = torch.softmax(loaded.scorer.score(encoded).outputs, -1)
        wanted = [
            float(share[loaded.label_names.index(tag)]) for share, tag in zip(shares, row["prediction"], strict=False)
        ]
        assert row["probabilities"][:read] == pytest.approx(wanted, abs=1e-5)
        assert all(share >= 1 / len(loaded.label_names) for share in row["probabilities"][:read])
    assert found[2]["prediction"][-1] is None
    assert told.notes == ["1 of 3 rows are longer than 32 tokens: cut there"]


def test_new_rows_are_predicted_as_the_run_did(finished):
    task, run, _ = finished
    trial = run.trial("lora", 0)
    records = ((row, number) for number, row in enumerate(read_jsonl(run.test_rows), 1))
    found = [row["prediction"] for row in predict_records(load_adapter(trial.adapter), records, "rows")]
    wanted = [row["prediction"] for row in read_jsonl(trial.predictions)]
    assert found == (pytest.approx(wanted, abs=1e-4) if task == "regression" else wanted)
