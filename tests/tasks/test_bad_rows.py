"""Bad rows of every task: one error, with the file and the row, before weights are read."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from trimtab.errors import DataError
from trimtab.estimate import estimate_job
from trimtab.progress import Silent
from trimtab.study import check_study, run_study
from trimtab.study_config import build_study

GOOD = {
    "classification": [{"text": "best film", "label": 0}, {"text": "dull mess", "label": 1}],
    "multilabel": [{"text": "best film", "labels": ["a", "b"]}, {"text": "dull mess", "labels": []}],
    "regression": [{"text": "best film", "score": 1.5}, {"text": "dull mess", "score": 2}],
    "token_classification": [{"tokens": ["best", "film"], "tags": ["O", "B-X"]}],
    "causal_lm": [{"text": "the best film of the year"}],
    "completions": [{"prompt": "the best", "completion": "film"}],
    "chats": [{"messages": [{"role": "user", "content": "best"}, {"role": "assistant", "content": "film"}]}],
    "seq2seq": [{"source": "best film", "target": "film best"}],
    "preference": [{"prompt": "the best", "chosen": "film", "rejected": "mess"}],
}
TASKS = {"completions": "causal_lm", "chats": "causal_lm"}
EMPTY = r"no text in column '{}' \(found {}\); fill or remove the row"


def write(path, kind, bad, rows=20):
    good = [GOOD[kind][number % len(GOOD[kind])] for number in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, bad]))
    return str(path)


def check(tmp_path, model, kind, **settings):
    """All that happens before weights are read."""
    study = {"task": TASKS.get(kind, kind), "model": str(model), "out": str(tmp_path / "run"), "max_length_tokens": 32}
    return estimate_job(check_study(build_study(study | settings), Silent(), claim=False))


@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [
        ("classification", {"text": " ", "label": 1}, EMPTY.format("text", "' '")),
        ("classification", {"text": "a", "label": None}, r"the label in column 'label' is missing or empty \(1 of 21"),
        ("multilabel", {"text": None, "labels": ["a"]}, EMPTY.format("text", "None")),
        ("regression", {"text": "a", "score": "high"}, "column 'score' holds 'high' where a number is needed"),
        ("regression", {"text": "a", "score": 1e999}, "column 'score' holds inf where a number is needed"),
        ("token_classification", {"tokens": ["a", "b"], "tags": ["O"]}, "2 words and 1 tags; each word needs one"),
        ("token_classification", {"tokens": ["a"], "tags": [None]}, "word 1 has no tag"),
        ("token_classification", {"tokens": [], "tags": []}, "column 'tokens' holds no list of words"),
        ("causal_lm", {"text": ""}, EMPTY.format("text", "''")),
        ("completions", {"prompt": "the best", "completion": "  "}, EMPTY.format("completion", "'  '")),
        ("completions", {"completion": "film"}, EMPTY.format("prompt", "None")),
        ("chats", {"messages": [{"role": "user", "content": "a"}]}, "column 'messages' has no turn of the assistant"),
        ("chats", {"messages": []}, "column 'messages' holds no list of turns"),
        (
            "chats",
            {"messages": [{"role": "boss", "content": "a"}]},
            r"column 'messages', turn 1: needs a role \(system",
        ),
        ("seq2seq", {"source": "best film", "target": ""}, EMPTY.format("target", "''")),
        ("seq2seq", {"source": "best film"}, EMPTY.format("target", "None")),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same answer"),
        ("preference", {"prompt": "a", "chosen": "", "rejected": "b"}, EMPTY.format("chosen", "''")),
    ],
)
def test_what_no_reader_takes(tmp_path, kind, bad, message):
    data = write(tmp_path / "rows.jsonl", kind, bad)
    with pytest.raises(DataError, match=rf"rows\.jsonl:21: {message}"):
        check(tmp_path, tmp_path / "no-model", kind, train_data=data)


@pytest.mark.parametrize(
    ("kind", "bad", "message"),
    [
        ("classification", {"text": "a", "label": 7}, r"label '7' does not occur in the training rows \(0, 1\)"),
        ("classification", {"text": "a", "label": -1}, r"label '-1' does not occur in the training rows \(0, 1\)"),
        ("multilabel", {"text": "a", "labels": ["a", "z"]}, r"label 'z' does not occur in the training rows \(a, b\)"),
        ("token_classification", {"tokens": ["a"], "tags": ["B-Z"]}, r"tag 'B-Z' does not occur .* \(B-X, O\)"),
    ],
)
def test_labels_outside_of_the_range(tmp_path, kind, bad, message):
    data = write(tmp_path / "rows.jsonl", kind, GOOD[kind][0])
    test = write(tmp_path / "test.jsonl", kind, bad, rows=4)
    with pytest.raises(DataError, match=rf"test\.jsonl:5: {message}"):
        check(tmp_path, tmp_path / "no-model", kind, train_data=data, test_data=test)


@pytest.fixture
def failing_template(model_folder, tmp_path):
    """A base whose tokenizer's chat template takes no chat of more than two turns."""
    folder = shutil.copytree(model_folder("llama", "AutoModelForCausalLM"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% if messages|length > 2 %}{{ raise_exception('two turns at most') }}{% endif %}"
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_that_the_tokenizer_cannot_take(tmp_path, model_folder, failing_template):
    """Told with the file that they came from, and its line, of whichever split they are."""
    short = {"text": "truly"}
    tokenizer = AutoTokenizer.from_pretrained(failing_template)
    tokenizer.eos_token = None  # or it would be the next one
    tokenizer.save_pretrained(failing_template)
    rows = write(tmp_path / "rows.jsonl", "causal_lm", GOOD["causal_lm"][0])
    for split in ("train", "test", "validation"):
        bad = write(tmp_path / f"{split}.jsonl", "causal_lm", short, rows=600)
        files = {"train_data": rows, f"{split}_data": bad}
        if split == "train":
            files |= {"test_data": rows, "validation_data": rows}
        with pytest.raises(DataError, match=rf"^{tmp_path}/{split}\.jsonl:601: a text of one token has no next token"):
            check(tmp_path, failing_template, "causal_lm", **files)


def test_a_template_that_fails_names_the_row(tmp_path, failing_template, monkeypatch):
    long = {"messages": GOOD["chats"][0]["messages"] * 2}
    data = write(tmp_path / "rows.jsonl", "chats", GOOD["chats"][0])
    test = write(tmp_path / "test.jsonl", "chats", long, rows=4)
    monkeypatch.setattr("trimtab.study.load_base", lambda *_, **__: pytest.fail("weights were read"))
    study = {"task": "causal_lm", "model": str(failing_template), "train_data": data, "test_data": test,
             "out": str(tmp_path / "run")}  # fmt: skip
    (tmp_path / "run").mkdir()
    earlier = tmp_path / "run" / "study.yaml"
    earlier.write_text("model: another\n")
    with pytest.raises(DataError, match=rf"^{tmp_path}/test\.jsonl:5: the tokenizer's chat template refuses this chat "
                                        r"\(two turns at most\)"):  # fmt: skip
        run_study(build_study(study), overwrite=True)
    assert earlier.read_text() == "model: another\n"
