"""Merged models: equal to base and adapter, plain to transformers, and not written where they are not."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import trimtab
from samples import run_here, run_trimtab, write_reviews, write_tales
from trimtab import merging
from trimtab.adapters.files import write_facts
from trimtab.console import show_merge
from trimtab.errors import AdapterError, DataError, InputError, MergeError, SourceError, StudyError
from trimtab.evaluation.prediction_files import read_predictions
from trimtab.merging import merge_adapter
from trimtab.runs import RunFolder, read_json, read_jsonl
from trimtab.study_config import build_study

PLAIN = """
import sys, json
sys.modules["peft"] = None
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, rows = sys.argv[1:]
texts = [json.loads(line)["text"] for line in open(rows)]
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
logits = model.eval()(**tokenizer(texts, padding=True, return_tensors="pt")).logits
print(json.dumps([model.config.id2label[place] for place in logits.argmax(-1).tolist()]))
"""


def tune(folder, model, **settings):
    return run_here(build_study(
        {"model": str(model), "train_data": str(write_reviews(folder / "reviews.csv")), "num_train_epochs": 2,
         "tokens_per_batch": 256, "max_length_tokens": 32, "learning_rate": 5e-3, "out": str(folder / "run")} | settings
    ))  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("merge")
    tune(folder, model_folder("llama"))
    return RunFolder(folder / "run")


def test_plain_transformers_gives_the_same_predictions(finished, tmp_path):
    trial = finished.trial("lora", 0)
    done = run_trimtab("merge", trial.adapter, "--out", tmp_path / "merged", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["max_abs_difference"] <= 1e-4
    assert told["before"] == told["after"] == told["trained"]
    plain = subprocess.run([sys.executable, "-c", PLAIN, tmp_path / "merged", finished.test_rows],
                           capture_output=True, text=True, check=True)  # fmt: skip
    found = read_predictions(trial.predictions)
    wanted = [found.label_names[place] for place in found.probabilities.argmax(1)]
    assert json.loads(plain.stdout) == wanted
    assert not list((tmp_path / "merged").glob("adapter*"))
    again = run_trimtab("merge", trial.adapter, "--out", tmp_path / "merged")
    assert again.returncode == 2
    assert "is there already; give another --out" in again.stderr


def test_the_base_was_changed_by_it(finished, tmp_path, model_folder):
    trimtab.merge(finished.path, tmp_path / "merged")
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as merged:
        names = [name for name in merged.keys() if "q_proj" in name]  # noqa: SIM118
        base = safe_open(model_folder("llama") / "model.safetensors", "pt")
        prefix = "" if names[0] in base.keys() else "model."  # noqa: SIM118
        for name in names:
            assert not torch.equal(merged.get_tensor(name), base.get_tensor(name.removeprefix(prefix)))


def test_an_adapter_outside_of_a_run_is_merged_on_given_rows(finished, tmp_path, model_folder):
    """One that was moved, and the same as stock peft would have saved it, whose base is named anew."""
    moved, data = tmp_path / "moved", write_reviews(tmp_path / "new.csv", 40, seed=5)
    shutil.copytree(finished.trial("lora", 0).adapter, moved)
    with pytest.raises(
        InputError, match="lies in no run folder, whose test rows are needed; give rows with labels: --d"
    ):
        merge_adapter(moved, tmp_path / "merged")
    done = run_trimtab("merge", moved, "--out", tmp_path / "merged", "--data", data, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["rows"], told["metric"]) == (40, "accuracy")
    assert told["max_abs_difference"] <= 1e-4
    assert told["trained"] == read_json(finished.trial("lora", 0).metrics)["metrics"]["accuracy"]
    for name in ("trimtab.json", "README.md"):
        (moved / name).unlink()
    write_reviews(data, 40, seed=5, labels=("1", "0"))
    data.write_text(data.read_text().replace("text,label", "words,said", 1))
    with pytest.raises(DataError, match="no column looks like the text; its columns are: words, said"):
        merge_adapter(moved, tmp_path / "stock", base=str(model_folder("llama")), data=str(data))
    stock = merge_adapter(moved, tmp_path / "stock", base=str(model_folder("llama")), data=str(data),
                          columns={"text": "words", "label": "said"})  # fmt: skip
    assert stock.max_abs_difference <= 1e-4
    assert stock.trained is None
    write_reviews(data, 40, labels=("good", "strange"))
    with pytest.raises(DataError, match="strange"):
        merge_adapter(finished.path, tmp_path / "other", data=str(data))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype_is_written_within_its_bound(finished, tmp_path, dtype):
    found = merge_adapter(finished.trial("lora", 0).adapter, tmp_path / "half", dtype)
    assert {"bfloat16": 1e-4, "float16": 1e-5}[dtype] < found.max_abs_difference <= found.bound
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as merged:
        assert {merged.get_tensor(name).dtype for name in merged.keys()} == {getattr(torch, dtype)}  # noqa: SIM118


def test_what_differs_by_more_is_written_by_force_only(finished, tmp_path, monkeypatch):
    adapter = finished.trial("lora", 0).adapter
    monkeypatch.setitem(merging.BOUNDS, "bfloat16", 1e-6)
    with pytest.raises(
        MergeError, match=r"outputs differ by up to .*accuracy .* before and .* after, on \d+ test rows"
    ):
        merge_adapter(adapter, tmp_path / "strict", "bfloat16")
    assert not (tmp_path / "strict").exists()
    assert not merge_adapter(adapter, tmp_path / "strict", "bfloat16", force=True).is_equal
    assert (tmp_path / "strict" / "model.safetensors").is_file()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_an_adapter_of_a_quantised_base_goes_into_full_precision(tmp_path, model_folder, bits, capsys):
    comparison = tune(tmp_path, model_folder("llama"), quantize=bits)
    assert comparison["reload"]["passed"]
    assert comparison["contrasts"]
    show_merge(merge_adapter(tmp_path / "run", tmp_path / "merged"), tmp_path / "merged")
    told = " ".join(capsys.readouterr().out.split())
    assert f"the adapter was trained on the base in {bits}, with accuracy" in told
    merged, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", model_folder("llama")))
    assert {weight.dtype for weight in merged.values()} == {torch.float32}
    trained = load_file(RunFolder(tmp_path / "run").trial("lora", 0).adapter / "adapter_model.safetensors")
    for name, weight in base.items():  # not what 8 or 4 bits made of them
        adapter = f"base_model.model.model.{name.removesuffix('.weight')}"
        if f"{adapter}.lora_A.weight" in trained:
            added = 2.0 * trained[f"{adapter}.lora_B.weight"] @ trained[f"{adapter}.lora_A.weight"]
            assert added.abs().max() > 1e-3
            torch.testing.assert_close(merged[f"model.{name}"], weight + added)
        else:
            assert torch.equal(merged[f"model.{name}"], weight)
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    labels = {row["label"] for row in read_jsonl(tmp_path / "run" / "test.jsonl")}
    assert len(json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"]) == len(labels)


def test_what_cannot_be_merged_is_told(tmp_path, model_folder):
    tune(tmp_path, model_folder("llama"), method="prefix_tuning", num_train_epochs=1)
    with pytest.raises(AdapterError, match="prefix_tuning stands beside the base's weights and changes none"):
        merge_adapter(tmp_path / "run", tmp_path / "merged")
    adapter = RunFolder(tmp_path / "run").trial("prefix_tuning", 0).adapter
    content = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is not what was saved"):
        merge_adapter(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_whole_model_needs_no_merge(tmp_path, model_folder):
    tune(tmp_path, model_folder("llama"), method="full", num_train_epochs=1)
    with pytest.raises(InputError, match="holds a whole model, which needs no merge"):
        merge_adapter(tmp_path / "run", tmp_path / "merged")


def test_places_without_an_adapter_and_other_bases_are_refused(finished, tmp_path, model_folder):
    with pytest.raises(AdapterError, match=r"holds no adapter_model\.safetensors, so it is no adapter"):
        merge_adapter(tmp_path, tmp_path / "merged")
    trial = finished.trial("lora", 0)
    facts = json.loads(trial.facts_in(trial.adapter).read_text())
    write_facts(trial.adapter, facts | {"base_sha256": "0" * 64})
    try:
        with pytest.raises(SourceError, match=r"is not the base of .*: its weights have SHA-256"):
            merge_adapter(finished.path, tmp_path / "merged")
    finally:
        write_facts(trial.adapter, facts)


def test_onnx_is_refused_with_the_reason(finished, tmp_path):
    done = run_trimtab("merge", finished.path, "--out", tmp_path / "onnx", "--format", "onnx")
    assert done.returncode == 2
    assert "optimum-onnx, whose newest release (0.1.0) asks for transformers<4.58" in " ".join(done.stderr.split())
    assert not (tmp_path / "onnx").exists()


def test_what_gguf_cannot_hold_is_told_before_weights_are_read(finished, tmp_path, model_folder):
    with pytest.raises(StudyError, match="--format gguf is for language models, and this is a classification adapter"):
        merge_adapter(finished.path, tmp_path / "gguf", output_format="gguf")
    tales = write_tales(tmp_path / "tales.jsonl")
    tune(tmp_path, model_folder("llama", "AutoModelForCausalLM"), task="causal_lm", train_data=str(tales))
    with pytest.raises(MergeError, match=r"llama\.cpp cannot convert this model to GGUF: "):  # a tokenizer of words
        merge_adapter(tmp_path / "run", tmp_path / "gguf", output_format="gguf")
    assert not (tmp_path / "gguf").exists()
