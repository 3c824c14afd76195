"""Language modelling: every token is learnt once, losses are the stock model's, and only what is asked for counts."""

import json
import math
import shutil

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from samples import run_here, run_trimtab, write_tales
from trimtab.data import Row
from trimtab.engine.batches import Collator
from trimtab.engine.forward import choose_forward
from trimtab.engine.frozen import set_adapter_training, trainable_parameters
from trimtab.engine.fused import native
from trimtab.engine.prepare import prepare_adapted
from trimtab.errors import DataError
from trimtab.methods import attach_adapter
from trimtab.runs import RunFolder, read_json
from trimtab.study_config import build_study
from trimtab.tasks import get_task
from trimtab.tasks.examples import Example
from trimtab.tasks.token_loss import Readout, chunk_positions

TASK = get_task("causal_lm")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder("llama"))


def encode(tokenizer, *rows, length=8):
    return TASK.encode(rows, tokenizer, None, length)


def learnt(tokenizer, example):
    return tokenizer.decode(example.labels)


def test_every_token_but_the_first_is_learnt_once(tokenizer):
    text = "a joy to watch number 1234567890 truly truly truly the best film of the year"
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    encoded = encode(tokenizer, Row("train:1", text), Row("train:2", "a joy"))
    labels = [
        label
        for example, row in zip(encoded.examples, encoded.rows, strict=True)
        if row == 0
        for label in example.labels
    ]
    assert labels == whole[1:]
    assert encoded.rows == [0] * (len(encoded.examples) - 1) + [1]
    for example in encoded.examples:
        assert 2 <= len(example) <= 8
        assert [example.input_ids[place + 1] for place in example.positions] == example.labels


@pytest.mark.parametrize("length", [3, 5, 8, 100])
def test_no_block_is_left_without_a_token_to_learn(tokenizer, length):
    for words in range(2, 20):
        encoded = encode(tokenizer, Row("train:1", "truly " * words), length=length)
        assert sum(len(example.labels) for example in encoded.examples) == words
        assert all(example.labels for example in encoded.examples)


def test_only_the_completion_is_learnt(tokenizer):
    row = Row("train:1", "the best film", completion="of the year")
    example = encode(tokenizer, row).examples[0]
    assert learnt(tokenizer, example) == "of the year [SEP]"
    assert tokenizer.decode(example.input_ids) == "the best film of the year [SEP]"


def test_a_long_prompt_is_cut_at_its_beginning(tokenizer):
    row = Row("train:1", "truly " * 20 + "the best film", completion="of the year")
    encoded = encode(tokenizer, row)
    assert encoded.truncated == 1
    assert learnt(tokenizer, encoded.examples[0]) == "of the year [SEP]"
    assert tokenizer.decode(encoded.examples[0].input_ids) == "truly the best film of the year [SEP]"
    row = Row("train:1", "the best film", completion="truly " * 20)
    assert learnt(tokenizer, encode(tokenizer, row).examples[0]) == " ".join(["truly"] * 7)


def test_only_the_assistant_is_learnt(tokenizer):
    tokenizer.chat_template = TEMPLATE
    turns = [("user", "the best"), ("assistant", "film"), ("user", "of"), ("assistant", "the year")]
    row = Row("train:1", "", messages=[{"role": role, "content": content} for role, content in turns])
    example = encode(tokenizer, row, length=50).examples[0]
    assert learnt(tokenizer, example) == "film [SEP] the year [SEP]"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system here') }}", r"row train:1: .*template refuses this chat \(no system here\)"),
        (
            "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}",
            r"row train:1: .*another way",
        ),
    ],
)
def test_templates_that_fail_are_told(tokenizer, template, message):
    tokenizer.chat_template = template
    turns = [("user", "the best"), ("assistant", "film"), ("user", "of"), ("assistant", "the year")]
    row = Row("train:1", "", messages=[{"role": role, "content": content} for role, content in turns])
    with pytest.raises(DataError, match=message):
        encode(tokenizer, row, length=50)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 2.0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunks_give_what_all_logits_give(scale, softcap, with_bias):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(600, 16, generator=generator).requires_grad_()
    weight = torch.randn(90, 16, generator=generator)
    bias = torch.randn(90, generator=generator) if with_bias else None
    labels = torch.randint(90, (600,), generator=generator)
    readout = Readout(weight, bias, scale, softcap)

    def results(loss):
        return loss.detach(), torch.autograd.grad(3.0 * loss, states)[0]

    expected = results(F.cross_entropy(readout.logits(states), labels))
    found = results(readout.learnt_losses(states, labels).mean())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    trained = readout._replace(weight=weight.clone().requires_grad_())
    torch.testing.assert_close(results(trained.learnt_losses(states, labels).mean()), expected, atol=1e-6, rtol=1e-5)
    losses, hits = readout.losses(states.detach(), labels)
    torch.testing.assert_close(losses.mean(), expected[0])
    assert torch.equal(hits, readout.logits(states).argmax(-1) == labels)


