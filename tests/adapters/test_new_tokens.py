"""Tokens that a base does not have: trained, saved, read back by Trimtab and by stock peft, and merged."""

import csv
import json

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trimtab
from samples import run_here, tiny_config, write_reviews
from trimtab.errors import AdapterError, StudyError
from trimtab.methods import attach_adapter
from trimtab.progress import Silent
from trimtab.runs import RunFolder, read_json, read_jsonl
from trimtab.study import check_study
from trimtab.study_config import build_study

NEW = ["<yes>", "<no>"]
TEXTS = ["<yes> a film", "<no> a film", "a joy to watch"]


@pytest.fixture(scope="module", params=["llama", "bert"])
def base(request, tmp_path_factory, model_folder):
    """A base with a row of its embeddings for each token of its tokenizer, and no more."""
    folder = tmp_path_factory.mktemp(f"full-{request.param}")
    source = model_folder(request.param)
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs of one and the same text, but for the new token that tells the label."""
    file = tmp_path_factory.mktemp("data") / "marked.csv"
    with file.open("w", newline="") as opened:
        rows = [[f"{NEW[number % 2]} film number {number // 2}", ["good", "bad"][number % 2]] for number in range(160)]
        csv.writer(opened).writerows([["text", "label"], *rows])
    return file


def settings(base, data, **changes):
    return {"model": str(base), "train_data": str(data), "new_tokens": ",".join(NEW), "max_length_tokens": 32,
            "tokens_per_batch": 128, "learning_rate": 5e-3, "num_train_epochs": 12, "early_stopping_patience": 99} | changes  # fmt: skip


@pytest.fixture(scope="module")
def finished(base, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    comparison = run_here(build_study(settings(base, data, out=str(run))))
    return comparison, RunFolder(run).trial("lora", 0).adapter


def logits_of(model, tokenizer):
    model.eval()
    with torch.no_grad():
        found = [model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS]
        return torch.cat([logits.flatten(0, -2) for logits in found])


def scored(loaded):
    encoded = loaded.scorer.encode([trimtab.data.Row(text, text, label=0) for text in TEXTS])
    return loaded.scorer.score(encoded).outputs


def test_their_rows_are_trained_saved_and_read_by_trimtab_and_stock_peft(finished):
    comparison, adapter = finished
    tuned = next(system for system in comparison["systems"] if system["kind"] == "tuned")
    assert tuned["metrics"]["accuracy"]["value"] == 1.0  # nothing else than the new tokens tells the label
    assert comparison["reload"]["passed"]
    facts = read_json(adapter / "trimtab.json")
    assert facts["new_tokens"] == NEW
    with safe_open(adapter / "adapter_model.safetensors", "pt") as saved:
        shapes = {name: saved.get_slice(name).get_shape() for name in saved.keys()}  # noqa: SIM118
    assert [shape[0] for name, shape in shapes.items() if "embed" in name] == [len(NEW)], shapes
    assert "tokens that its base does not know: " in (adapter / "README.md").read_text()
    loaded = trimtab.load_adapter(adapter)
    assert [record["prediction"] for record in loaded.predict(TEXTS[:2])] == ["good", "bad"]
    stock = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    torch.testing.assert_close(scored(loaded), logits_of(stock, tokenizer), atol=1e-5, rtol=1e-5)


def test_a_merged_model_has_them(finished, tmp_path):
    _, adapter = finished
    trimtab.merge(adapter, tmp_path / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ours = scored(trimtab.load_adapter(adapter))
    torch.testing.assert_close(logits_of(model, tokenizer), ours, atol=1e-5, rtol=1e-5)


def test_a_stock_adapter_with_a_longer_vocabulary_is_loaded_with_its_own_tokenizer(base, tmp_path):
    """As peft's users make it: tokens added by hand, the embeddings resized, which peft then saves whole."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(NEW)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    stock = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    stock.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wanted = logits_of(stock, tokenizer)
    with pytest.warns(UserWarning, match="was not saved by Trimtab"):
        loaded = trimtab.load_adapter(tmp_path)
    torch.testing.assert_close(scored(loaded), wanted, atol=1e-5, rtol=1e-5)


