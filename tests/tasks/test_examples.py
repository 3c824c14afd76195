"""A sample of encoded rows stays within its positions, and leaves no class out."""

import numpy as np
import pytest

from samples import labelled_rows, run_here, write_rows
from trimtab.runs import RunFolder, read_json
from trimtab.study_config import build_study
from trimtab.tasks.examples import EncodedRows, Example


def encode(labels):
    """A row for each list of labels, which its tokens tell apart."""
    examples = [Example([number], None, [0] * len(row), row) for number, row in enumerate(labels)]
    return EncodedRows(examples, list(range(len(labels))), 0)


def test_a_sample_is_drawn_from_all_rows_and_has_every_class():
    whole = encode([[0]] * 500 + [[1]] * 498 + [[2]] * 2)
    some = whole.sample(50)
    assert len(some.examples) == 50
    assert len({example.input_ids[0] for example in some.examples}) == 50
    shares = np.bincount(some.labels) / 50
    assert shares[2] > 0
    assert 0.3 < shares[0] < 0.7
    assert some.labels.tolist() == whole.sample(50).labels.tolist()
    assert whole.sample(1000) is whole


@pytest.mark.parametrize("words", [1, 7])
def test_words_count_as_positions(words):
    some = encode([[0] * words, [1] * words] * 100).sample(50)
    assert len(some.labels) == 50 // words * words
    assert set(some.labels) == {0, 1}


def test_values_and_several_labels_are_drawn():
    assert len(encode([[0.5 * number] for number in range(90)]).sample(30).labels) == 30
    marks = [[[1.0, 0.0, 1.0]]] * 88 + [[[0.0, 0.0, 1.0]], [[1.0, 1.0, 1.0]]]
    some = encode(marks).sample(30)
    assert some.labels.shape == (30, 3)
    assert some.labels.min(0).tolist() == [0.0, 0.0, 1.0]
    assert some.labels.max(0).tolist() == [1.0, 1.0, 1.0]


def test_classes_come_before_the_number_of_positions():
    tags = encode([[0] * 30] * 95 + [[0] * 29 + [tag] for tag in range(1, 6)])
    for most in (2, 40, 59):
        assert set(tags.sample(most).labels) == set(range(6))
        assert len(tags.sample(most).examples) in (5, 6)  # a rare tag's row shows the common one, too
    assert len(tags.sample(250).examples) == 250 // 30


def test_a_probe_of_fewer_rows_is_called_so(tmp_path, model_folder):
    data = write_rows(tmp_path / "rows.jsonl", labelled_rows("multilabel"))
    run_here(build_study(
        {"model": str(model_folder("bert")), "train_data": str(data), "task": "multilabel", "num_train_epochs": 1,
         "tokens_per_batch": 128, "max_length_tokens": 16, "max_probe_positions": 40, "out": str(tmp_path / "run")}
    ))  # fmt: skip
    run = RunFolder(tmp_path / "run")
    record = read_json(run.baseline("linear-probe").metrics)
    assert record["title"] == "linear probe (40 rows)"
    assert record["cost"]["train_tokens"] < read_json(run.trial("lora", 0).training)["cost"]["train_tokens"] / 2
