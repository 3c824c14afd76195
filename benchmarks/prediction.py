"""`trimtab predict` beside a `pipeline` of the merged model: rows a second, and memory over a million rows.

    python benchmarks/prediction.py        about twenty minutes on two cores

MiniLM with LoRA on film reviews, whose test sentences are repeated to make up the rows. The pipeline pads batches of
32, as its documentation shows. The million rows are the sentences' first words, through the first layer alone.
Writes benchmarks/results/prediction.json and docs/prediction.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil
from transformers import AutoModel, AutoTokenizer, pipeline

import trimtab
from trimtab.data import prepare_data
from trimtab.engine.frozen import NumberFormat
from trimtab.machine import describe_machine, package_versions, set_threads
from trimtab.models import quiet_libraries
from trimtab.precision import use_float32
from trimtab.prediction import predict_records
from trimtab.progress import Silent
from trimtab.runs import RunFolder
from trimtab.sources import locate_model
from trimtab.study_config import build_study

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "prediction.json", HERE.parent / "docs" / "prediction.md"
ROWS, MANY_ROWS, TURN_ROWS, TURNS = 100_000, 1_000_000, 2_000, 3
FIRST_WORDS = 6
_TITLES = {"trimtab": "`trimtab predict`", "trimtab-auto": "`trimtab predict --precision auto`",
           "trimtab-int8": "`trimtab predict --precision int8`",
           "pipeline": "`pipeline(batch_size=32)` of the merged model"}  # fmt: skip
STUDY = {"model": "starter:minilm-l6", "train_data": "starter:rotten-tomatoes", "max_train_rows": 1200}


def measure_rates(adapter: Path, merged: Path, texts: list[str], labels: list[str]) -> dict[str, Any]:
    """Rows a second of both, in turn, in one process; and how often each is right."""
    loaded = trimtab.load_adapter(adapter)
    piped = pipeline("text-classification", model=str(merged), batch_size=32, device=-1)

    def predict(precision: NumberFormat | Literal["auto"]) -> list[str]:
        records = (({"text": text}, number) for number, text in enumerate(texts))
        return [record["prediction"] for record in predict_records(loaded, records, "texts", precision=precision)]

    runs: dict[str, Callable[[], list[str]]] = {
        "trimtab": lambda: predict("float32"),
        "trimtab-auto": lambda: predict("auto"),
        "trimtab-int8": lambda: predict("int8"),
        "pipeline": lambda: [found["label"] for found in piped(texts)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    said: dict[str, list[str]] = {}
    for turn in range(TURNS + 1):
        for name, run in runs.items():
            use_float32(loaded.scorer.choice.forward)
            started = time.perf_counter()
            said[name] = run()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    rates = {name: len(texts) / median(values) for name, values in seconds.items()}
    differing = {name: sum(ours != theirs for ours, theirs in zip(found, said["pipeline"], strict=True))
                 for name, found in said.items()}  # fmt: skip
    right = {name: sum(map(str.__eq__, found, labels)) / len(labels) for name, found in said.items()}
    return {"seconds": seconds, "rows_per_second": rates, "rows_with_another_label": differing, "accuracy": right}


def measure_memory(adapter: Path, texts: list[str], count: int, precision: str, work: Path) -> dict[str, Any]:
    """Resident memory of the command at each tenth of the rows."""
    source, out = work / "rows.jsonl", work / "found.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"text": texts[number % len(texts)]}) + "\n")
    command = [
        sys.executable,
        "-m",
        "trimtab",
        "predict",
        str(adapter),
        "--input",
        str(source),
        "--out",
        str(out),
        "--precision",
        precision,
        "--quiet",
    ]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    samples: list[tuple[float, float]] = []

    def watch() -> None:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                samples.append((time.perf_counter() - started, watched.memory_info().rss / (1 << 20)))
            except psutil.Error:
                return
            time.sleep(0.25)

    thread = threading.Thread(target=watch)
    thread.start()
    if process.wait():
        raise SystemExit("trimtab predict failed")
    seconds = time.perf_counter() - started
    thread.join()
    with out.open() as file:
        written = sum(1 for _ in file)
    assert written == count
    tenths = [next(mib for when, mib in samples if when >= seconds * part / 10) for part in range(1, 10)]
    return {"rows": count, "precision": precision, "seconds": seconds, "mebibytes_at_each_tenth": tenths}


def write_page(found: dict[str, Any]) -> None:
    rates, accuracy = found["rates"]["rows_per_second"], found["rates"]["accuracy"]
    streams = "\n".join(
        f"| {what} | {one['rows']:,} | {one['precision']} | {one['seconds']:,.0f} s | "
        + " | ".join(f"{one['mebibytes_at_each_tenth'][place]:,.0f}" for place in (0, 4, 8))
        + " |"
        for what, one in found["memory"].items()
    )
    table = "\n".join(
        f"| {_TITLES[name]} | {rate:,.0f} | {rate / rates['pipeline']:.2f} "
        f"| {found['rates']['rows_with_another_label'][name]} of {TURN_ROWS:,} | {accuracy[name]:.1%} |"
        for name, rate in rates.items()
    )
    PAGE.write_text(
        f"""# Prediction

Film review sentences through MiniLM with LoRA, on two cores: `trimtab predict` beside a `pipeline` (batches of 32) of
the merged model, in turn, {TURNS} turns of {TURN_ROWS:,} rows each.

```sh
python benchmarks/prediction.py
```

| | rows a second | times the pipeline | labels that differ | accuracy |
| --- | --: | --: | --: | --: |
{table}

Labels near a boundary change with `--precision int8`; `--precision auto` computes those rows anew in float32, and so
has float32's labels.

Whole files through the command, from its start to its end, and its memory in MiB after a tenth, a half and nine tenths
of that time:

| | rows | precision | time | 1/10 | 1/2 | 9/10 |
| --- | --: | --- | --: | --: | --: | --: |
{streams}
""",
        encoding="utf-8",
    )


def tune_one_layer(work: Path) -> Path:
    """An adapter on MiniLM's first layer alone."""
    source = locate_model(str(STUDY["model"]), Silent()).location
    base = AutoModel.from_pretrained(source, num_hidden_layers=1)
    base.save_pretrained(work / "base")
    AutoTokenizer.from_pretrained(source).save_pretrained(work / "base")
    trimtab.run(build_study(STUDY | {"model": str(work / "base"), "out": str(work / "small")}))
    return RunFolder(work / "small").trial("lora", 0).adapter


def main() -> None:
    quiet_libraries()
    set_threads()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        study = build_study(STUDY | {"out": str(work / "run")})
        trimtab.run(study)
        adapter = RunFolder(work / "run").trial("lora", 0).adapter
        trimtab.merge(adapter, work / "merged")
        data = prepare_data(build_study(STUDY | {"max_train_rows": None}), Silent())
        rows = list(islice([*data.test, *data.validation], TURN_ROWS))
        texts = [row.text for row in rows]
        small = tune_one_layer(work)
        found: dict[str, Any] = {
            "machine": describe_machine(),
            "versions": package_versions(),
            "rates": measure_rates(adapter, work / "merged", texts, [data.label_names[row.label] for row in rows]),
        }
        first_words = [" ".join(text.split()[:FIRST_WORDS]) for text in texts]
        found["memory"] = {
            "MiniLM, sentences": measure_memory(adapter, texts, ROWS, "auto", work),
            "its first layer, first words": measure_memory(small, first_words, MANY_ROWS, "float32", work),
        }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_page(found)
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
