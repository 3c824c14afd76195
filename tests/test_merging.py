"""Merged models: equal to base and adapter, plain to transformers, and not written where they are not."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import trimtab
from samples import Notes, run_here, run_trimtab, write_reviews, write_tales
from trimtab import merging
from trimtab.adapters import merged as merged_weights
from trimtab.adapters.files import write_facts
from trimtab.console import show_merge
from trimtab.errors import AdapterError, DataError, InputError, MergeError, SourceError, StudyError
from trimtab.evaluation.prediction_files import read_predictions
from trimtab.merging import merge_adapter
from trimtab.runs import RunFolder, read_json, read_jsonl
from trimtab.sources import locate_model
from trimtab.study_config import build_study
from trimtab.tasks import get_task

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
        {"model": str(model), "train_data": str(write_reviews(folder / "reviews.csv")), "num_train_epochs": 8,
         "tokens_per_batch": 256, "max_length_tokens": 32, "learning_rate": 5e-3, "out": str(folder / "run")} | settings
    ))  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("merge")
    tune(folder, model_folder("llama"))
    run = RunFolder(folder / "run")
    assert read_json(run.trial("lora", 0).training)["best_step"] > 0  # else there is nothing to merge
    return run


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


def test_the_command_refuses_and_is_forced(finished, tmp_path):
    """A head so large that bfloat16 rounds its logits by more than the bound."""
    shutil.copytree(finished.trial("lora", 0).adapter, tmp_path / "large")
    file = tmp_path / "large" / "adapter_model.safetensors"
    weights = {name: value * (40 if "score" in name else 1) for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    write_facts(tmp_path / "large", read_json(tmp_path / "large" / "trimtab.json"))
    data = write_reviews(tmp_path / "new.csv", 40)
    arguments = ["merge", tmp_path / "large", "--data", data, "--out", tmp_path / "merged", "--json"]
    refused = run_trimtab(*arguments, "--dtype", "bfloat16")
    assert refused.returncode == 1
    said = " ".join(refused.stderr.split())
    assert "merged in bfloat16 is another model: outputs differ by up to " in said
    assert "nothing was kept: try --dtype float32, or --force" in said
    assert not (tmp_path / "merged").exists()
    forced = run_trimtab(*arguments, "--dtype", "bfloat16", "--force")
    assert forced.returncode == 0, forced.stderr
    told = json.loads(forced.stdout)
    assert told["max_abs_difference"] > told["bound"] == 0.5
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert read_json(tmp_path / "merged" / "merge.json")["max_abs_difference"] == told["max_abs_difference"]


def lose_a_layer(weight):
    """What is written of one adapted layer is the base's own."""
    return weight._replace(layer=None) if weight.name.endswith("layers.1.self_attn.v_proj.weight") else weight


def lose_the_head(weight):
    return weight._replace(tensor=torch.zeros_like(weight.tensor)) if weight.name == "score.weight" else weight


@pytest.mark.parametrize("dtype", merging.BOUNDS)
@pytest.mark.parametrize("fault", [lose_a_layer, lose_the_head])
def test_what_is_written_wrong_is_refused_in_every_format(finished, tmp_path, monkeypatch, dtype, fault):
    write = merged_weights._write_shard
    monkeypatch.setattr(merged_weights, "_write_shard",
                        lambda weights, *rest: write([fault(weight) for weight in weights], *rest))  # fmt: skip
    with pytest.raises(MergeError, match="was read back as another weight than base and adapter have, once merged"):
        merge_adapter(finished.path, tmp_path / "merged", dtype, force=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", merging.BOUNDS)
@pytest.mark.parametrize("share", [0.0, 0.9])
def test_what_is_merged_wrong_is_refused_in_every_format(finished, tmp_path, monkeypatch, dtype, share):
    """A merge that loses the adapter, or a tenth of it: less than bfloat16's bound lets outputs differ."""
    product = LoraLinear.get_delta_weight
    monkeypatch.setattr(LoraLinear, "get_delta_weight", lambda layer, name: product(layer, name) * share)
    with pytest.raises(MergeError, match=r"merged in float32 is another model: outputs differ by up to"):
        merge_adapter(finished.path, tmp_path / "merged", dtype)
    assert list(tmp_path.iterdir()) == []


def test_every_loss_has_a_bound_of_its_own():
    """One improbable token lets no other differ, and a likeliest token that a tie turns over is no difference."""
    losses = torch.tensor([[0.5, 1.0], [40.0, 0.0], [2.0, 0.0]])
    for place, allowed in enumerate((1e-4, 4e-3, 2e-4)):
        for share in (0.9, 1.1):
            merged = losses.clone()
            merged[place, 0] += share * allowed
            difference, bound, found = merging.find_difference(get_task("causal_lm"), losses, merged, 1e-4)
            assert bound == pytest.approx(allowed)
            assert difference == pytest.approx(share * allowed, rel=0.02)
            assert found == pytest.approx(share, rel=0.02)
    both = losses + torch.tensor([[2e-4, 0.0], [1e-3, 0.0], [0.0, 0.0]])  # the larger one is within its bound
    assert merging.find_difference(get_task("causal_lm"), losses, both, 1e-4) == pytest.approx(
        (1e-3, 4e-3, 2.0), rel=0.02
    )
    turned = losses * torch.tensor([1.0, -1.0])
    assert merging.find_difference(get_task("preference"), losses, turned, 1e-4)[0] == 0.0
    assert merging.find_difference(get_task("classification"), losses, turned, 1e-4)[0] == 2.0
    assert torch.tensor(merging.find_difference(get_task("seq2seq"), losses, losses * torch.nan, 1.0)).isnan().any()
    values = torch.tensor([[300_000.0], [100_000.0]])
    difference, bound, _ = merging.find_difference(get_task("regression"), values, values + 0.5, 1e-4)
    assert difference == 0.5
    assert bound == pytest.approx(22.4, abs=0.1)


def test_a_base_that_is_no_safetensors_is_read_whole_and_that_is_told(finished, tmp_path, model_folder):
    base, heard = tmp_path / "base", Notes()
    shutil.copytree(model_folder("llama"), base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with merging._mapped(locate_model(str(base), heard), tmp_path, heard) as source:
        assert source.location == str(base)
    assert heard.notes == [
        f"{base} has its weights in pytorch_model.bin, and only safetensors are mapped into memory: all of it is read "
        f"({(base / 'pytorch_model.bin').stat().st_size / 1e9:.2g} GB in the file, more where that is narrower than "
        "float32)"
    ]


def test_weights_in_other_formats_are_not_copied(tmp_path, model_folder):
    base, heard = tmp_path / "base", Notes()
    shutil.copytree(model_folder("llama"), base)
    weights = load_file(base / "model.safetensors")
    narrow = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(narrow, base / "model.safetensors", metadata={"format": "pt"})
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.gguf"):
        (base / name).write_bytes(b"not read")
    with merging._mapped(locate_model(str(base), heard), tmp_path, heard) as source:
        wide = {path.name for path in merging.Path(source.location).iterdir()}
        assert wide == {path.name for path in model_folder("llama").iterdir()}
        found = load_file(merging.Path(source.location) / "model.safetensors")
    assert all(torch.equal(found[name], weight.float()) for name, weight in narrow.items())
    assert heard.notes == []


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
