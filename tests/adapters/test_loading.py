"""Adapters loaded again: wherever they lie, whoever saved them, and not at all where their files are not right."""

import json
import pickle
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import trimtab
from samples import Notes, run_here, write_reviews
from trimtab.adapters.files import check_config, check_folder, write_facts
from trimtab.data import Row, read_rows
from trimtab.errors import AdapterError, SourceError
from trimtab.evaluation.evaluate import make_scorer
from trimtab.models import load_base
from trimtab.progress import Silent
from trimtab.runs import RunFolder
from trimtab.study_config import build_study

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("adapters")
    run_here(build_study(
        {"model": str(model_folder("llama")), "train_data": str(write_reviews(folder / "reviews.csv")), "num_train_epochs": 1,
         "tokens_per_batch": 256, "max_length_tokens": 32, "out": str(folder / "run")}
    ))  # fmt: skip
    return RunFolder(folder / "run")


@pytest.fixture
def adapter(finished, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(finished.trial("lora", 0).adapter, tmp_path / "adapter")


def scores(loaded, rows):
    return loaded.scorer.score(loaded.scorer.encode(rows)).outputs


def test_a_moved_folder_finds_its_base_and_scores_as_before(finished, adapter):
    loaded = trimtab.load_adapter(adapter)
    trained = load_file(finished.trial("lora", 0).logits)["logits"]
    assert loaded.label_names == ["bad", "good"]
    assert float((scores(loaded, read_rows(finished.test_rows)) - trained).abs().max()) <= 1e-4


def test_a_moved_base_is_named_and_verified(finished, adapter, model_folder, tmp_path):
    moved = shutil.copytree(model_folder("llama"), tmp_path / "base")
    write_facts(adapter, json.loads((adapter / "trimtab.json").read_text()) | {"base": str(tmp_path / "gone")})
    with pytest.raises(SourceError, match="gone"):
        trimtab.load_adapter(adapter)
    assert trimtab.load_adapter(adapter, base=str(moved)).scorer.base.model is not None
    weights = load_file(moved / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="is not the base of"):
        trimtab.load_adapter(adapter, base=str(moved))


def test_the_base_alone_gives_what_it_gave_before(finished, adapter):
    loaded = trimtab.load_adapter(adapter)
    rows = read_rows(finished.test_rows)
    tuned = scores(loaded, rows)
    with loaded.disable():
        alone = scores(loaded, rows)
    assert not torch.allclose(tuned, alone, atol=1e-3)
    assert torch.equal(scores(loaded, rows), tuned)


@pytest.fixture
def stock(model_folder, tmp_path):
    """An adapter that peft saved by itself, and what it gives for two texts."""
    base = AutoModelForSequenceClassification.from_pretrained(model_folder("llama"), num_labels=3)
    base.config.pad_token_id = 0
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "stock")
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    texts = ["a joy to watch", "a dull mess truly truly"]
    with torch.no_grad():
        wanted = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return tmp_path / "stock", texts, wanted


def test_an_adapter_of_stock_peft_loads_with_a_warning(stock):
    folder, texts, wanted = stock
    heard = Notes()
    loaded = trimtab.load_adapter(folder, progress=heard)
    assert any("was not saved by Trimtab: whether" in note and "cannot be checked" in note for note in heard.notes)
    assert loaded.label_names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    rows = [Row(f"new:{n}", text) for n, text in enumerate(texts)]
    assert torch.allclose(scores(loaded, rows), wanted, atol=1e-5)


def test_whoever_asks_for_no_notes_is_warned(stock):
    with pytest.warns(UserWarning, match="was not saved by Trimtab: whether"):
        trimtab.load_adapter(stock[0])


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_heads_of_stock_adapters_are_found_in_every_family(model_folder, tmp_path, family, classes):
    """A lone column is a regression, as transformers has it."""
    base = AutoModelForSequenceClassification.from_pretrained(model_folder(family), num_labels=classes)
    targets = ["q_lin", "v_lin"] if family == "distilbert" else ["query", "value"]
    config = LoraConfig(task_type="SEQ_CLS", target_modules=targets, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "stock")
    tokenizer = AutoTokenizer.from_pretrained(model_folder(family))
    texts = ["a joy to watch", "a dull mess truly truly"]
    with torch.no_grad():
        wanted = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    loaded = trimtab.load_adapter(tmp_path / "stock", progress=Notes())
    said = loaded.predict(texts)
    if classes == 1:
        assert loaded.scorer.task.name == "regression"
        assert [record["prediction"] for record in said] == pytest.approx(wanted.flatten().tolist(), abs=1e-5)
    else:
        found = torch.tensor([list(record["probabilities"].values()) for record in said])
        assert torch.allclose(found, wanted.softmax(-1), atol=1e-4)