def test_what_was_scored_first_can_be_trained():
    readout = Readout(torch.randn(37, 4), None, 1.0, None)  # a vocabulary that no other test has
    states, labels = torch.randn(5, 4), torch.arange(5)
    with torch.inference_mode():
        losses, _ = readout.losses(states, labels)
    loss = readout.learnt_losses(states.requires_grad_(), labels).mean()
    loss.backward()
    torch.testing.assert_close(loss.detach(), losses.mean().clone())
    assert states.grad is not None
    assert states.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("vocabulary", "positions"), [(90, 256), (49_152, 256), (151_936, 82), (262_144, 48), (10**6, 32)]
)
def test_a_larger_vocabulary_takes_shorter_chunks(vocabulary, positions):
    assert chunk_positions(vocabulary) == positions


def test_a_truth_that_is_next_to_impossible_has_its_loss():
    states = torch.tensor([[200.0, 0.0], [0.0, 1.0]]).requires_grad_()
    readout, labels = Readout(torch.eye(2), None, 1.0, None), torch.tensor([1, 1])
    loss = readout.learnt_losses(states, labels).mean()
    torch.testing.assert_close(loss, F.cross_entropy(states, labels))
    assert torch.isfinite(torch.autograd.grad(loss, states)[0]).all()


def examples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length, first in ((9, 1), (4, 2), (9, 5), (2, 1), (17, 1)):
        ids = torch.randint(5, 100, (length,), generator=generator).tolist()
        made.append(Example(ids, None, list(range(first - 1, length - 1)), ids[first:]))
    return made


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "qwen2", "mistral", "gemma2", "granite", "gpt_neox", "opt", "gpt_neo"]
)
def test_losses_and_gradients_are_the_stock_models(tiny_model, family):
    """The stock model on each text alone, its labels as transformers takes them."""
    model = tiny_model(family, auto_class="AutoModelForCausalLM")
    stock_attention = model.config._attn_implementation
    choice = choose_forward(model, 0, 32, False)
    assert choice.forward.packed == (family != "gpt_neo"), choice.reason
    targets = "all-linear" if family == "gpt_neo" else "auto"
    study = build_study({"task": "causal_lm", "lora_dropout": 0.0, "target_modules": targets})
    peft_model = attach_adapter(model, study, [])
    prepare_adapted(peft_model, choice)
    with torch.no_grad():
        for name, parameter in trainable_parameters(peft_model).items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    set_adapter_training(peft_model, True)
    texts = examples()
    batch = Collator(texts, choice.forward.packed, choice.position_offset, 0).collate(range(len(texts)))
    loss = TASK.loss(choice.forward, batch)
    parameters = list(trainable_parameters(peft_model).values())
    found = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        outputs = TASK.outputs(choice.forward, batch)
    if choice.forward.packed:
        model.set_attn_implementation(stock_attention)
    sums = []
    for text in texts:
        labels = torch.full((1, len(text)), -100)
        labels[0, [place + 1 for place in text.positions]] = torch.tensor(text.labels)
        sums.append(
            model(input_ids=torch.tensor([text.input_ids]), labels=labels, use_cache=False).loss * len(text.labels)
        )
    expected = torch.stack(sums).sum() / sum(len(text.labels) for text in texts)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, torch.autograd.grad(expected, parameters), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[:, 0].mean(), expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def finished(request, tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("tales")
    comparison = run_here(build_study(
        {"model": str(model_folder(request.param, "AutoModelForCausalLM")), "task": "causal_lm",
         "train_data": str(write_tales(folder / "tales.jsonl", 100)), "max_length_tokens": 16, "tokens_per_batch": 64,
         "num_train_epochs": 8, "learning_rate": 0.02, "out": str(folder / "run")}
    ))  # fmt: skip
    return RunFolder(folder / "run"), comparison


def test_tuning_lowers_the_perplexity_of_held_out_texts(finished):
    _, comparison = finished
    systems = {system["name"]: system["metrics"] for system in comparison["systems"]}
    assert systems.keys() == {"token-frequencies", "base-model", "lora-s0"}
    assert systems["lora-s0"].keys() == {"perplexity", "loss", "token_accuracy"}
    assert comparison["primary_metric"] == "perplexity"
    for metrics in systems.values():
        assert metrics["perplexity"]["value"] == pytest.approx(math.exp(metrics["loss"]["value"]))
        assert metrics["perplexity"]["low"] <= metrics["perplexity"]["value"] <= metrics["perplexity"]["high"]
    contrast = next(c for c in comparison["contrasts"] if c["against"] == "base-model")
    assert contrast["test"] == "paired_bootstrap"
    assert contrast["verdict"] == "better"
    assert contrast["difference"] < 0
    assert comparison["reload"]["passed"]


@pytest.mark.skipif(not native.has_int8(), reason="no int8 products")
def test_a_run_in_int8_rounds_the_vocabulary_too(tmp_path, model_folder):
    run_here(build_study(
        {"model": str(model_folder("llama", "AutoModelForCausalLM")), "task": "causal_lm", "precision": "int8",
         "train_data": str(write_tales(tmp_path / "tales.jsonl", 60)), "max_length_tokens": 16, "num_train_epochs": 1,
         "out": str(tmp_path / "run")}
    ))  # fmt: skip
    run = RunFolder(tmp_path / "run")
    errors = read_json(run.trial("lora", 0).training)["errors"]
    assert errors[-1]["group"] == "vocabulary head"
    tuned = next(system for system in run.systems() if system.name == "lora-s0")
    assert read_json(tuned.metrics)["in_training_precision"]["precision"] == "int8"


def test_stock_peft_gives_the_same_losses(finished):
    """No Trimtab code from here on, but for the cut into blocks."""
    run, _ = finished
    from peft import AutoPeftModelForCausalLM

    trial = run.trial("lora", 0)
    model = AutoPeftModelForCausalLM.from_pretrained(str(trial.adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(trial.adapter))
    rows = [json.loads(line) for line in run.test_rows.read_text().splitlines()]
    predicted = [json.loads(line) for line in trial.predictions.read_text().splitlines()]
    for row, ours in zip(rows, predicted, strict=True):
        blocks = TASK.encode([Row(**row)], tokenizer, None, 16).examples
        losses = []
        for block in blocks:
            ids = torch.tensor([block.input_ids])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1].double()
            losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
        assert ours["tokens"] == sum(map(len, losses))
        assert ours["loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=2e-4)


def test_the_report_speaks_of_perplexity(finished):
    run, comparison = finished
    text = run.report_markdown.read_text()
    assert "perplexity from" in text
    assert "untrained head" not in text
    assert "linear probe" not in text
    assert "confusion" not in text.lower()
    samples = [json.loads(line) for line in run.trial("lora", 0).samples.read_text().splitlines()]
    assert [sample["id"] for sample in samples] == [json.loads(line)["id"] for line in run.test_rows.open()][:4]
    assert all(sample["base"] != sample["tuned"] for sample in samples)
    assert "What base and LoRA, tuned write" in text
    done = run_trimtab("compare", run.baseline("base-model").path, run.path, "--json")
    found = json.loads(done.stdout)["contrasts"][0]
    expected = next(c for c in comparison["contrasts"] if c["against"] == "base-model")
    assert found["difference"] == pytest.approx(expected["difference"])
    assert run_trimtab("compare", run.path, run.path, "--metric", "accuracy").returncode == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}] * 20 + [{"prompt": "a", "completion": " "}],
            r"21: no text in column 'completion'",
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}]}] * 20,
            r":1: column 'messages' has no turn of the assistant",
        ),
        ([{"messages": "a"}] * 20, r":1: column 'messages' holds no list of turns"),
        ([{"messages": [{"role": "boss", "content": "a"}]}] * 20, r":1: column 'messages', turn 1: needs a role"),
        ([{"other": "a"}] * 20, r"no column looks like the text; its columns are: other"),
    ],
)
def test_bad_rows_are_told_before_weights_are_read(tmp_path, rows, message):
    from trimtab.data import prepare_data
    from trimtab.progress import Silent

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = build_study({"task": "causal_lm", "train_data": str(tmp_path / "rows.jsonl")})
    with pytest.raises(DataError, match=message):
        prepare_data(study, Silent())


def test_a_template_that_fails_is_told_before_weights_are_read(model_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    tokenizer.save_pretrained(folder)
    turns = [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "the best"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 30)
    monkeypatch.setattr("trimtab.study.load_base", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(DataError, match="roles must alternate"):
        run_here(build_study({"task": "causal_lm", "model": str(folder), "train_data": str(tmp_path / "rows.jsonl"),
                              "out": str(tmp_path / "run")}))  # fmt: skip


def test_an_encoder_is_refused(model_folder, tmp_path):
    done = run_trimtab("run", "--task=causal_lm", f"--model={model_folder('bert')}",
                       f"--train-data={write_tales(tmp_path / 'tales.jsonl')}", f"--out={tmp_path / 'run'}")  # fmt: skip
    assert done.returncode == 2
    assert "cannot be used for causal language modelling; choose a decoder" in done.stderr
