"""Merged weights: exact ways back, ties, narrow files, memory that one shard bounds, and plain models of every task."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trimtab
from samples import save_small_t5, tiny_config, write_reversals
from trimtab.adapters.files import write_facts
from trimtab.adapters.merged import is_narrow, widen_weights, write_merged
from trimtab.errors import AdapterError
from trimtab.fingerprints import fingerprint_model
from trimtab.merging import merge_adapter
from trimtab.progress import Silent
from trimtab.sources import locate_model
from trimtab.tasks import get_task

TEXTS = ["a joy to watch", "a dull mess truly truly"]


def adapted(folder, targets, auto=AutoModelForSequenceClassification, **settings):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=targets, init_lora_weights=False, **settings)
    return get_peft_model(auto.from_pretrained(folder), config).eval()


def test_unmerging_gives_the_base_back_to_the_bit(model_folder, tmp_path):
    adapted(model_folder("llama"), ["q_proj", "down_proj"], task_type="SEQ_CLS").save_pretrained(tmp_path / "adapter")
    loaded = trimtab.load_adapter(tmp_path / "adapter")
    before = {name: value.clone() for name, value in loaded.peft_model.state_dict().items()}
    apart = loaded.predict(TEXTS)
    loaded.merge()
    merged = loaded.predict(TEXTS)
    changed = [name for name, value in loaded.peft_model.state_dict().items() if not torch.equal(value, before[name])]
    assert len(changed) == 4
    for said, wanted in zip(merged, apart, strict=True):
        assert said["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
    for call in (lambda: loaded.switch("default"), loaded.merge, lambda: loaded.load(tmp_path / "adapter", "other")):
        with pytest.raises(AdapterError, match="'default' is merged into the base; unmerge it first"):
            call()
    loaded.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in loaded.peft_model.state_dict().items())
    assert loaded.predict(TEXTS) == apart


@pytest.mark.parametrize(
    ("targets", "is_tied"), [(["q_proj"], True), (["q_proj", "lm_head"], False), (["q_proj", "embed_tokens"], False)]
)
def test_ties_hold_unless_one_side_has_changed(tmp_path, targets, is_tied):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config("llama", tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", targets, AutoModelForCausalLM)
    ids = torch.randint(5, 100, (2, 9))
    with torch.no_grad():
        wanted = model(ids).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "merged").mkdir()
    write_merged(model, tmp_path / "merged", torch.float32, Silent())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, wanted, atol=1e-5)
    assert plain.config.tie_word_embeddings is is_tied
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as merged:
        assert ("lm_head.weight" in merged.keys()) is not is_tied  # noqa: SIM118


def test_shards_are_whole_models_together(model_folder, tmp_path):
    model = adapted(model_folder("llama"), "all-linear", task_type="SEQ_CLS")
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits
    (tmp_path / "merged").mkdir()
    write_merged(model, tmp_path / "merged", torch.float32, Silent(), shard_bytes=20_000)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(files) > 3
    assert {path.name for path in files} == set(index["weight_map"].values())
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(plain(**inputs).logits, wanted, atol=1e-5)


def test_narrow_files_are_widened(model_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(model_folder("llama"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "narrow")
    files = [tmp_path / "narrow" / "model.safetensors"]
    assert is_narrow(files)
    (tmp_path / "wide").mkdir()
    widen_weights(files, tmp_path / "wide")
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert not is_narrow([tmp_path / "wide" / "model.safetensors"])
    assert all(torch.equal(wide[name], value.float()) for name, value in load_file(files[0]).items())
    (tmp_path / "parts").mkdir()
    widen_weights(files, tmp_path / "parts", shard_bytes=20_000)  # one file need not be held whole
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "narrow", dtype=torch.float32)
    model.config.save_pretrained(tmp_path / "parts")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "parts")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


# Peaks of memory that is not a mapped file, in MiB: after loading, and while merging.
MEASURE = """
import sys, threading, time, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from pathlib import Path
from trimtab.adapters.merged import write_merged
from trimtab.progress import Silent

def anonymous():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

base, adapter, out = sys.argv[1:]
start = anonymous()
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
loaded, peak, stop = anonymous(), [0.0], threading.Event()

