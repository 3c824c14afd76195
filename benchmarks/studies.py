"""Whole studies as `trimtab run` does them: what was estimated beside what happened, number formats side by side, a
language model before and after, and a merge of what was trained on 4 bits.

    python benchmarks/studies.py                       all of them, over half an hour
    python benchmarks/studies.py --only "LoRA, int8"   one; the others stay as they were

Writes benchmarks/results/studies.json and docs/studies.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trimtab.machine import describe_machine, package_versions
from trimtab.runs import RunFolder, read_json

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "studies.json", HERE.parent / "docs" / "studies.md"

# The starter study (SmolLM2 on film reviews) with these flags over it, or another study.
_FORMATS = {
    "LoRA, float32": ["--precision=float32"],
    "LoRA, int8": ["--precision=int8"],
    "LoRA, bitsandbytes 8 bits": ["--quantize=8bit"],
    "LoRA, bitsandbytes 4 bits": ["--quantize=4bit"],
}
_FEWER = ["--max-train-rows=2000", "--max-validation-rows=300", "--max-test-rows=800"]
STUDIES = _FORMATS | {
    "prefix tuning": ["--method=prefix_tuning"],
    "LoRA, tales": ["--task=causal_lm", "--train-data=starter:grimm-tales", "--max-train-rows=16", "--precision=auto"],
    "LoRA, MiniLM, Reuters": ["--model=starter:minilm-l6", "--train-data=starter:reuters-r8", *_FEWER],
    "full, MiniLM, film reviews": ["--model=starter:minilm-l6", "--method=full", *_FEWER],
}


# Studies whose adapter is merged into the base's weights in full precision.
MERGED = ("LoRA, bitsandbytes 4 bits",)


def call_trimtab(name: str, *arguments: str) -> str:
    """The command in a process of its own; what it prints."""
    command = [sys.executable, "-m", "trimtab", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return done.stdout


def run_study(name: str, work: Path) -> dict[str, Any]:
    """One study, and the merge of its adapter where it is among `MERGED`."""
    out = work / "run"
    call_trimtab(name, "run", "--quiet", *STUDIES[name], "--out", str(out), "--overwrite")
    run = RunFolder(out)
    comparison = read_json(run.comparison)
    tuned = next(system for system in comparison["systems"] if system["kind"] == "tuned")
    base = next(system for system in comparison["systems"] if system["kind"] == "base")
    contrast = next(found for found in comparison["contrasts"] if found["against"] == base["name"])
    metric = comparison["primary_metric"]
    merged = {}
    if name in MERGED:
        told = call_trimtab(name, "merge", str(out), "--out", str(work / "merged"), "--quiet", "--json")
        merged = {"merge": json.loads(told)}
    return merged | {
        "study": name,
        "flags": STUDIES[name],
        "metric": metric,
        "score": tuned["metrics"][metric],
        "base": base["metrics"][metric],
        "contrast": contrast,
        "trainable_parameters": tuned["cost"]["trainable_parameters"],
        "tokens_per_second": tuned["cost"]["tokens_per_second"],
        "peak_memory_bytes": tuned["cost"]["peak_memory_bytes"],
        "seconds": sum(read_json(run.manifest)["seconds"].values()),
        "estimate": read_json(run.estimate),
    }


_INTRODUCTION = """# Whole studies

Each is one `trimtab run` with the flags shown over the starter study (or the data named), on two cores.

```sh
python benchmarks/studies.py
```

## Estimated and measured

What `trimtab estimate` says before any weight is read, and what the run took. Trainable parameters are exact.

| study | trainable | memory: estimated | measured | ratio | time: estimated | measured | ratio |
| --- | --: | --: | --: | --: | --: | --: | --: |"""

_FORMATS_INTRODUCTION = """
## Number formats

The same study with its base in four formats: SmolLM2 on film reviews, LoRA. `--precision int8` trains from int8 copies,
in kernels of its own, and scores in float32, whose weights it reads from their file again; bitsandbytes holds 8 or 4
bits only, and takes them apart again for each product. Peak memory is that of the whole process, reading the weights
included. Rows may be of different days and versions of Trimtab: on a shared machine their speeds do not compare
well, and docs/performance.md has float32 and int8 in turns.