def test_an_adapter_with_other_tokens_does_not_join(base, finished, tmp_path):
    write_reviews(tmp_path / "reviews.csv", 60)
    plain = settings(base, tmp_path / "reviews.csv", new_tokens="", num_train_epochs=1, out=str(tmp_path / "run"))
    run_here(build_study(plain))
    loaded = trimtab.load_adapter(finished[1])
    with pytest.raises(AdapterError, match=r"has other tokens than .* in its vocabulary; load it by itself"):
        loaded.load(RunFolder(tmp_path / "run").trial("lora", 0).adapter, "plain")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_tokens": "<yes>,film"}, "has 'film' in its vocabulary already; leave it out"),
        ({"method": "ia3"}, "new_tokens: ia3 trains no embeddings beside its own weights; use one of: lora, "),
    ],
)
def test_what_cannot_be_trained_is_refused_before_weights_are_read(base, data, tmp_path, changes, message):
    (base / "model.safetensors").rename(base / "hidden.safetensors")
    try:
        with pytest.raises(StudyError, match=message):
            check_study(build_study(settings(base, data, out=str(tmp_path / "run")) | changes), Silent())
    finally:
        (base / "hidden.safetensors").rename(base / "model.safetensors")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def language(request, tmp_path_factory, model_folder):
    """A language model that was taught to write new tokens; whether its head is its embeddings."""
    folder = tmp_path_factory.mktemp("language")
    tokenizer = AutoTokenizer.from_pretrained(model_folder("llama"))
    torch.manual_seed(0)
    config = tiny_config("llama", vocab_size=len(tokenizer), tie_word_embeddings=request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [{"prompt": f"number {number % 10}", "completion": f"{NEW[number % 2]} a joy"} for number in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = settings(folder / "base", folder / "rows.jsonl", task="causal_lm", out=str(folder / "run"),
                     learning_rate=0.02, num_train_epochs=6)  # fmt: skip
    comparison = run_here(build_study(study))
    return request.param, folder / "base", RunFolder(folder / "run").trial("lora", 0).adapter, comparison


def longer_base(base, tokenizer, seed):
    """As a user of stock peft makes it: new rows, of the head as well, are transformers' own random ones."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model


def test_a_language_model_learns_to_write_them(language, tmp_path):
    """Their rows of the head are trained and saved, too, so that stock peft writes them with the same logits."""
    is_tied, base, adapter, comparison = language
    assert comparison["reload"]["passed"]
    with safe_open(adapter / "adapter_model.safetensors", "pt") as saved:
        layers = {name.split(".token_adapter")[0].rpartition(".")[2]: saved.get_tensor(name)
                  for name in saved.keys() if "token_adapter" in name}  # noqa: SIM118  # fmt: skip
        assert not [name for name in saved.keys() if name.endswith(("lm_head.weight", "tokens.weight"))]  # noqa: SIM118
    assert layers.keys() == ({"embed_tokens"} if is_tied else {"embed_tokens", "lm_head"})
    start = AutoModelForCausalLM.from_pretrained(base).get_output_embeddings().weight.detach().mean(0)
    for rows in layers.values():
        assert rows.shape[0] == len(NEW)
        assert float((rows - start).abs().max()) > 0.01
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    loaded = trimtab.load_adapter(adapter)
    loaded.peft_model.get_base_model().set_attn_implementation("eager")
    ours = logits_of(loaded.peft_model, tokenizer)
    for seed in (1, 2):
        stock = PeftModel.from_pretrained(longer_base(base, tokenizer, seed), adapter)
        torch.testing.assert_close(logits_of(stock, tokenizer), ours, atol=1e-5, rtol=1e-5)
    trimtab.merge(adapter, tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(plain, tokenizer), ours, atol=1e-5, rtol=1e-5)
    places = tokenizer.convert_tokens_to_ids(NEW)
    assert ours.shape[-1] == len(tokenizer)
    with torch.no_grad():
        asked = plain(**tokenizer("number 4", return_tensors="pt")).logits[0, -1].log_softmax(-1)
    assert float(asked[places].exp().sum()) > 0.3  # they follow every prompt


def test_the_base_of_a_whole_model_goes_on_from_them(language, tmp_path):
    """Its samples come from the base as it was, whose vocabulary is the shorter one."""
    _, base, _, _ = language
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{NEW[number % 2]} number {number % 10}", "completion": "a joy"} for number in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    study = settings(base, data, task="causal_lm", method="full", out=str(run), learning_rate=1e-3, num_train_epochs=1)
    assert run_here(build_study(study))["reload"]["passed"]
    samples = list(read_jsonl(RunFolder(run).trial("full", 0).samples))
    assert samples
    assert all(sample["prompt"].startswith(tuple(NEW)) for sample in samples)


def test_a_head_with_a_bias_is_refused(tiny_model):
    """peft computes such a head without it, once it trains rows of it."""
    model = tiny_model("llama", auto_class="AutoModelForCausalLM")
    model.lm_head = torch.nn.Linear(32, 120)
    with pytest.raises(StudyError, match="new_tokens: peft leaves out the bias that the head of LlamaForCausalLM has"):
        attach_adapter(model, build_study({"task": "causal_lm", "new_tokens": "<yes>"}), [])
