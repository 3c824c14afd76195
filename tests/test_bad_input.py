"""Bad input: one clear line, exit 2, before weights are loaded, and nothing lost."""

import bz2
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from samples import run_trimtab, write_reviews
from trimtab.data import prepare_data
from trimtab.errors import DataError, InputError, RunFolderError, SourceError, StudyError
from trimtab.progress import Silent
from trimtab.runs import RunFolder
from trimtab.study import check_study
from trimtab.study_config import build_study, resolve_study


def check(tmp_path, model="", **settings):
    """Everything that `trimtab run` does before it reads weights."""
    defaults = {"model": str(model or tmp_path / "no-model"), "train_data": str(tmp_path / "reviews.csv"),
                "out": str(tmp_path / "run")}  # fmt: skip
    return check_study(build_study(defaults | settings), Silent())


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(40)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", "", r"empty\.csv: the file is empty"),
        ("header.csv", "text,label\n", r"header\.csv: the file holds no rows"),
        ("broken.jsonl", lines(*GOOD[:3]) + '{"text": "x", "label\n', r"broken\.jsonl:4: not valid JSON \(.*fix or remove"),
        ("list.jsonl", lines(*GOOD[:2]) + "[1, 2]\n", r"list\.jsonl:3: expected a JSON object on each line, found list"),
        ("fields.csv", 'text,label\n"a, b",x\na,b,c\n', r"fields\.csv:3: 3 fields where the header has 2 \(text, label\)"),
        ("quotes.csv", 'text,label\na,x\n"a"b,x\n', r"quotes\.csv:3: not valid CSV"),
        ("many.csv", 'text,label\n"two\nlines",x\na,b,c\n', r"many\.csv:4: 3 fields"),
        ("open.csv", 'text,label\na,x\n"never closed,x\n', r"open\.csv:3: not valid CSV \(unexpected end of data\)"),
        ("latin.csv", "text,label\ncafé,x\n".encode("latin-1"), r"latin\.csv: not UTF-8 .*save it as UTF-8"),
        ("twice.csv", "text,text\na,b\n", r"twice\.csv:1: two columns have the same name"),
        ("cut.csv.bz2", bz2.compress(b"text,label\n" * 500)[:-9], r"cut\.csv\.bz2: the compressed file is damaged or cut off"),
        ("fake.parquet", "no parquet", r"fake\.parquet: not a Parquet file"),
        ("no_text.jsonl", lines({"a": 1, "label": 2}), r"no column looks like the text; its columns are: a, label; name one with --text-column"),
        ("no_label.jsonl", lines({"text": "a", "b": 2}), r"no column looks like the label; its columns are: text, b"),
        ("unlabelled.jsonl", lines(*GOOD, {"text": "x", "label": None}, {"text": "y", "label": " "}),
         r"unlabelled\.jsonl:41: the label in column 'label' is missing or empty \(2 of 42 rows, this is the first\)"),
        ("one.jsonl", lines(*({"text": f"t{i}", "label": "a"} for i in range(9))), r"holds one class only \('a'\)"),
        ("classes.jsonl", lines(*({"text": f"t{i}", "label": i} for i in range(9))), r"9 classes in 9 rows"),
        ("blank.jsonl", lines(*GOOD, {"text": "  ", "label": "a"}), r"blank\.jsonl:41: no text in column 'text'"),
        ("nobody.jsonl", lines({"text": "z", "label": "a", "author": None}, *GOOD), r"nobody\.jsonl:1: no group in column 'author'; fill it"),
        ("rare.jsonl", lines(*GOOD, {"text": "z", "label": "rare"}), r"too few rows of the rarest class \(1\) to cut a test split"),
    ],
)  # fmt: skip
def test_faulty_files(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        check(tmp_path, train_data=path, group_column="author" if "author" in message else None)
    assert not (tmp_path / "run").exists()


def test_missing_file_and_unknown_format(tmp_path):
    with pytest.raises(SourceError, match=r"no data file or folder at '.*gone\.csv' \(looked in .*check the path"):
        check(tmp_path, train_data=str(tmp_path / "gone.csv"))
    with pytest.raises(SourceError, match=r"notes\.docx: format not known by its name; use \.csv"):
        check(tmp_path, train_data=write(tmp_path / "notes.docx", "x"))
    for name in ("wikimedia/wikipedia:20231101.en", "owner/name@v1.0"):
        with pytest.raises(
            SourceError, match=f"data '{name}' is neither a file or folder here nor to be had from the Hub"
        ):
            check(tmp_path, train_data=name)


def test_named_column_is_missing(tmp_path, reviews):
    with pytest.raises(DataError, match=r"no column 'txt'; did you mean 'text'\?; its columns are: text, label"):
        check(tmp_path, text_column="txt")
    with pytest.raises(DataError, match=r"no column 'film'.*set --group-column"):
        check(tmp_path, group_column="film")


def test_test_label_unseen_in_train(tmp_path, reviews):
    test = write(tmp_path / "test.jsonl", lines({"text": "a", "label": "good"}, {"text": "b", "label": "ugly"}))
    with pytest.raises(
        DataError, match=r"test\.jsonl:2: label 'ugly' does not occur in the training rows \(bad, good\)"
    ):
        check(tmp_path, test_data=test)


def test_fewer_rows_than_classes(tmp_path):
    rows = [{"text": f"row {i}", "label": f"c{i % 6}"} for i in range(120)]
    with pytest.raises(DataError, match=r"5 training rows for 6 classes; raise --max-train-rows"):
        check(tmp_path, train_data=write(tmp_path / "six.jsonl", lines(*rows)), max_train_rows=5)


def test_training_file_as_test_file(tmp_path, reviews):
    with pytest.raises(DataError, match=r"test_data is the training file itself"):
        check(tmp_path, test_data=str(reviews))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lorra"}, r"unknown method 'lorra'; did you mean 'lora'\?; there are: lora"),
        ({"model": "starter:smolm2-135m"}, r"unknown model starter 'starter:smolm2-135m'; did you mean 'smollm2-135m'\?"),
        ({"model": "starter:rotten-tomatoes"}, r"unknown model starter"),
        ({"model": "nobody/nothing"}, r"neither a folder here nor in the Hub cache, and HF_HUB_OFFLINE is set"),
        ({"model": "./nowhere"}, r"no model folder at './nowhere'; give a folder with config.json and weights"),
        ({"train_data": "starter:tomatoes"}, r"unknown data starter 'starter:tomatoes'; did you mean 'rotten-tomatoes'\?"),
    ],
)  # fmt: skip
def test_unknown_names(tmp_path, reviews, settings, message):
    with pytest.raises(InputError, match=message):
        check(tmp_path, **settings)
    assert not (tmp_path / "run").exists()


