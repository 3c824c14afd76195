"""`trimtab predict` beside a `pipeline` of the merged model: rows a second, and memory over 100,000 rows.

    python benchmarks/prediction.py        about a quarter of an hour on two cores

MiniLM with LoRA on film reviews, whose sentences are repeated to make up the rows. The pipeline pads batches of 32,
as its documentation shows. Writes benchmarks/results/prediction.json and docs/prediction.md.
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
from typing import Any

import psutil
from transformers import pipeline

import trimtab
from trimtab.data import prepare_data
from trimtab.engine.frozen import NumberFormat
from trimtab.machine import describe_machine, package_versions, set_threads
from trimtab.models import quiet_libraries
from trimtab.precision import use_float32
from trimtab.prediction import predict_records
from trimtab.progress import Silent
from trimtab.runs import RunFolder
from trimtab.study_config import build_study

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "prediction.json", HERE.parent / "docs" / "prediction.md"
ROWS, TURN_ROWS, TURNS = 100_000, 2_000, 3
_TITLES = {"trimtab": "`trimtab predict`", "trimtab-int8": "`trimtab predict --precision int8`",
           "pipeline": "`pipeline(batch_size=32)` of the merged model"}  # fmt: skip
STUDY = {"model": "starter:minilm-l6", "train_data": "starter:rotten-tomatoes", "max_train_rows": 1200}


def measure_rates(adapter: Path, merged: Path, texts: list[str]) -> dict[str, Any]:
    """Rows a second of both, in turn, in one process."""
    loaded = trimtab.load_adapter(adapter)
    piped = pipeline("text-classification", model=str(merged), batch_size=32, device=-1)

    def predict(precision: NumberFormat) -> list[str]:
        records = (({"text": text}, number) for number, text in enumerate(texts))
        return [record["prediction"] for record in predict_records(loaded, records, "texts", precision=precision)]

    runs: dict[str, Callable[[], list[str]]] = {
        "trimtab": lambda: predict("float32"),
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
    differing = {name: sum(ours != theirs for ours, theirs in zip(labels, said["pipeline"], strict=True))
                 for name, labels in said.items()}  # fmt: skip
    return {"seconds": seconds, "rows_per_second": rates, "rows_with_another_label": differing}


def measure_memory(adapter: Path, texts: list[str], work: Path) -> dict[str, Any]:
    """Resident memory of the command at each tenth of the rows."""
    source, out = work / "rows.jsonl", work / "found.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for number in range(ROWS):
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
    assert written == ROWS
    tenths = [next(mib for when, mib in samples if when >= seconds * part / 10) for part in range(1, 10)]
    return {"rows": ROWS, "seconds": seconds, "mebibytes_at_each_tenth": tenths}


def write_page(found: dict[str, Any]) -> None:
    rates, memory = found["rates"]["rows_per_second"], found["memory"]
    tenths = memory["mebibytes_at_each_tenth"]
    table = "\n".join(
        f"| {_TITLES[name]} | {rate:,.0f} | {rate / rates['pipeline']:.2f} "
        f"| {found['rates']['rows_with_another_label'][name]} of {TURN_ROWS:,} |"
        for name, rate in rates.items()
    )
    PAGE.write_text(
        f"""# Prediction

Film review sentences through MiniLM with LoRA, on two cores: `trimtab predict` beside a `pipeline` (batches of 32) of
the merged model, in turn, {TURNS} turns of {TURN_ROWS:,} rows each.

```sh
python benchmarks/prediction.py
```

| | rows a second | times the pipeline | labels that differ |
| --- | --: | --: | --: |
{table}

{memory["rows"]:,} rows through the command took {memory["seconds"]:,.0f} s from its start to its end; its memory was
{tenths[0]:,.0f} MiB after a tenth of that time, {tenths[4]:,.0f} at the half, {tenths[-1]:,.0f} at nine tenths.
""",
        encoding="utf-8",
    )


def main() -> None:
    quiet_libraries()
    set_threads()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        study = build_study(STUDY | {"out": str(work / "run")})
        trimtab.run(study)
        adapter = RunFolder(work / "run").trial("lora", 0).adapter
        trimtab.merge(adapter, work / "merged")
        rows = prepare_data(build_study(STUDY | {"max_train_rows": None}), Silent()).train
        texts = [row.text for row in islice(rows, TURN_ROWS)]
        found = {
            "machine": describe_machine(),
            "versions": package_versions(),
            "rates": measure_rates(adapter, work / "merged", texts),
            "memory": measure_memory(adapter, texts, work),
        }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_page(found)
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