@pytest.mark.parametrize(
    "method", ["prompt_tuning", "prefix_tuning", "p_tuning", "adaption_prompt", "trainable_tokens"]
)
def test_the_base_alone_is_the_untrained_one_with_every_method(method, model_folder, tmp_path):
    run_here(build_study(
        {"model": str(model_folder("llama")), "train_data": str(write_reviews(tmp_path / "reviews.csv")), "method": method,
         "num_train_epochs": 1, "tokens_per_batch": 256, "max_length_tokens": 32, "learning_rate": 0.05,
         "out": str(tmp_path / "run")}
    ))  # fmt: skip
    folder = RunFolder(tmp_path / "run")
    loaded = trimtab.load_adapter(folder.trial(method, 0).adapter)
    rows = read_rows(folder.test_rows)
    facts = loaded.facts
    task = loaded.scorer.task
    base = load_base(
        loaded.scorer.base.source, task.auto_class, task.head_settings(facts["label_names"]), facts["seed"]
    )
    untrained = make_scorer(task, base, facts["max_length_tokens"], Silent(), facts["virtual_tokens"])
    wanted = untrained.score(untrained.encode(rows)).outputs
    tuned = scores(loaded, rows)
    with loaded.disable():
        assert torch.allclose(scores(loaded, rows), wanted, atol=1e-5)
    assert not torch.allclose(tuned, wanted, atol=1e-3)
    assert torch.equal(scores(loaded, rows), tuned)


def test_a_study_with_a_relative_model_is_found_from_elsewhere(model_folder, tmp_path, monkeypatch):
    shutil.copytree(model_folder("llama"), tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    run_here(build_study(
        {"model": "base", "train_data": str(write_reviews(tmp_path / "reviews.csv")), "num_train_epochs": 1,
         "tokens_per_batch": 256, "max_length_tokens": 32, "out": str(tmp_path / "run")}
    ))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert trimtab.load_adapter(RunFolder(tmp_path / "run").trial("lora", 0).adapter).label_names == ["bad", "good"]


@pytest.mark.parametrize("kind", ["missing", "strange"])
def test_weights_of_another_build_are_refused(stock, kind):
    folder, *_ = stock
    weights = load_file(folder / WEIGHTS)
    first = next(name for name in weights if "lora_A" in name)
    if kind == "missing":
        del weights[first]
    else:
        weights[first.replace("layers.0", "layers.9")] = weights[first].clone()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=r"1 tensors (are missing|have no place here) \("):
        trimtab.load_adapter(folder)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, "tokenizer.json"])
def test_a_flipped_byte_is_found(adapter, name):
    content = bytearray((adapter / name).read_bytes())
    content[-20] ^= 1
    (adapter / name).write_bytes(content)
    with pytest.raises(AdapterError, match=rf"{name}( is not what was saved|.* is not valid JSON)"):
        trimtab.load_adapter(adapter)


def test_a_file_that_is_cut_off_or_gone_is_named(adapter, stock):
    (adapter / "tokenizer.json").unlink()
    with pytest.raises(AdapterError, match=r"tokenizer.json is missing; copy the whole folder again"):
        check_folder(adapter)
    folder, *_ = stock
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterError, match=rf"{WEIGHTS}: damaged or cut off"):
        check_folder(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=rf"holds no {WEIGHTS}"):
        check_folder(folder)
    with pytest.raises(AdapterError, match="no adapter folder at"):
        check_folder(folder / "nowhere")


def test_the_model_card_may_be_changed(adapter):
    (adapter / "README.md").write_text("mine")
    assert check_folder(adapter)["task"] == "classification"


def test_pickles_and_links_out_are_refused(adapter, stock, tmp_path):
    folder, *_ = stock
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(AdapterError, match=r"adapter_model.bin: pickled weights may run code"):
        trimtab.load_adapter(folder)
    shutil.move(adapter / WEIGHTS, tmp_path / "elsewhere.safetensors")
    (adapter / WEIGHTS).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(AdapterError, match=r"links to .*elsewhere.safetensors, outside of the adapter"):
        trimtab.load_adapter(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 100_000}, "r is 100000; a whole number between 1 and 4096"),
        ({"peft_type": "MAGIC"}, "the installed peft has no method 'MAGIC'"),
        ({"lora_alpa": 3}, "LORA has no field 'lora_alpa'; did you mean 'lora_alpha'"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, "auto_mapping names code in 'os'"),
    ],
)
def test_configs_are_read_against_a_list(stock, change, message):
    path = stock[0] / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        check_config(path)


@pytest.mark.parametrize("content", ["{", "[]", "{" + " " * (1 << 21) + "}"], ids=["cut off", "a list", "huge"])
def test_configs_that_are_none(stock, content):
    path = stock[0] / CONFIG
    path.write_text(content)
    with pytest.raises(AdapterError, match=r"not valid JSON|expected a JSON object|more than any needs"):
        check_config(path)
