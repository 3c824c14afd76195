"""What tests are made of: tiny models built from their configs, short reviews, the command itself."""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.progress import Silent

# The command reads a study's flags only where the command line asks for them; here, before any test asks for it.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", ["trimtab", "run"])
    from trimtab.cli import main

VOCABULARY = 120
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4}  # fmt: skip
LABELLED_WORDS = ["joy", "dull", "funny", "slow", "fine", "loud", "film", "story", "acting", "year"]
# Flags of a run that is over in seconds.
SHORT_TRAINING = ["--num-train-epochs=1", "--tokens-per-batch=128", "--max-length-tokens=32", "--learning-rate=0.01"]


def tiny_config(family: str, **changes: Any) -> Any:
    """A config of `family` with two layers and a hidden size of 32."""
    import transformers

    names = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "gpt2": "GPT2", "llama": "Llama",
             "qwen2": "Qwen2", "mistral": "Mistral", "xlm-roberta": "XLMRoberta", "electra": "Electra",
             "albert": "Albert", "modernbert": "ModernBert", "qwen3": "Qwen3", "gemma2": "Gemma2",
             "gemma3": "Gemma3Text", "phi3": "Phi3", "opt": "OPT", "gpt_neox": "GPTNeoX", "olmo2": "Olmo2",
             "smollm3": "SmolLM3", "granite": "Granite", "roberta-prelayernorm": "RobertaPreLayerNorm", "mpnet": "MPNet", "gpt_neo": "GPTNeo", "t5": "T5", "mt5": "MT5", "bart": "Bart"}  # fmt: skip
    settings: dict[str, Any] = _SMALL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if family == "distilbert":
        settings = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    if family == "gpt2":
        settings = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128,
                    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    if family in (
        "llama",
        "qwen2",
        "mistral",
        "qwen3",
        "gemma2",
        "gemma3",
        "phi3",
        "olmo2",
        "smollm3",
        "granite",
    ):
        settings["num_key_value_heads"] = 2
        settings["max_position_embeddings"] = 128
    if family in ("qwen3", "gemma2", "gemma3"):
        settings["head_dim"] = 8
    if family == "opt":
        settings |= {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128}
    if family in ("t5", "mt5"):
        settings = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
                    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip
    if family == "bart":
        settings = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4,
                    "decoder_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
                    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_bos_token_id": None,
                    "forced_eos_token_id": 2}  # fmt: skip
    if family == "gpt_neo":
        settings |= {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    return getattr(transformers, f"{names[family]}Config")(**(settings | changes))


_GOOD = [
    "a joy to watch",
    "warm, funny and wise",
    "the best film of the year",
    "superb acting and a fine story",
]
_BAD = ["a dull mess", "painfully slow and loud", "the worst film of the year", "weak acting and no story"]


def write_reviews(path: Path, rows: int = 160, seed: int = 0, labels: tuple[str, str] = ("good", "bad")) -> Path:
    """A CSV of short reviews whose label can be told from the words."""
    generator = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(rows):
            is_good = number % 2 == 0
            words = f"{generator.choice(_GOOD if is_good else _BAD)} number {generator.randrange(10_000)}"
            writer.writerow([words + " truly" * generator.randrange(6), labels[0] if is_good else labels[1]])
    return path


def write_tales(path: Path, rows: int = 24, seed: int = 0) -> Path:
    """A JSONL of texts in which every sentence follows the same few."""
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            sentences = [f"{generator.choice(_GOOD)} number {generator.randrange(10)}"
                         for _ in range(generator.randrange(3, 9))]  # fmt: skip
            file.write(json.dumps({"text": " truly ".join(sentences)}) + "\n")
    return path


_COLOURS = ["red", "green", "blue", "black", "white", "grey", "pink", "gold"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def write_reversals(path: Path, rows: int, seed: int, *, counted_on: bool = False) -> Path:
    """A JSONL of a few words and the same in reverse; `counted_on` names the next number for each number."""
    generator = random.Random(seed)
    following = dict(zip(NUMBERS, [*NUMBERS[1:], NUMBERS[0]], strict=True)) if counted_on else {}
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            words = generator.sample(_COLOURS + NUMBERS, generator.randrange(2, 5))
            target = [following.get(word, word) for word in reversed(words)]
            file.write(json.dumps({"source": " ".join(words), "target": " ".join(target)}) + "\n")
    return path


def save_small_t5(folder: Path) -> Path:
    """A T5 of 117,000 weights, from its config alone, that knows the words of `write_reversals`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    words = ["[PAD]", "[UNK]", "</s>", *_COLOURS, *NUMBERS]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=1,
                      num_heads=4, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def save_tiny_model(family: str, folder: Path, auto_class: str = "AutoModel") -> Path:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    is_encoder = family in ("bert", "roberta", "distilbert", "mpnet")
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    tokenizer.train_from_iterator([*_GOOD, *_BAD, "number truly 0123456789"],
                                  trainers.WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=special))  # fmt: skip
    if is_encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B [SEP]",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]"} if is_encoder else {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **names)
    torch.manual_seed(0)
    getattr(transformers, auto_class).from_config(tiny_config(family)).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


class Notes(Silent):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def run_here(study: Any, progress: Any = None) -> dict[str, Any]:
    """A run whose adapter is reloaded in this process: for tests of something else than the fresh one."""
    from trimtab.adapters import evaluate_trial
    from trimtab.study import run_study

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimtab.adapters.proof.score_in_fresh_process",
                      lambda run, trial: evaluate_trial(run, trial, Silent()))  # fmt: skip
        return run_study(study, progress)


def run_trimtab(
    *arguments: str | Path, cwd: Path | None = None, alone: bool = False
) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it, in this process if not `alone`: another one takes seconds to import all."""
    command = ["trimtab", *map(str, arguments)]
    if alone:
        in_new = [sys.executable, "-m", *command]
        return subprocess.run(in_new, capture_output=True, text=True, cwd=cwd, check=False)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        if cwd is not None:
            patch.chdir(cwd)
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled_rows(task: str, count: int = 160, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose labels can be told from single words."""
    generator = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        words = [str(word) for word in generator.choice(LABELLED_WORDS, size=generator.integers(4, 9))]
        text = " ".join(words)
        if task == "multilabel":
            rows.append({"text": text, "labels": [word for word in ("joy", "dull", "slow") if word in words]})
        elif task == "regression":
            rows.append({"text": text, "score": 10.0 + 4.0 * words.count("joy") - 3.0 * words.count("dull")})
        else:
            tags = ["B-MOOD" if word in ("joy", "dull") else "B-THING" if word == "film" else "O" for word in words]
            rows.append({"tokens": words, "tags": tags})
    return rows