def test_model_folders_that_cannot_be_used(tmp_path, reviews, model_folder):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("bert"), folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has a config\.json but no weights"):
        check(tmp_path, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"config\.json is not valid JSON"):
        check(tmp_path, folder)
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"has no config\.json, so it is not a model folder"):
        check(tmp_path, folder)


@pytest.mark.parametrize("kind", ["bert", "nobody-knows"])
def test_code_that_comes_with_a_model_is_neither_run_nor_asked_for(kind, tmp_path, reviews, model_folder, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("bert"), folder)
    marker = tmp_path / "was-run"
    (folder / "configuration_own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: ...\n")
    config = json.loads((folder / "config.json").read_text())
    classes = {
        "AutoConfig": "configuration_own.Config",
        "AutoModelForSequenceClassification": "configuration_own.Config",
    }
    (folder / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": classes}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    if kind == "bert":  # transformers' own class serves
        check(tmp_path, folder)
    else:
        with pytest.raises(SourceError, match=r"its config cannot be used: .*custom code"):
            check(tmp_path, folder)
    assert not marker.exists()


def test_a_head_that_is_not_known(tmp_path, reviews):
    from transformers import XLNetConfig, XLNetModel

    XLNetModel(XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=32)).save_pretrained(tmp_path / "m")
    with pytest.raises(SourceError, match=r"m cannot be used: XLNetForSequenceClassification has no linear head"):
        check(tmp_path, tmp_path / "m", target_modules="all-linear")
    assert not (tmp_path / "run").exists()


