"""`trimtab predict` beside a `pipeline` of the merged model: rows a second, and memory over a million rows.

    python benchmarks/prediction.py        about half an hour on two cores

MiniLM with LoRA on film reviews, whose sentences are repeated to make up the rows. The pipeline pads batches of 32, as
its documentation shows. The million rows are the sentences' first words, through the first layer alone.
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


def measure_pipeline(merged: Path, texts: list[str], count: int) -> tuple[float, list[str]]:
    """Seconds and labels of the pipeline over as many rows, from when it is ready."""
    piped = pipeline("text-classification", model=str(merged), batch_size=32, device=-1)
    rows = (texts[number % len(texts)] for number in range(count))
    started = time.perf_counter()
    labels = [found["label"] for found in piped(rows)]
    return time.perf_counter() - started, labels


def measure_whole_files(adapter: Path, merged: Path, texts: list[str], work: Path) -> dict[str, Any]:
    """The same 100,000 rows through each, once: time, memory, and labels that are not float32's."""
    found: dict[str, Any] = {}
    labels: dict[str, list[str]] = {}
    for precision in ("float32", "auto"):
        found[precision] = measure_command(adapter, texts, ROWS, precision, work)
        with (work / "found.jsonl").open(encoding="utf-8") as file:
            labels[precision] = [json.loads(line)["prediction"] for line in file]
    seconds, labels["pipeline"] = measure_pipeline(merged, texts, ROWS)
    found["pipeline"] = {"rows": ROWS, "seconds": seconds}
    for name, one in found.items():
        one["other_labels_than_float32"] = sum(map(str.__ne__, labels[name], labels["float32"]))
    return found


def measure_command(adapter: Path, texts: list[str], count: int, precision: str, work: Path) -> dict[str, Any]:
    """Time of the command from its start to its end, and its resident memory at each tenth of that."""
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


_PAGE = """# Prediction

```sh
trimtab predict ADAPTER --input new.csv --text-column review --out predictions.csv
tail -f reviews.txt | trimtab predict ADAPTER
trimtab predict ADAPTER --adapter none --input new.csv --out base.csv
```

ADAPTER is a folder such as `runs/reviews/trials/lora-s0/adapter`, or `owner/name` on the Hub. Rows come from whatever
`trimtab run` reads, without labels, or from standard input: JSON objects, or a plain text a line. Each goes out as it
came in, with what the adapter says of it beside it, as JSONL, CSV or Parquet by the name of `--out`:

```json
{{"text": "a joy from start to end", "prediction": "fresh", "probabilities": {{"fresh": 0.97, "rotten": 0.03}}}}
```

A row that cannot be read ends it with the file and the line, and `--out` is written whole or not at all. Texts that are
longer than the adapter was trained for are cut there, and counted at the end. `--adapter none` asks the base alone.

## What it costs

Film review sentences through MiniLM with LoRA on two cores ({processor}), beside a `pipeline` (batches of 32) of the
merged model.

```sh
python benchmarks/prediction.py
```

In one process, in turn, medians of {turns} turns of {turn_rows:,} rows each; other labels are those that the
pipeline does not give:

| | rows a second | times the pipeline | other labels | accuracy |
| --- | --: | --: | --: | --: |
{rates}

`--precision auto` computes in int8, and anew in float32 where the two likeliest labels are closer than the largest
error of int8 on the first 256 rows. The same over {rows:,} rows, once each: the data set's sentences, repeated. The
command from its start to its end (the pipeline without its start), with the labels that are not float32's, and memory
in MiB after a tenth, a half and nine tenths of the time:

| | time | times the pipeline | other labels than float32's | 1/10 | 1/2 | 9/10 |
| --- | --: | --: | --: | --: | --: | --: |
{files}

A million rows, so that a leak of a few bytes a row would show (first words, through MiniLM's first layer alone, which
is quicker): {many_seconds:,.0f} s, {many} MiB.
"""


def write_page(found: dict[str, Any]) -> None:
    rates, accuracy = found["rates"]["rows_per_second"], found["rates"]["accuracy"]
    files, many = found["files"], found["many_rows"]
    peer = files["pipeline"]["seconds"]

    def memory(one: dict[str, Any], between: str) -> str:
        tenths = one.get("mebibytes_at_each_tenth")
        return between.join(f"{tenths[place]:,.0f}" for place in (0, 4, 8)) if tenths else between.join(3 * ["–"])

    names = {"float32": "trimtab", "auto": "trimtab-auto", "pipeline": "pipeline"}
    PAGE.write_text(
        _PAGE.format(
            processor=found["machine"]["processor"],
            turns=TURNS,
            turn_rows=TURN_ROWS,
            rows=ROWS,
            rates="\n".join(
                f"| {_TITLES[name]} | {rate:,.0f} | {rate / rates['pipeline']:.2f} "
                f"| {found['rates']['rows_with_another_label'][name]} of {TURN_ROWS:,} | {accuracy[name]:.1%} |"
                for name, rate in rates.items()
            ),
            files="\n".join(
                f"| {_TITLES[names[name]]} | {one['seconds']:,.0f} s | {peer / one['seconds']:.2f} "
                f"| {one['other_labels_than_float32']} | {memory(one, ' | ')} |"
                for name, one in files.items()
            ),
            many_seconds=many["seconds"],
            many=memory(many, ", "),
        ),
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
        every = [row.text for row in (*data.test, *data.validation, *data.train)]
        first_words = [" ".join(text.split()[:FIRST_WORDS]) for text in texts]
        found: dict[str, Any] = {
            "machine": describe_machine(),
            "versions": package_versions(),
            "rates": measure_rates(adapter, work / "merged", texts, [data.label_names[row.label] for row in rows]),
            "files": measure_whole_files(adapter, work / "merged", every, work),
            "many_rows": measure_command(small, first_words, MANY_ROWS, "float32", work),
        }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write_page(found)
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
