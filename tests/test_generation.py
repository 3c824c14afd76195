"""Texts that an adapter writes: as stock peft does, in batches as alone, seeded, beside the base, and as a stream."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import trimtab
from samples import Notes, run_here, run_trimtab, write_reviews, write_tales
from trimtab import conversation
from trimtab.errors import AdapterError, DataError, InputError, RowError
from trimtab.generation import check_room, continue_prompts
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


def stock(model, tokenizer, prompt, **settings):
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0, **settings)
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


@pytest.mark.parametrize(
    "asked",
    [{"temperature": 1.5}, {"top_p": 0.9}, {"top_k": 5, "temperature": 0.8}, {"min_p": 0.01}, {"typical_p": 0.9},
     {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}],
)  # fmt: skip
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


@pytest.mark.parametrize(
    "asked",
    [{"temperature": 0.7}, {"top_p": 0.6}, {"top_k": 5}, {"min_p": 0.2}, {"typical_p": 0.5}, {"do_sample": True},
     {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "repetition_penalty": 1.5}],
)  # fmt: skip
def test_what_is_drawn_from_is_what_transformers_draws_from(tiny_model, asked):
    model = tiny_model("llama", auto_class="AutoModelForCausalLM")
    prompt = torch.tensor([[5, 6, 7, 5]])
    keep = {"max_new_tokens": 1, "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}
    theirs = model.generate(prompt, **keep, **({"top_k": 0, "do_sample": True} | asked)).scores[0]
    settings = Sampling(1, **asked).settings(prompt.tolist())
    settings["logits_processor"].pop()  # the noise
    ours = model.generate(prompt, **(settings | keep)).scores[0]
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))
    assert (ours == float("-inf")).any() == bool(asked.keys() & {"top_p", "top_k", "min_p", "typical_p"})


@pytest.mark.parametrize("asked", [{"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}])
def test_repetition_is_kept_down_as_transformers_does(adapter, loaded, asked):
    model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(adapter).eval(), AutoTokenizer.from_pretrained(adapter)
    wanted = [stock(model, tokenizer, prompt, **asked) for prompt in PROMPTS]
    assert loaded.generate(PROMPTS, Sampling(12, **asked)) == wanted
    assert wanted != loaded.generate(PROMPTS, Sampling(12))


def test_a_text_ends_with_the_string_to_stop_at_as_in_transformers(tiny_model, loaded):
    bytes_of_text = Tokenizer(models.BPE())
    bytes_of_text.pre_tokenizer, bytes_of_text.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:60]  # which come in another order in each process
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["[PAD]", "[EOS]"], initial_alphabet=alphabet)
    bytes_of_text.train_from_iterator(PROMPTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_of_text, pad_token="[PAD]", eos_token="[EOS]")
    model = tiny_model("llama", auto_class="AutoModelForCausalLM", eos_token_id=None, vocab_size=len(tokenizer))
    prompts = tokenizer(PROMPTS)["input_ids"]
    whole = continue_prompts(model, tokenizer, prompts, Sampling(24))
    stops = [whole[0][4:6], whole[1][9:10]]
    found = continue_prompts(model, tokenizer, prompts, Sampling(24, stop_strings=stops))
    for prompt, text, long in zip(prompts, found, whole, strict=True):
        written = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0,
                                 stop_strings=stops, tokenizer=tokenizer)  # fmt: skip
        assert text == tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)
        assert long.startswith(text)
    assert len(found[0]) < len(whole[0])
    assert continue_prompts(model, tokenizer, prompts, Sampling(24, stop_strings=stops[0]))[0] == found[0]
    with pytest.raises(InputError, match="stop_strings: transformers cannot tell this tokenizer's tokens as text"):
        loaded.generate(PROMPTS, Sampling(4, stop_strings=["film"]))


def test_sampling_is_asked_for_or_forbidden_by_its_name(loaded):
    assert loaded.generate(PROMPTS, Sampling(12, do_sample=True)) == loaded.generate(
        PROMPTS, Sampling(12, temperature=1.0)
    )
    assert loaded.generate(PROMPTS, Sampling(12, do_sample=False)) == loaded.generate(PROMPTS, Sampling(12))
    with pytest.raises(InputError, match="do_sample is off, and top_p, min_p asks for sampling; leave out one"):
        Sampling(do_sample=False, top_p=0.9, min_p=0.1)


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (
            "--temperature 1.5 --top-p 0.9 --top-k 20 --seed 3",
            {"temperature": 1.5, "top_p": 0.9, "top_k": 20, "seed": 3},
        ),
        ("--repetition-penalty 1.8 --no-repeat-ngram-size 3", {"repetition_penalty": 1.8, "no_repeat_ngram_size": 3}),
        ("--do-sample --min-p 0.02 --typical-p 0.9", {"do_sample": True, "min_p": 0.02, "typical_p": 0.9}),
    ],
)
def test_sampling_by_flags(adapter, loaded, tmp_path, flags, asked):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    done = run_trimtab(
        "generate", adapter, "--input", tmp_path / "prompts.jsonl", "--max-new-tokens", "12", *flags.split()
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["generated"] for line in done.stdout.splitlines()]
    assert found == loaded.generate(PROMPTS, Sampling(12, **asked))
    assert found != loaded.generate(PROMPTS, Sampling(12))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt x --out found.csv --format csv", "--out, --format: only for rows of --input; give --input"),
        ("--text-column story", "--text-column: only for rows of --input"),
        ("--prompt x --input prompts.jsonl", "--prompt and --input each give what to go on from; leave out one"),
        ("--input gone.jsonl", "no data file at 'gone.jsonl'"),
        ("--prompt x --no-do-sample --temperature 0.5", "do_sample is off, and temperature asks for sampling"),
    ],
)
def test_flags_that_would_be_left_out_are_refused_before_anything_is_loaded(tmp_path, flags, message):
    done = run_trimtab("generate", "no-adapter", *flags.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"trimtab: {message}")


def test_prompts_that_no_text_can_follow_are_told(adapter, loaded, tiny_model):
    with pytest.raises(RowError, match="row 2: the prompt gives no token to go on from"):
        loaded.generate(["a joy", ""], Sampling(4))
    long = "a joy " * 60
    message = r"a prompt of 120 tokens and 9 new ones are more than the 128 that this model has positions for; shorten"
    rows = [({"text": "a joy"}, 4), ({"text": long}, 7)]
    with pytest.raises(RowError, match="row rows:7: " + message):
        list(generate_records(loaded, rows, "rows", sampling=Sampling(9)))
    assert loaded.generate([long], Sampling(8))
    done = run_trimtab("generate", adapter, "--prompt", "", "--quiet")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    learnt = tiny_model("gpt2", auto_class="AutoModelForCausalLM")  # an IndexError where positions are a table
    ids = [[5] * 120]
    check_room(learnt, ids, 8)
    with pytest.raises(RowError, match=message):
        check_room(learnt, ids, 9)
    with pytest.raises(RowError, match="are more than the 124 that"):
        check_room(learnt, ids, 8, reserved=4)
    tokenizer = loaded.scorer.base.tokenizer
    continue_prompts(learnt, tokenizer, ids, Sampling(8))
    with pytest.raises(IndexError):
        continue_prompts(learnt, tokenizer, ids, Sampling(12))


def test_columns_that_are_replaced_are_told(loaded):
    told = Notes()
    rows = [({"text": prompt, "base": 1, "generated": 2}, 1) for prompt in PROMPTS * 8]
    found = list(generate_records(loaded, rows, "rows", sampling=Sampling(2), progress=told))
    assert found[0]["base"] == 1
    assert told.notes == ["what the adapter says replaces columns of the input: 'generated'; rename them to keep both"]


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
    done = run_trimtab("predict", loaded.path, "--input", reviews, "--base", "no/such/base")  # which is not looked for
    assert done.returncode == 2
    assert "is a causal_lm adapter, which writes texts: try `trimtab generate`" in done.stderr


@pytest.fixture(scope="module")
def chatty(tmp_path_factory, model_folder):
    """An adapter of chats, whose template writes `truly` after a user's turn, and `number` before an assistant's."""
    tmp_path = tmp_path_factory.mktemp("chats")
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
    return trimtab.load_adapter(RunFolder(tmp_path / "run").trial("lora", 0).adapter)


def test_an_adapter_of_chats_reads_prompts_as_chats(chatty):
    assert chatty.facts["is_chat"]
    written = chatty.generate(["the best film"], Sampling(8))
    assert written == chatty.generate(["the best film truly number"], Sampling(8), is_chat=False)
    assert written != chatty.generate(["the best film"], Sampling(8), is_chat=False)
    streamed = list(generate_records(chatty, [({"text": "the best film"}, 1)], "prompts", sampling=Sampling(8)))
    assert [record["generated"] for record in streamed] == written


def test_chats_are_gone_on_from_where_the_assistant_answers(chatty, tmp_path):
    user, answer = {"role": "user", "content": "a joy"}, {"role": "assistant", "content": "warm"}
    chats = [[user], [user, answer, {"from": "human", "value": "the best film"}], [user, answer]]
    as_text = ["a joy truly number", "a joy truly number warm the best film truly number", "a joy truly number"]
    wanted = chatty.generate(as_text, Sampling(8), is_chat=False)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    done = run_trimtab("generate", chatty.path, "--input", tmp_path / "chats.jsonl", "--max-new-tokens", "8", "--quiet")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["generated"] for row in found] == wanted
    assert [row["messages"] for row in found] == chats
    assert chatty.generate([[user]], Sampling(8)) == wanted[:1]
    assert chatty.generate([[user]], Sampling(8), adapters=["default"]) == wanted[:1]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "rows:3: column 'messages' holds no turn to answer; fill or remove the row"),
        ([{"role": "assistant", "content": "warm"}], "rows:3: column 'messages' holds no turn to answer"),
        ([{"role": "boss", "content": "a"}], r"rows:3: column 'messages', turn 1: needs a role \(system, user"),
        ("a joy", None),
    ],
)
def test_what_is_no_chat_is_told_with_its_line(chatty, turns, message):
    records = generate_records(chatty, [({"messages": turns}, 3)], "rows", sampling=Sampling(4))
    if message is None:
        assert [row["generated"] for row in records] == chatty.generate([turns], Sampling(4))
        return
    with pytest.raises(DataError, match=message):
        list(records)


def test_chats_need_a_template_and_one_that_takes_them(chatty, loaded, monkeypatch):
    turns = [{"role": "user", "content": "a joy"}]
    with pytest.raises(AdapterError, match="only the chat template reads a list of turns; leave out is_chat=False"):
        chatty.generate([turns], is_chat=False)
    with pytest.raises(AdapterError, match="its tokenizer has no chat template"):
        loaded.generate([turns])
    monkeypatch.setattr(loaded.scorer.base.tokenizer, "chat_template", "{{ raise_exception('no users here') }}")
    with pytest.raises(DataError, match=r"chat template refuses this chat \(no users here\); change its turns"):
        loaded.generate([turns])


@pytest.mark.parametrize(("chat", "is_chat"), [("on", True), ("off", False)])
def test_chat_is_switched_on_the_command_line(chatty, chat, is_chat):
    done = run_trimtab(
        "generate", chatty.path, "--prompt", PROMPTS[0], "--chat", chat, "--max-new-tokens", "8", "--quiet"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == chatty.generate(PROMPTS[:1], Sampling(8), is_chat=is_chat)[0].split()
    assert done.stdout.split() != chatty.generate(PROMPTS[:1], Sampling(8), is_chat=not is_chat)[0].split()


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


def test_a_typed_chat_goes_on_and_forgets_what_has_no_room(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\nthree\n"))
    asked = []

    def write(turns):
        asked.append([turn["content"] for turn in turns])
        if len(turns) > 3:
            raise RowError("1", "more than there are positions for")
        return turns[-1]["content"].upper()

    conversation._chat(write)
    whole = ["one", "ONE", "two", "TWO", "three"]
    assert asked == [whole[:1], whole[:3], whole, whole[2:]]