def test_target_modules_that_the_model_lacks(tmp_path, reviews, model_folder):
    with pytest.raises(StudyError, match=r"no layer is called 'q_prj'.*`auto` finds"):
        check(tmp_path, model_folder("llama"), target_modules="q_prj,v_proj")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lerning_rate": 1}, r"unknown setting 'lerning_rate'; did you mean 'learning_rate'\?"),
        ({"r": 0}, r"r: Input should be greater than or equal to 1; received 0"),
        ({"learning_rate": -1.0}, r"learning_rate: .*'auto' or a positive number"),
        (
            {"task": "translation"},
            r"task: Input should be 'classification', .* or 'preference'; received 'translation'",
        ),
        ({"precision": "int4"}, r"precision: Input should be 'float32'"),
        ({"num_train_epochs": 0}, r"num_train_epochs: Input should be greater than 0"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(StudyError, match=message):
        build_study(settings)


def test_study_files_that_cannot_be_read(tmp_path):
    with pytest.raises(StudyError, match=r"no study file at"):
        resolve_study(tmp_path / "gone.yaml", {})
    with pytest.raises(StudyError, match=r"bad\.yaml: not valid YAML"):
        resolve_study(Path(write(tmp_path / "bad.yaml", "model: [1,\nx")), {})
    with pytest.raises(StudyError, match=r"expected `setting: value` lines, found list"):
        resolve_study(Path(write(tmp_path / "list.yaml", "- a")), {})


def test_run_folder_with_another_study(tmp_path, reviews, model_folder):
    model = model_folder("bert")
    check(tmp_path, model)
    kept = (tmp_path / "run" / "study.yaml").read_text()
    check(tmp_path, model)  # the same study goes on
    with pytest.raises(RunFolderError, match=r"already holds another study \(seed: was 0, now 1\).*--overwrite"):
        check(tmp_path, model, seed=1)
    assert (tmp_path / "run" / "study.yaml").read_text() == kept
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "thesis.txt", "precious")
    with pytest.raises(RunFolderError, match=r"is not empty and holds no study\.yaml"):
        check(tmp_path, model, out=str(tmp_path / "other"))
    with pytest.raises(RunFolderError, match=r"is a file; give another --out"):
        check(tmp_path, model, out=str(reviews))


def test_overwriting_a_run_leaves_what_is_not_of_a_run(tmp_path):
    run = RunFolder(tmp_path)
    for path in (run.study, run.comparison, run.trial("lora", 0).predictions, run.baseline("majority-class").metrics):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("model: another\n")
    write(tmp_path / "train.csv", "precious")
    run.claim("model: new\n", overwrite=True)
    assert run.study.read_text() == "model: new\n"
    assert {path.name for path in tmp_path.iterdir()} == {"study.yaml", "train.csv"}


def test_no_space_left(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user cannot mount a small file system")
    try:
        with pytest.raises(RunFolderError, match=r"no space left for .*: [01] MiB free, 64 MiB needed"):
            RunFolder(small / "run").claim("a: 1\n")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_command_exits_with_2_and_one_line(tmp_path, reviews):
    done = run_trimtab("run", "--train-data", reviews, "--method", "lorra", alone=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("trimtab: unknown method 'lorra'; did you mean 'lora'?")
    assert "Traceback" not in done.stderr
    done = run_trimtab("run", "--lerning-rate", "1")
    assert done.returncode == 2
    assert "--learning-rate" in done.stderr
    done = run_trimtab("run", "--train-data", reviews, "--method-options", "r=[1")
    assert done.returncode == 2
    assert "method_options: r=[1 is not YAML" in done.stderr
    done = run_trimtab("compare", reviews, tmp_path / "gone.jsonl")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_hub_data_set_that_cannot_be_had():
    study = build_study({"train_data": "nobody/nothing:config"})
    with pytest.raises(
        SourceError, match=r"neither a file or folder here nor to be had from the Hub: HF_HUB_OFFLINE is set"
    ):
        prepare_data(study, Silent())


def test_reviews_fixture_is_good(tmp_path):
    study = build_study({"train_data": str(write_reviews(tmp_path / "reviews.csv"))})
    assert prepare_data(study, Silent()).label_names == ["bad", "good"]
