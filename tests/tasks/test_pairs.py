"""Pairs of texts: a border between them for every tokenizer, the same in training, in prediction and in stock use."""

import csv
import json

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from samples import run_here
from trimtab.adapters import load_adapter
from trimtab.data import Row
from trimtab.prediction import predict_records
from trimtab.runs import RunFolder, read_jsonl
from trimtab.study_config import build_study
from trimtab.support import build_tiny_model
from trimtab.tasks import get_task
from trimtab.tasks.sequences import pair_separator

TASK = get_task("classification")
PAIRS = [("a b", "c"), ("a", "b c")]


@pytest.fixture(scope="module")
def byte_level():
    """As GPT-2's and SmolLM2's: nothing is put between two texts, and a line break is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(["a b c", "the film"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|end|>", eos_token="<|end|>")


def encode(tokenizer, pairs, length=64):
    model = build_tiny_model(TASK, "Llama")
    rows = [Row(str(number), first, second) for number, (first, second) in enumerate(pairs)]
    return TASK.encode(rows, tokenizer, model, length)


def test_where_a_text_ends_makes_a_difference(byte_level):
    one, other = (example.input_ids for example in encode(byte_level, PAIRS).examples)
    assert one != other
    assert one == byte_level("a b\nc")["input_ids"]
    assert other == byte_level("a\nb c")["input_ids"]


@pytest.mark.parametrize(("family", "separator"), [("bert", None), ("llama", "[SEP]")])
def test_the_border_that_a_tokenizer_takes(model_folder, family, separator):
    """An encoder's own; the end of text where line breaks give no token, as with words between blanks."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder(family))
    assert pair_separator(tokenizer) == separator
    pairs = [("best film", "year"), ("best", "film year")]
    one, other = (tokenizer.decode(example.input_ids) for example in encode(tokenizer, pairs).examples)
    if family == "bert":
        assert (one, other) == ("[CLS] best film [SEP] year [SEP]", "[CLS] best [SEP] film year [SEP]")
    else:
        assert (one, other) == ("best film [SEP] year", "best [SEP] film year")


def test_a_tokenizers_own_separator_comes_first(byte_level):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level.backend_tokenizer, eos_token="<|end|>")
    tokenizer.add_special_tokens({"sep_token": "<|sep|>"})
    assert pair_separator(tokenizer) == "<|sep|>"
    assert tokenizer.sep_token_id in tokenizer("a<|sep|>b")["input_ids"]


@pytest.mark.parametrize(
    ("pair", "kept"),
    [
        (("a" * 30, "c"), "aaaaaaaaaa\nc"),
        (("a", "c" * 30), "a\ncccccccccc"),
        (("a" * 30, "c" * 30), "aaaaaa\nccccc"),
        (("a" * 10, "c"), "aaaaaaaaaa\nc"),
    ],
)
def test_the_longer_text_is_cut(byte_level, pair, kept):
    encoded = encode(byte_level, [pair, ("a", "c")], length=12)
    assert byte_level.decode(encoded.examples[0].input_ids) == kept
    assert len(encoded.examples[0]) == 12
    assert encoded.truncated == (len("".join(pair)) > 11)


def test_the_card_says_how_stock_peft_reads_them(tmp_path, model_folder):
    """What the card's own lines give is what the run said, and what `predict` says."""
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "answer", "label"])
        for number in range(120):
            first, second = ("best film", "year") if number % 2 else ("best", "film year")
            writer.writerow([f"{first} truly", f"{second} number {number}", number % 2])
    run_here(build_study(
        {"model": str(model_folder("llama")), "train_data": str(tmp_path / "pairs.csv"), "text_pair_column": "answer",
         "max_length_tokens": 32, "tokens_per_batch": 128, "num_train_epochs": 1, "out": str(tmp_path / "run")}
    ))  # fmt: skip
    run = RunFolder(tmp_path / "run")
    trial = run.trial("lora", 0)
    card = trial.model_card.read_text().replace("FOLDER", str(trial.adapter))
    code = card.split("```python\n")[1].split("```")[0]
    assert 'tokenizer(first + "[SEP]" + second, return_tensors="pt")' in code
    said = [json.loads(line)["probabilities"] for line in trial.predictions.read_text().splitlines()]
    rows = list(read_jsonl(run.test_rows))
    for row, ours in list(zip(rows, said, strict=True))[:4]:
        names = {"first": row["text"], "second": row["text_pair"]}
        exec(code, names)  # as a reader of the card would
        names["inputs"].pop("token_type_ids", None)
        with torch.no_grad():
            stock = names["model"](**names["inputs"]).logits.double().softmax(-1)[0].tolist()
        assert list(ours.values()) == pytest.approx(stock, abs=1e-4)
    records = [({"text": row["text"], "answer": row["text_pair"]}, number) for number, row in enumerate(rows, 1)]
    again = [row["probabilities"] for row in predict_records(load_adapter(trial.adapter), iter(records), "rows")]
    assert [list(one.values()) for one in again] == [pytest.approx(list(ours.values()), abs=1e-5) for ours in said]
    assert AutoPeftModelForSequenceClassification.__name__ in code
