"""Many adapters on one base: a batch whose rows name different adapters, beside the same batch for one of them.

    python benchmarks/switching.py        about three minutes on two cores

LoRA r 8 on q and v of SmolLM2, 64 film reviews a batch, in turn: one adapter for all rows; 32 adapters with two rows
each, in one pass; the same 32 one after the other; and peft's own mixed batches (`adapter_names`), padded.
Writes benchmarks/results/switching.json and docs/switching.md.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import trimtab
from trimtab.adapters.loaded import LoadedAdapter
from trimtab.data import prepare_data
from trimtab.machine import describe_machine, package_versions, set_threads
from trimtab.models import quiet_libraries
from trimtab.progress import Silent
from trimtab.sources import locate_model
from trimtab.study_config import build_study

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "switching.json", HERE.parent / "docs" / "switching.md"
MODEL, DATA = "starter:smollm2-135m", "starter:rotten-tomatoes"
ADAPTERS, ROWS, TURNS = 32, 64, 7
_TITLES = {
    "one": "Trimtab, one adapter for all rows",
    "mixed": "Trimtab, 32 adapters in one pass",
    "in turn": "Trimtab, 32 adapters one after the other",
    "peft": "peft, 32 adapters (`adapter_names`), padded",
}


def make_adapters(base: str, folder: Path) -> dict[str, Path]:
    """Random LoRA and heads of 2 classes, as peft writes them: what they say is of no matter here."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        config = LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        wrapped = get_peft_model(model, config)
        wrapped.save_pretrained(folder / f"a{number}")
        model = wrapped.unload()
    return {f"a{number}": folder / f"a{number}" for number in range(ADAPTERS)}


def predict_in_turn(loaded: LoadedAdapter, texts: list[str], asked: list[str]) -> None:
    for name in sorted(set(asked)):
        loaded.switch(name)
        loaded.predict([text for text, wanted in zip(texts, asked, strict=True) if wanted == name])


class Peft:
    """The same adapters in peft alone, whose heads all have one size."""

    def __init__(self, base: str, adapters: dict[str, Path]) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.tokenizer.padding_side = "right"
        model.config.pad_token_id = self.tokenizer.pad_token_id
        first, *others = adapters
        self.model = PeftModel.from_pretrained(model, adapters[first], adapter_name=first)
        for name in others:
            self.model.load_adapter(adapters[name], adapter_name=name)
        self.model.eval()

    def predict(self, texts: list[str], asked: list[str]) -> torch.Tensor:
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            return torch.softmax(self.model(**inputs, adapter_names=asked).logits, -1)


def measure() -> dict[str, Any]:
    study = build_study({"model": MODEL, "train_data": DATA})
    texts = [row.text for row in prepare_data(study, Silent()).test[:ROWS]]
    base = locate_model(MODEL, Silent()).location
    with tempfile.TemporaryDirectory() as work:
        adapters = make_adapters(base, Path(work))
        loaded = trimtab.load_adapter(adapters["a0"], MODEL, name="a0")
        started = time.perf_counter()
        for name in list(adapters)[1:]:
            loaded.load(adapters[name], name)
        load_seconds = (time.perf_counter() - started) / (ADAPTERS - 1)
        peft = Peft(base, adapters)
    asked = [f"a{number % ADAPTERS}" for number in range(ROWS)]
    ours = torch.tensor([list(said["probabilities"].values()) for said in loaded.predict(texts, asked)])
    runs: dict[str, Callable[[], object]] = {
        "one": lambda: loaded.predict(texts),
        "mixed": lambda: loaded.predict(texts, asked),
        "in turn": lambda: predict_in_turn(loaded, texts, asked),
        "peft": lambda: peft.predict(texts, asked),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS + 1):
        loaded.switch("a0")
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    return {
        "machine": describe_machine(),
        "versions": package_versions(),
        "rows": ROWS,
        "adapters": ADAPTERS,
        "load_seconds": load_seconds,
        "largest_difference_from_peft": float((ours - peft.predict(texts, asked)).abs().max()),
        "seconds": seconds,
        "median_seconds": {name: median(values) for name, values in seconds.items()},
        "ratio_to_one": {name: median(values) / median(seconds["one"]) for name, values in seconds.items()},
    }


def write_page(found: dict[str, Any]) -> None:
    lines = [
        "# Many adapters on one base\n",
        f"{ADAPTERS} adapters (LoRA, r 8, q and v, with heads; their weights are random) around one SmolLM2 in one "
        f"process, {ROWS} film reviews a batch, on two cores ({found['machine']['processor']}): medians of {TURNS} "
        "turns. [adapters.md](adapters.md) shows how to use them.\n",
        "```sh\npython benchmarks/switching.py\n```\n",
        "| | milliseconds a row | times one adapter |",
        "| --- | --: | --: |",
    ]
    for name, value in found["median_seconds"].items():
        lines.append(f"| {_TITLES[name]} | {1000 * value / ROWS:.1f} | {found['ratio_to_one'][name]:.2f} |")
    lines.append(
        f"\nA further adapter is loaded in {found['load_seconds']:.2f} s, the base in memory once. Probabilities "
        f"differ from peft's by up to {found['largest_difference_from_peft']:.1e}."
    )
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    quiet_libraries()
    set_threads()
    found = measure()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_page(found)
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
