"""New rows: streamed through an adapter, in every format, and as the run predicted them."""

import contextlib
import csv
import io
import json
import random
import re
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

import trimtab
from samples import Notes, run_here, run_trimtab, tiny_config, write_reviews
from trimtab.data import reading
from trimtab.engine.fused import native
from trimtab.errors import AdapterError, DataError, SourceError
from trimtab.prediction import predict_records
from trimtab.record_files import ROWS_AT_ONCE, read_records, write_records
from trimtab.runs import RunFolder, read_jsonl
from trimtab.study_config import build_study

WORDS = [
    "a",
    "joy",
    "to",
    "watch",
    "warm",
    "funny",
    "wise",
    "best",
    "worst",
    "film",
    "superb",
    "dull",
    "slow",
    "loud",
    "weak",
    "fine",
    "story",
    "year",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("prediction")
    run_here(build_study(
        {"model": str(model_folder("bert")), "train_data": str(write_reviews(folder / "reviews.csv")), "num_train_epochs": 2,
         "tokens_per_batch": 256, "max_length_tokens": 32, "out": str(folder / "run")}
    ))  # fmt: skip
    return RunFolder(folder / "run")


@pytest.fixture(scope="module")
def loaded(finished):
    return trimtab.load_adapter(finished.trial("lora", 0).adapter)


@pytest.fixture(scope="module")
def rows(finished):
    """Texts of the run's test rows, and what it predicted for them."""
    texts = [row["text"] for row in read_jsonl(finished.test_rows)]
    return texts, list(read_jsonl(finished.trial("lora", 0).predictions))


def test_a_file_is_predicted_as_the_run_did(finished, rows, tmp_path):
    texts, wanted = rows
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["number", "text"], *enumerate(texts)])
    adapter = finished.trial("lora", 0).adapter
    done = run_trimtab("predict", adapter, "--input", tmp_path / "new.csv", "--out", tmp_path / "found.jsonl")
    assert done.returncode == 0, done.stderr
    found = list(read_jsonl(tmp_path / "found.jsonl"))
    assert [row["number"] for row in found] == [str(number) for number in range(len(texts))]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["prediction"] == theirs["prediction"]
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)


def test_columns_are_those_that_it_was_trained_on(tmp_path, model_folder):
    """A second text is never left out without a word, and no other column is taken for the text."""
    lines = [line.split(",") for line in write_reviews(tmp_path / "r.csv", 60).read_text().splitlines()[1:]]
    rows = [
        {"title": "x", "premise": " ".join(cells[:-1]), "hypothesis": "good", "label": cells[-1]} for cells in lines
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_here(build_study(
        {"model": str(model_folder("bert")), "train_data": str(tmp_path / "pairs.jsonl"), "text_column": "premise",
         "text_pair_column": "hypothesis", "max_length_tokens": 32, "out": str(tmp_path / "run")}
    ))  # fmt: skip
    run = RunFolder(tmp_path / "run")
    loaded, wanted = (
        trimtab.load_adapter(run.trial("lora", 0).adapter),
        list(read_jsonl(run.trial("lora", 0).predictions)),
    )
    records = [
        {"title": "y", "premise": row["text"], "hypothesis": row["text_pair"]} for row in read_jsonl(run.test_rows)
    ]
    for ours, theirs in zip(predict_records(loaded, ((record, 1) for record in records), "rows"), wanted, strict=True):
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-5)
    with pytest.raises(DataError, match="rows:1: no column 'hypothesis'; its columns are: premise"):
        list(predict_records(loaded, [({"premise": "a joy"}, 1)], "rows"))


@pytest.mark.skipif(not native.has_int8(), reason="no int8 instructions here: auto is float32")
def test_auto_says_the_labels_of_float32_from_int8(finished):
    loaded = trimtab.load_adapter(finished.trial("lora", 0).adapter)
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(2, 12))) for _ in range(ROWS_AT_ONCE + 300)]
    told = Notes()

    def predict(precision):
        records = (({"text": text}, number) for number, text in enumerate(texts, 1))
        return list(predict_records(loaded, records, "texts", precision=precision, progress=told))

    exact, rounded = predict("float32"), predict("int8")
    assert predict("float32") == exact != rounded  # whatever format it was left in
    predict("int8")
    quick = predict("auto")
    assert [row["prediction"] for row in quick] == [row["prediction"] for row in exact]
    assert any(a["probabilities"] != b["probabilities"] for a, b in zip(exact, rounded, strict=True))
    again = sum(ours["probabilities"] == theirs["probabilities"] for ours, theirs in zip(exact, quick, strict=True))
    said = re.search(r"(\d+) of 812 rows were computed in float32 as well", told.notes[-1])
    assert 0 < again <= int(said[1]) < 812
    assert predict("float32") == exact


