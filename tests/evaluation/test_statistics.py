"""Metrics are scikit-learn's; tests err as often as they say; intervals cover as often as they say."""

import dataclasses
import math

import numpy as np
import pytest
from sklearn import metrics as reference

from trimtab.data import Row, write_rows
from trimtab.errors import DataError
from trimtab.evaluation.class_predictions import ClassPredictions
from trimtab.evaluation.comparison import compare_systems, compare_two, contrast, settle
from trimtab.evaluation.prediction_files import read_groups, read_predictions
from trimtab.evaluation.predictions import compute_metrics
from trimtab.evaluation.preference_predictions import PreferencePredictions
from trimtab.evaluation.statistics import (
    bootstrap_metrics,
    bootstrap_p_value,
    holm,
    mcnemar_exact,
    minimum_detectable_difference,
    percentile_interval,
    wilson_interval,
)
from trimtab.evaluation.token_predictions import TokenPredictions
from trimtab.runs import RunFolder


def make_predictions(rows=300, classes=3, skill=2.0, seed=0, labels=None, names=None):
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=rows) if labels is None else labels
    logits = generator.normal(size=(rows, classes)) + skill * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return ClassPredictions(
        [f"test:{i}" for i in range(rows)], names or [f"c{i}" for i in range(classes)], labels, probabilities
    )


def test_metrics_are_those_of_scikit_learn():
    predictions = make_predictions()
    found = compute_metrics(predictions)
    true, guessed, p = predictions.labels, predictions.predicted, predictions.probabilities
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(true, guessed))
    assert found["f1"] == pytest.approx(reference.f1_score(true, guessed, average="macro"))
    assert found["precision"] == pytest.approx(reference.precision_score(true, guessed, average="macro"))
    assert found["recall"] == pytest.approx(reference.recall_score(true, guessed, average="macro"))
    assert found["loss"] == pytest.approx(reference.log_loss(true, p))
    assert found["brier"] == pytest.approx(reference.brier_score_loss(true, p, labels=[0, 1, 2], scale_by_half=False))


def test_known_values():
    # Wilson (1927) for 81 of 100; McNemar's exact p for 8 against 2 discordant pairs is 2 * P(X >= 8).
    assert wilson_interval(81, 100) == pytest.approx((0.7222, 0.8749), abs=1e-4)
    first = np.array([True] * 8 + [False] * 2 + [True] * 40)
    second = np.array([False] * 8 + [True] * 2 + [True] * 40)
    assert mcnemar_exact(first, second) == pytest.approx(2 * sum(math.comb(10, k) for k in (8, 9, 10)) / 1024)
    assert mcnemar_exact(first, first) == 1.0
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_mcnemar_is_wrong_about_five_times_in_a_hundred():
    generator = np.random.default_rng(1)
    wrong = 0
    for _ in range(4000):
        differs = generator.random(3000) < 0.3
        first = generator.random(3000) < 0.5
        wrong += mcnemar_exact(first, first ^ differs) < 0.05
    assert 0.04 <= wrong / 4000 <= 0.06


def null_pair(generator, rows):
    """Two systems of one skill, whose errors are partly shared."""
    labels = generator.integers(2, size=rows)
    shared = generator.normal(size=rows)
    pair = []
    for _ in range(2):
        margin = 0.8 * (2 * labels - 1) + 0.7 * shared + generator.normal(size=rows)
        p = 1 / (1 + np.exp(-margin))
        pair.append(ClassPredictions(list(map(str, range(rows))), ["a", "b"], labels, np.column_stack([1 - p, p])))
    return {"first": pair[0], "second": pair[1]}


@pytest.mark.parametrize("metric", ["f1", "loss"])
def test_paired_bootstrap_under_a_true_null(metric):
    """Wrong in 4 to 6 %, and covering 93 to 97 %."""
    generator = np.random.default_rng(2)
    studies, wrong, covered = 1500, 0, 0
    for study in range(studies):
        resampled = bootstrap_metrics(null_pair(generator, 200), resamples=500, seed=study)
        differences = resampled["first"][metric] - resampled["second"][metric]
        wrong += bootstrap_p_value(differences, 200) < 0.05
        low, high = percentile_interval(differences, 200)
        covered += low <= 0 <= high
    assert 0.04 <= wrong / studies <= 0.06
    assert 0.93 <= covered / studies <= 0.97