| base | peak memory | training tokens/s | accuracy [95 % interval] |
| --- | --: | --: | --: |"""


_LANGUAGE_INTRODUCTION = """
## A language model before and after

Perplexity on held-out tales, of the base as it is and of the tuned model, with 95 % intervals over the tales.

| study | base | tuned | difference | verdict |
| --- | --: | --: | --: | --- |"""

_MERGE_INTRODUCTION = """
## Merged from 4 bits into full precision

The adapter that was trained on a base in 4 bits goes into the base's weights in full precision (`trimtab merge`).
The first score is that of base and adapter in 4 bits, on all test rows; the other two are on the rows that the merge
was judged on: the adapter on the base in full precision, and the merged model. The difference is the largest of any
output between these two.

| study | rows | in 4 bits | full precision | merged | largest difference of outputs |
| --- | --: | --: | --: | --: | --: |"""


def _interval(metric: dict[str, float], form: str) -> str:
    value, low, high = (format(metric[part], form) for part in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def language_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The table of studies that are judged by perplexity; nothing where none was run."""
    found = [row for row in rows.values() if row["metric"] == "perplexity" and "base" in row]
    lines = [
        f"| {row['study']} | {_interval(row['base'], '.2f')} | {_interval(row['score'], '.2f')} "
        f"| {row['contrast']['difference']:+.2f} | {row['contrast']['verdict']} |"
        for row in found
    ]
    return [_LANGUAGE_INTRODUCTION, *lines] if lines else []


def merge_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The table of merges; nothing where none was made."""
    lines = [
        f"| {name} | {merge['rows']} | {merge['trained']:.1%} | {merge['before']:.1%} | {merge['after']:.1%} "
        f"| {merge['max_abs_difference']:.1e} (at most {merge['bound']:g}) |"
        for name, merge in ((row["study"], row["merge"]) for row in rows.values() if "merge" in row)
    ]
    return [_MERGE_INTRODUCTION, *lines] if lines else []


def write_page(rows: dict[str, dict[str, Any]]) -> None:
    lines = [_INTRODUCTION]
    for row in rows.values():
        estimate = row["estimate"]
        memory, said = row["peak_memory_bytes"] / (1 << 30), estimate["peak_memory_bytes"] / (1 << 30)
        lines.append(
            f"| {row['study']} | {row['trainable_parameters']:,} | {said:.2f} GiB | {memory:.2f} GiB "
            f"| {memory / said:.2f} | {estimate['total_seconds']:,.0f} s | {row['seconds']:,.0f} s "
            f"| {row['seconds'] / estimate['total_seconds']:.2f} |"
        )
    lines.append(_FORMATS_INTRODUCTION)
    for row in (rows[name] for name in _FORMATS if name in rows):
        value, low, high = (100 * row["score"][part] for part in ("value", "low", "high"))
        lines.append(
            f"| {row['study'].removeprefix('LoRA, ')} | {row['peak_memory_bytes'] / (1 << 30):.2f} GiB "
            f"| {row['tokens_per_second']:,.0f} | {value:.1f} % [{low:.1f}, {high:.1f}] |"
        )
    lines += language_lines(rows) + merge_lines(rows)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    arguments = parser.parse_args()
    kept = json.loads(RESULTS.read_text())["studies"] if RESULTS.is_file() else []
    rows = {row["study"]: row for row in kept}
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as work:
            rows[name] = run_study(name, Path(work))
        ratios = (rows[name]["peak_memory_bytes"] / rows[name]["estimate"]["peak_memory_bytes"],
                  rows[name]["seconds"] / rows[name]["estimate"]["total_seconds"])  # fmt: skip
        print(f"{name}: memory {ratios[0]:.2f}, time {ratios[1]:.2f} times the estimate", flush=True)
        ordered = {study: rows[study] for study in STUDIES if study in rows}
        found = {"machine": describe_machine(), "versions": package_versions(), "studies": list(ordered.values())}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_page(ordered)


if __name__ == "__main__":
    main()
