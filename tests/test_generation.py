"""Texts that an adapter writes: as stock peft does, in batches as alone, seeded, beside the base, and as a stream."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import trimtab
from samples import Notes, run_here, run_trimtab, write_reviews, write_tales
from trimtab.errors import AdapterError
from trimtab.prediction import generate_records
from trimtab.runs import RunFolder, read_jsonl
from trimtab.sampling import Sampling
from trimtab.study_config import build_study

PROMPTS = ["the best film", "superb acting and a fine story truly", "a joy"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("generation")
    run_here(build_study(
        {"model": str(model_folder("llama", "AutoModelForCausalLM")), "train_data": str(write_tales(folder / "tales.jsonl")),
         "task": "causal_lm", "num_train_epochs": 3, "tokens_per_batch": 256, "max_length_tokens": 32,
         "learning_rate": 1e-2, "out": str(folder / "run")}
    ))  # fmt: skip
    return RunFolder(folder / "run").trial("lora", 0).adapter


@pytest.fixture(scope="module")
def loaded(adapter):
    return trimtab.load_adapter(adapter)


def stock(model, tokenizer, prompt):
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_writes_what_stock_peft_writes_in_a_batch_as_alone(adapter, loaded):
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(adapter).eval(), AutoTokenizer.from_pretrained(adapter)
    wanted = [stock(model, tokenizer, prompt) for prompt in PROMPTS]
    assert loaded.generate(PROMPTS, Sampling(12)) == wanted
    assert [loaded.generate([prompt], Sampling(12))[0] for prompt in PROMPTS] == wanted


def test_the_base_writes_beside_it(adapter, loaded, model_folder, tmp_path):
    folder = model_folder("llama", "AutoModelForCausalLM")
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    done = run_trimtab("generate", adapter, "--input", tmp_path / "prompts.jsonl", "--out", tmp_path / "found.jsonl",
                       "--max-new-tokens", "12", "--compare")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = list(read_jsonl(tmp_path / "found.jsonl"))
    assert [row["base"] for row in found] == [stock(base, tokenizer, prompt) for prompt in PROMPTS]
    assert [row["generated"] for row in found] == loaded.generate(PROMPTS, Sampling(12))
    assert any(row["base"] != row["generated"] for row in found)


def test_sampling_is_seeded(loaded):
    def write(seed):
        return loaded.generate(PROMPTS, Sampling(12, temperature=1.5, seed=seed))

    assert write(1) == write(1)
    assert write(1) != write(2)
    assert loaded.generate(PROMPTS, Sampling(12, top_k=1)) == loaded.generate(PROMPTS, Sampling(12))


@pytest.mark.parametrize("asked", [{"temperature": 1.5}, {"top_p": 0.9}, {"top_k": 5, "temperature": 0.8}])
def test_a_sampled_text_does_not_depend_on_its_batch(loaded, asked):
    sampling = Sampling(12, **asked)
    together = loaded.generate(PROMPTS, sampling)
    assert [loaded.generate([prompt], sampling)[0] for prompt in PROMPTS] == together
    assert loaded.generate(PROMPTS[::-1], sampling) == together[::-1]


def test_tokens_are_drawn_as_often_as_their_probabilities_say():
    logits, keep = torch.tensor([0.0, 1.0, 2.0, -1.0]), 0.9
    prompts = [[number] for number in range(4000)]
    for top_p, wanted in ((None, logits.softmax(0)), (keep, logits[:3].softmax(0))):
        processors = Sampling(temperature=1.0, top_p=top_p).settings(prompts)["logits_processor"]
        drawn = processors(torch.tensor(prompts), logits.repeat(len(prompts), 1)).argmax(-1)
        shares = drawn.bincount(minlength=len(logits)) / len(prompts)
        assert (shares[: len(wanted)] - wanted).abs().max() < 0.025  # three standard errors
        assert shares[len(wanted) :].sum() == 0


def test_text_is_heard_while_it_is_written(loaded):
    heard = []
    written = loaded.generate(PROMPTS[:1], Sampling(12), on_text=heard.append)
    assert "".join(heard).split() == written[0].split()
    assert len(heard) > 2


def test_prompts_on_the_command_line_and_typed_ones(adapter, loaded):
    wanted = loaded.generate(PROMPTS[:1], Sampling(12))[0].split()
    done = run_trimtab("generate", adapter, "--prompt", PROMPTS[0], "--max-new-tokens", "12", "--compare", "--quiet")
    assert done.returncode == 0, done.stderr
    base, tuned = done.stdout.strip().split("\n")
    assert base.startswith("base:  ")
    assert tuned.removeprefix("tuned: ").split() == wanted
    command = [sys.executable, "-m", "trimtab", "generate", str(adapter), "--max-new-tokens", "12", "--quiet"]
    typed = subprocess.run(command, input=f"{PROMPTS[0]}\n\n", capture_output=True, text=True, check=True)
    assert typed.stdout.split() == wanted


def test_what_says_no_label_and_has_no_template_is_told(loaded, tmp_path):
    with pytest.raises(AdapterError, match="its tokenizer has no chat template; give plain prompts"):
        loaded.generate(PROMPTS, is_chat=True)
    reviews = write_reviews(tmp_path / "reviews.csv")
    done = run_trimtab("predict", loaded.path, "--input", reviews)
    assert done.returncode == 2
    assert "is a causal_lm adapter, which writes texts: try `trimtab generate`" in done.stderr


def test_an_adapter_of_chats_reads_prompts_as_chats(tmp_path, model_folder):
    base = shutil.copytree(model_folder("llama", "AutoModelForCausalLM"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} truly {% else %}number {{ m.content }} {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}number {% endif %}"
    )
    tokenizer.save_pretrained(base)
    turns = [{"role": "user", "content": "a joy"}, {"role": "assistant", "content": "warm funny"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)
    run_here(build_study(
        {"model": str(base), "train_data": str(tmp_path / "chats.jsonl"), "task": "causal_lm", "num_train_epochs": 1,
         "tokens_per_batch": 64, "max_length_tokens": 32, "learning_rate": 1e-2, "out": str(tmp_path / "run")}
    ))  # fmt: skip
    chatty = trimtab.load_adapter(RunFolder(tmp_path / "run").trial("lora", 0).adapter)
    assert chatty.facts["is_chat"]
    written = chatty.generate(["the best film"], Sampling(8))
    assert written == chatty.generate(["the best film truly number"], Sampling(8), is_chat=False)
    assert written != chatty.generate(["the best film"], Sampling(8), is_chat=False)
    streamed = list(generate_records(chatty, [({"text": "the best film"}, 1)], "prompts", sampling=Sampling(8)))
    assert [record["generated"] for record in streamed] == written


def test_without_a_pad_token_a_batch_writes_what_each_alone_does(tmp_path, model_folder):
    base = shutil.copytree(model_folder("llama", "AutoModelForCausalLM"), tmp_path / "base")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("config.json", "generation_config.json"):
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | {"pad_token_id": None}))
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    bare = trimtab.load_adapter(tmp_path / "adapter", progress=Notes())
    assert bare.scorer.base.tokenizer.pad_token == "[SEP]"
    for sampling in (Sampling(12), Sampling(12, temperature=2.0)):
        assert [bare.generate([prompt], sampling)[0] for prompt in PROMPTS] == bare.generate(PROMPTS, sampling)


def test_a_chat_template_is_used_where_it_is_asked_for(loaded, monkeypatch):
    tokenizer = loaded.scorer.base.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.content }} truly{% endfor %}")
    assert loaded.generate(["a joy"], Sampling(8), is_chat=True) == loaded.generate(["a joy truly"], Sampling(8))