def test_wilson_and_accuracy_difference_cover():
    generator = np.random.default_rng(3)
    hits = generator.binomial(400, 0.82, size=4000)
    covered = np.mean([low <= 0.82 <= high for low, high in (wilson_interval(int(h), 400) for h in hits)])
    assert 0.93 <= covered <= 0.97
    inside = 0
    for study in range(1000):
        resampled = bootstrap_metrics(null_pair(generator, 200), resamples=400, seed=study)
        low, high = percentile_interval(resampled["first"]["accuracy"] - resampled["second"]["accuracy"], 200)
        inside += low <= 0 <= high
    assert 0.93 <= inside / 1000 <= 0.97


def test_grouped_rows_widen_the_interval():
    labels = np.repeat(np.random.default_rng(0).integers(2, size=40), 10)
    p = np.clip(0.5 + 0.3 * np.repeat(np.random.default_rng(1).normal(size=40), 10), 0.01, 0.99)
    predictions = ClassPredictions(list(map(str, range(400))), ["a", "b"], labels, np.column_stack([1 - p, p]))
    groups = [str(i // 10) for i in range(400)]
    alone = percentile_interval(bootstrap_metrics({"x": predictions}, resamples=1000)["x"]["accuracy"], 400)
    grouped = percentile_interval(bootstrap_metrics({"x": predictions}, groups, resamples=1000)["x"]["accuracy"], 40)
    assert grouped[1] - grouped[0] > 2 * (alone[1] - alone[0])


@pytest.mark.parametrize("texts", [8, 13, 40])
def test_few_texts_are_no_more_sure_than_many(texts):
    """Perplexities of two equal language models, on so few texts that plain percentiles would be wrong in 9 to 16 %."""
    generator = np.random.default_rng(5)
    studies, wrong, covered = 1500, 0, 0
    for study in range(studies):
        tokens, hard = generator.integers(200, 3000, texts), generator.normal(3, 0.3, texts)
        systems = {name: TokenPredictions(list(map(str, range(texts))), (hard + generator.normal(0, 0.05, texts)) * tokens,
                                          tokens, tokens // 3) for name in ("first", "second")}  # fmt: skip
        resampled = bootstrap_metrics(systems, resamples=2000, seed=study)
        differences = resampled["first"]["perplexity"] - resampled["second"]["perplexity"]
        wrong += bootstrap_p_value(differences, texts) < 0.05
        low, high = percentile_interval(differences, texts)
        covered += low <= 0 <= high
    assert 0.03 <= wrong / studies <= 0.07
    assert 0.93 <= covered / studies <= 0.97


def test_one_text_shows_nothing():
    differences = np.full(500, -1.0)
    assert bootstrap_p_value(differences, 1) == 1.0
    assert percentile_interval(np.arange(5.0), 1) == (0.0, 4.0)


def test_perplexity_is_over_tokens_not_texts():
    predictions = TokenPredictions(["a", "b"], np.array([2.0, 9.0]), np.array([2, 3]), np.array([1, 0]))
    found = compute_metrics(predictions)
    assert found == pytest.approx({"perplexity": np.exp(11 / 5), "loss": 11 / 5, "token_accuracy": 1 / 5})


def test_verdicts_and_holm():
    labels = np.random.default_rng(0).integers(2, size=800)
    systems = {
        name: make_predictions(800, 2, skill, seed, labels)
        for name, skill, seed in (("tuned", 2.0, 1), ("weak", 0.3, 2), ("equal", 2.0, 3))
    }
    resampled = bootstrap_metrics(systems, resamples=2000)
    found = settle(
        [
            contrast("tuned", other, metric, systems, resampled, 800)
            for other in ("weak", "equal")
            for metric in ("accuracy", "loss")
        ]
    )
    verdicts = {(c["against"], c["metric"]): c["verdict"] for c in found}
    assert verdicts[("weak", "accuracy")] == verdicts[("weak", "loss")] == "better"
    assert verdicts[("equal", "accuracy")] == "inconclusive"
    assert all(c["p_adjusted"] >= c["p_value"] for c in found)
    weak = next(c for c in found if c["against"] == "weak" and c["metric"] == "accuracy")
    assert weak["low"] <= weak["difference"] <= weak["high"]
    backwards = settle([contrast("weak", "tuned", "loss", systems, resampled, 800)])
    assert backwards[0]["verdict"] == "worse"
    assert backwards[0]["difference"] > 0


def test_minimum_detectable_difference_has_its_power():
    """At that difference, a two-sided 5 % test of a normal estimate finds it about 80 % of the time."""
    generator = np.random.default_rng(0)
    error = 0.02
    detectable = minimum_detectable_difference(generator.normal(0, error, 100_000), 1000)
    estimates = generator.normal(detectable, error, 100_000)
    assert np.mean(np.abs(estimates) > 1.96 * error) == pytest.approx(0.8, abs=0.01)


def test_clean_metrics_leave_leaked_rows_out():
    predictions = make_predictions(100, 2)
    wrong = {predictions.ids[i] for i in np.flatnonzero(~predictions.correct)}
    record = {"name": "x", "title": "x", "kind": "tuned", "method": None, "seed": 0, "cost": {}}
    systems, contrasts = compare_systems([record], {"x": predictions}, None, wrong, 0)
    assert systems[0]["metrics"]["accuracy"]["value"] < 1.0
    assert systems[0]["metrics_clean"]["accuracy"]["value"] == 1.0
    assert contrasts == []


def test_predictions_survive_the_file_and_refuse_other_rows(tmp_path):
    predictions = make_predictions(20)
    predictions.write(tmp_path / "p.jsonl")
    read = read_predictions(tmp_path / "p.jsonl")
    np.testing.assert_array_equal(read.probabilities, predictions.probabilities)
    assert read.ids == predictions.ids
    other = make_predictions(19)
    with pytest.raises(
        DataError, match=r"one and two are not about the same rows \(20 and 19; 1 ids stand in one only\)"
    ):
        compare_two(predictions, other, ("one", "two"))
    doubtful = dataclasses.replace(predictions, labels=1 - predictions.labels)
    same = compare_two(predictions, predictions, ("one", "two"), "loss")["contrasts"][0]
    assert same["minimum_detectable_difference"] == 0  # a loss is no share of the rows
    assert compare_two(predictions, predictions, ("one", "two"))["contrasts"][0]["minimum_detectable_difference"] > 0.1
    with pytest.raises(DataError, match="one and two disagree on the labels of the same rows"):
        compare_two(predictions, doubtful, ("one", "two"))
    gaps = np.full((2, 2), np.nan)
    without = PreferencePredictions(["a", "b"], np.array([1.0, -1.0]), gaps[0], gaps)
    with pytest.raises(DataError, match="longer has no loss: it gives no probabilities; choose another --metric"):
        compare_two(without, without, ("longer", "nearer"), "loss")
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "label": "c0"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: needs id, label and probabilities"):
        read_predictions(tmp_path / "bad.jsonl")


def test_a_comparison_of_files_of_a_run_draws_its_groups_together(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim("model: any\n")
    labels = np.repeat([0, 1], 60)
    sure = make_predictions(120, 2, 9.0, labels=labels)
    doubtful = dataclasses.replace(sure, probabilities=sure.probabilities.copy())
    doubtful.probabilities[:30] = [0.1, 0.9]  # three whole groups of ten
    file = run.baseline("linear-probe").predictions
    doubtful.write(file)
    assert read_groups(file, doubtful) is None
    rows = [Row(name, "text", label=int(label)) for name, label in zip(sure.ids, labels, strict=True)]
    write_rows(run.test_rows, rows)
    assert read_groups(file, doubtful) is None
    write_rows(run.test_rows, [dataclasses.replace(row, group=f"g{n // 10}") for n, row in enumerate(rows)])
    groups = read_groups(file, doubtful)
    assert groups == [f"g{n // 10}" for n in range(120)]
    by_row, by_group = (
        compare_two(doubtful, sure, ("probe", "tuned"), "f1", drawn)["contrasts"][0] for drawn in (None, groups)
    )
    assert by_row["difference"] == by_group["difference"] > 0.2
    assert by_group["high"] - by_group["low"] > 2 * (by_row["high"] - by_row["low"])
    assert by_group["p_value"] > by_row["p_value"]