def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
write_merged(model, Path(out), torch.float32, Silent(), shard_bytes=8 << 20)
stop.set()
thread.join()
print(loaded - start, peak[0] - loaded)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
def test_one_shard_bounds_the_memory(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=1000, hidden_size=512, intermediate_size=1536, num_hidden_layers=24,
                         num_attention_heads=8, num_key_value_heads=8)  # fmt: skip
    model = LlamaForCausalLM(config)
    size = sum(parameter.numel() for parameter in model.parameters()) * 4 / (1 << 20)
    assert size > 300
    model.save_pretrained(tmp_path / "base", max_shard_size="50MB")
    get_peft_model(model, LoraConfig(target_modules="all-linear", r=4)).save_pretrained(tmp_path / "adapter")
    del model
    (tmp_path / "merged").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded, merging = map(float, done.stdout.split())
    assert loaded < 0.2 * size  # mapped, not read
    assert merging < 8 * 8  # a shard, its copy on the way to the file, and a layer


def test_a_reload_with_stock_peft_is_the_plain_twin(model_folder, tmp_path):
    model = adapted(model_folder("gpt2"), ["c_attn", "c_proj"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    write_merged(model, tmp_path / "merged", torch.float32, Silent())
    stock = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(model_folder("gpt2")), tmp_path / "adapter"
    ).merge_and_unload()
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    theirs = stock.state_dict()
    assert ours.keys() <= theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


# What a row of each task is; `number` tells the rows apart.
ROWS = {
    "token_classification": lambda number: {"tokens": ["a", "fine", "film"], "tags": ["O", "B-MOOD", "O"]},
    "multilabel": lambda number: {"text": f"a joy number {number}", "labels": ["good"] if number % 2 else []},
    "regression": lambda number: {"text": f"a joy number {number}", "score": number / 2},
    "causal_lm": lambda number: {"text": f"the best film of the year number {number}"},
    "preference": lambda number: {"prompt": f"number {number}", "chosen": "a joy", "rejected": "a dull mess"},
}
LABELS = {"token_classification": ["B-MOOD", "O"], "multilabel": ["bad", "fine", "good"]}


def save_adapter_of(task, base, folder):
    """An adapter with random weights, as stock peft writes it, with what Trimtab would note; returns its base's class."""
    torch.manual_seed(1)
    auto, names = getattr(transformers, get_task(task).auto_class), LABELS.get(task, [])
    labels = {"num_labels": len(names) or 1} if get_task(task).has_probe else {}
    targets = ["query", "value"] if (base / "config.json").read_text().count('"bert"') else None
    config = LoraConfig(task_type=get_task(task).peft_type, target_modules=targets, init_lora_weights=False)
    get_peft_model(auto.from_pretrained(base, **labels), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    sha256 = fingerprint_model(locate_model(str(base), Silent()))
    write_facts(folder, {"base": str(base), "base_sha256": sha256, "task": task, "label_names": names,
                         "max_length_tokens": 32, "max_new_tokens": 4, "method": "lora", "seed": 0})  # fmt: skip
    return lambda path: auto.from_pretrained(path, **labels).eval()


@pytest.mark.parametrize(
    ("task", "family", "dtype"),
    [
        ("token_classification", "bert", "float32"),
        ("multilabel", "llama", "float32"),
        ("regression", "bert", "float32"),
        ("seq2seq", "t5", "float32"),
        ("preference", "llama", "float32"),
        ("causal_lm", "llama", "bfloat16"),
        ("causal_lm", "gpt2", "float16"),
    ],
)
def test_every_task_is_merged_and_read_by_plain_transformers(tmp_path, model_folder, task, family, dtype):
    data, auto = tmp_path / "rows.jsonl", get_task(task).auto_class
    if task == "seq2seq":
        base = save_small_t5(tmp_path / "base")
        write_reversals(data, 20, 0)
    else:
        base = model_folder(family, auto if "LM" in auto else "AutoModel")
        data.write_text("".join(json.dumps(ROWS[task](number)) + "\n" for number in range(20)))
    load = save_adapter_of(task, base, tmp_path / "adapter")
    found = merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype, data=str(data))
    assert found.is_equal
    assert found.rows == 20
    inputs = {"input_ids": torch.tensor([[5, 9, 7, 12, 6, 8]])}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([[0, 7, 9]])
    adapted, plain = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval(), load(tmp_path / "merged")
    assert plain.dtype == getattr(torch, dtype)
    with torch.no_grad():
        wanted, logits, alone = (model(**inputs).logits.float() for model in (adapted, plain, load(base)))
    bound = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}[dtype] * max(1.0, float(wanted.abs().max()))
    assert float((logits - wanted).abs().max()) <= bound
    assert float((alone - wanted).abs().max()) > 4 * bound