def test_standard_input_and_output(finished):
    command = [sys.executable, "-m", "trimtab", "predict", str(finished.trial("lora", 0).adapter), "--quiet"]
    done = subprocess.run(command, input="a joy to watch\n\na dull mess\n", capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["text"], row["prediction"]) for row in found] == [("a joy to watch", "good"), ("a dull mess", "bad")]
    lines = io.BytesIO(b'{"text": "a joy"}\n{"text": "a mess"}\n')
    assert [record for record, _ in read_records("-", lines)] == [{"text": "a joy"}, {"text": "a mess"}]
    with pytest.raises(DataError, match="standard input holds no rows"):
        list(read_records("-", io.BytesIO(b"\n")))


@pytest.fixture(scope="module", params=["bert", "mpnet", "llama"])
def plain(request, tmp_path_factory, model_folder):
    """An adapter of stock peft on weights of usual sizes, whose texts are packed, padded (MPNet), or read at their end.

    A probe's large weights on a random model's small features would magnify rounding a thousand times.
    """
    folder = tmp_path_factory.mktemp(request.param)
    base = shutil.copytree(model_folder(request.param), folder / "base")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(request.param, num_labels=3))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(base)
    targets = {"bert": ["query", "value"], "mpnet": ["q", "v"], "llama": ["q_proj", "v_proj"]}[request.param]
    config = LoraConfig(task_type="SEQ_CLS", target_modules=targets, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")
    return trimtab.load_adapter(folder / "adapter", str(base), progress=Notes())


@pytest.mark.parametrize("precision", ["float32", "int8", "auto"])
def test_a_batch_gives_what_each_alone_gives(plain, precision):
    """In float32 to 1e-5; in other formats the same labels, as a padded layer's scale in int8 is its batch's."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=1 + number % 14)) for number in range(40)]
    told = Notes()
    records = (({"text": text}, number) for number, text in enumerate(texts, 1))
    together = list(predict_records(plain, records, "rows", precision=precision, progress=told))
    assert len({row["prediction"] for row in together}) > 1
    assert any("scoring in int8" in note for note in told.notes) or precision != "int8"
    for text, found in zip(texts, together, strict=True):
        if precision == "int8":  # the same layers in int8: which of them are is seen on the first rows
            (alone,) = plain.predict([text])
        else:
            alone = next(predict_records(plain, [({"text": text}, 1)], "rows", precision=precision))
        assert alone["prediction"] == found["prediction"]
        if precision == "float32":
            assert alone["probabilities"] == pytest.approx(found["probabilities"], abs=1e-5)


def test_rows_are_taken_as_they_are_needed(loaded):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield {"text": "a joy to watch"}, taken

    found = predict_records(loaded, endless(), "rows")
    for _ in range(ROWS_AT_ONCE + 1):
        next(found)
    assert taken == 2 * ROWS_AT_ONCE


def test_tables_have_a_column_for_each_probability(loaded, rows, tmp_path):
    texts, wanted = rows
    for name in ("found.csv", "found.parquet"):
        records = predict_records(loaded, (({"text": text}, n) for n, text in enumerate(texts)), "rows")
        assert write_records(records, str(tmp_path / name)) == len(texts)
    with (tmp_path / "found.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert list(cells[0]) == ["text", "prediction", "probability_bad", "probability_good"]
    table = pq.read_table(tmp_path / "found.parquet").to_pylist()
    for row, cell, theirs in zip(table, cells, wanted, strict=True):
        assert row["prediction"] == cell["prediction"] == theirs["prediction"]
        assert row["probability_good"] == pytest.approx(theirs["probabilities"]["good"], abs=1e-5)
    with pytest.raises(DataError, match=r"found.txt: format not known by its name; use jsonl, csv, parquet"):
        write_records([], str(tmp_path / "found.txt"))


@pytest.mark.parametrize(
    ("record", "column", "message"),
    [
        ({"text": ""}, None, r"rows:7: no text in column 'text' \(found ''\)"),
        ({"text": "a joy"}, "txt", r"rows:7: no column 'txt'; did you mean 'text'\?"),
        ({"number": 3}, None, r"rows:7: no column 'text'; its columns are: number"),
    ],
)
def test_bad_rows_are_told_with_their_line_and_leave_no_file(loaded, tmp_path, record, column, message):
    records = predict_records(loaded, [({"text": "a joy"}, 6), (record, 7)], "rows", text_column=column)
    with pytest.raises(DataError, match=message if column is None else r"no column 'txt'"):
        write_records(records, str(tmp_path / "found.jsonl"))
    assert not list(tmp_path.iterdir())


def test_the_base_alone_says_something_else(finished, loaded, rows):
    texts, _ = rows
    done = run_trimtab(
        "predict", loaded.path, "--input", finished.test_rows, "--adapter", "none", "--text-column", "text"
    )
    assert done.returncode == 0, done.stderr
    alone = [json.loads(line)["probabilities"]["good"] for line in done.stdout.splitlines()]
    with loaded.disable():
        assert [row["probabilities"]["good"] for row in loaded.predict(texts)] == pytest.approx(alone, abs=1e-3)
    tuned = [row["probabilities"]["good"] for row in loaded.predict(texts)]
    assert max(abs(a - b) for a, b in zip(tuned, alone, strict=True)) > 0.01


def test_it_writes_no_text(loaded):
    with pytest.raises(AdapterError, match="is a classification adapter, which says labels and writes nothing"):
        loaded.generate(["a joy"])


def test_rows_of_a_pipe_are_answered_as_they_arrive_and_an_interruption_says_what_is_left(finished):
    command = [sys.executable, "-m", "trimtab", "predict", str(finished.trial("lora", 0).adapter), "--quiet"]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell's job in the background ignores interruptions, and so would all that it starts.
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, text=True, **streams, **heed) as process:
        for text in ("a joy to watch", "a dull mess"):
            process.stdin.write(text + "\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["text"] == text  # would wait for ever
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait() == 130
    assert told == (
        "trimtab: interrupted; a file or folder of --out is written whole or not at all: give the same command again\n"
    )


@pytest.mark.parametrize(
    ("command", "left"),
    [("run", "; what was finished is kept: the same command goes on from there"), ("doctor", "")],
)
def test_what_an_interruption_leaves_is_told_by_command(monkeypatch, capsys, command, left):
    from trimtab.cli.application import main

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.cli.studies.resolve", interrupt)
    monkeypatch.setattr("trimtab.machine.set_threads", interrupt)
    monkeypatch.setattr(sys, "argv", ["trimtab", command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith(f"trimtab: interrupted{left}\n")


def test_a_closed_pipe_is_no_traceback(finished, tmp_path):
    (tmp_path / "many.jsonl").write_text('{"text": "a joy to watch"}\n' * 2000)
    command = [sys.executable, "-m", "trimtab", "predict", str(finished.trial("lora", 0).adapter), "--quiet", "--input",
               str(tmp_path / "many.jsonl")]  # fmt: skip
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert json.loads(process.stdout.readline())["text"] == "a joy to watch"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "gone.jsonl", "--out", "found.jsonl"], "no data file at 'gone.jsonl'"),
        (["--input", "latin.csv", "--out", "found.jsonl"], "latin.csv: not UTF-8 in line 2 (byte 0xe9); save it as UTF-8"),
        (["--input", "good.csv", "--out", "found.txt"], "found.txt: format not known by its name"),
        (["--input", "good.csv", "--format", "parquet"], "Parquet is no stream of text; give a file"),
    ],
)  # fmt: skip
def test_faults_of_the_input_are_told_before_anything_is_loaded(tmp_path, arguments, message):
    (tmp_path / "latin.csv").write_bytes("text\ncafé\n".encode("latin-1"))
    (tmp_path / "good.csv").write_text("text\na joy\n")
    done = run_trimtab("predict", "no-adapter", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"trimtab: {message}")
    assert done.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"latin.csv", "good.csv"}


def test_an_input_that_breaks_off_is_not_blamed_on_the_output(loaded, tmp_path, monkeypatch):
    (tmp_path / "new.jsonl").write_text("x")

    def breaking(path):
        yield '{"text": "a joy"}\n'
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reading, "_open_text", lambda path: contextlib.nullcontext(breaking(path)))
    records = predict_records(loaded, read_records(str(tmp_path / "new.jsonl")), "new.jsonl")
    with pytest.raises(SourceError, match=r"new\.jsonl cannot be read \(Input/output error\)"):
        write_records(records, str(tmp_path / "found.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["new.jsonl"]


def test_columns_that_are_replaced_and_rows_that_are_cut_are_told_once(loaded):
    told = Notes()
    rows = [{"text": "a joy " * (40 if number % 100 == 0 else 1), "prediction": "mine"} for number in range(700)]
    found = list(predict_records(loaded, ((row, 1) for row in rows), "rows", progress=told))
    assert {row["prediction"] for row in found} <= {"good", "bad"}
    assert told.notes == [
        "what the adapter says replaces columns of the input: 'prediction'; rename them to keep both",
        "7 of 700 rows are longer than 32 tokens: cut there",
    ]
    list(predict_records(loaded, ((row, 1) for row in rows), "rows", precision="auto", progress=told))
    assert told.notes[-1] == "7 of 700 rows are longer than 32 tokens: cut there"
    told.notes.clear()
    list(predict_records(loaded, [(found[1], 1)], "rows", progress=told))  # the same again: nothing is lost
    list(predict_records(loaded, [({"text": "a joy", "words": 3}, 1)], "rows", progress=told))
    assert told.notes == []
