"""Other work than a few film reviews: topics by length, tales (beside `Trainer` + `peft`, in turns), and more rows.

    python benchmarks/workloads.py                        everything (about forty minutes on two cores)
    python benchmarks/workloads.py --only tales           language modelling on blocks of 512 tokens
    python benchmarks/workloads.py --only lengths --models starter:minilm-l6
    python benchmarks/workloads.py --only rows            1,000 to 10,000 film reviews: speed and memory

Writes benchmarks/results/workloads-*.json and docs/lengths-*.svg; `docs/performance.md` quotes them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from studies import call_trimtab
from training import measure_throughput
from trimtab.data import prepare_data
from trimtab.machine import describe_machine, package_versions
from trimtab.progress import Silent
from trimtab.runs import RunFolder, read_json
from trimtab.study_config import build_study

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
CONTENDERS = ("trimtab", "trimtab-int8", "dynamic", "grouped")
LENGTHS = (64, 128, 256, 512)
TURNS = 15
_TITLES = {"trimtab": "Trimtab, float32", "trimtab-int8": "Trimtab, int8", "dynamic": "Trainer, dynamic padding",
           "grouped": "Trainer, grouped by length"}  # fmt: skip
# Training rows of runs whose speed and memory should be alike.
ROWS = (1_000, 3_000, 10_000)
_ONE_EPOCH = ["--model=starter:minilm-l6", "--num-train-epochs=1", "--evaluations-per-epoch=1",
              "--max-validation-rows=300", "--max-test-rows=300"]  # fmt: skip
# Tokens in a batch of the peer, when its texts are as long as they may be.
BATCH_TOKENS = 1024


def measure_lengths(model: str) -> dict[str, Any]:
    """Reuters' texts cut to each length, eight topics."""
    found = {}
    for length in LENGTHS:
        found[str(length)] = measure_throughput(
            model, "train", TURNS, CONTENDERS, train_data="starter:reuters-r8", max_length_tokens=length,
            batch_rows=max(2, BATCH_TOKENS // length),
        )  # fmt: skip
        show(f"{model} Reuters, at most {length} tokens", found[str(length)])
    return found


def draw_lengths(model: str, found: dict[str, Any], path: Path) -> None:
    """Tokens a second by length, a line for each contender."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "trimtab"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name in CONTENDERS:
        rates = [found[str(length)]["tokens_per_second"][name] for length in LENGTHS]
        axes.plot(LENGTHS, rates, marker="o", label=_TITLES[name])
    axes.set(xscale="log", xlabel="texts cut to so many tokens", ylabel="real tokens a second", title=model)
    axes.set_xticks(LENGTHS, map(str, LENGTHS))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.savefig(path, metadata={"Date": None})


def measure_tales() -> dict[str, Any]:
    """SmolLM2 learns Grimm's tales in blocks of 512 tokens, a block a step; also with layers computed twice."""
    contenders = (*CONTENDERS[:3], "trimtab-int8-checkpointed")
    found = measure_throughput(
        "starter:smollm2-135m", "train", TURNS, contenders, task="causal_lm", train_data="starter:grimm-tales",
        max_length_tokens=512, batch_rows=1,
    )  # fmt: skip
    show("SmolLM2 tales, 512 tokens", found)
    return found


def measure_rows() -> dict[str, Any]:
    """Whole runs on film reviews, all splits thrown together: speed of training, and the run's peak memory."""
    starter = build_study({"train_data": "starter:rotten-tomatoes"})
    data = prepare_data(starter, Silent())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        reviews = Path(work) / "reviews.jsonl"
        rows = [*data.train, *data.validation, *data.test]
        reviews.write_text("".join(json.dumps({"text": row.text, "label": row.label}) + "\n" for row in rows))
        for precision, count in itertools.product(("float32", "int8"), ROWS):
            flags = [f"--train-data={reviews}", f"--max-train-rows={count}", f"--precision={precision}", *_ONE_EPOCH]
            call_trimtab(f"{count} rows", "run", "--quiet", *flags, "--out", f"{work}/run", "--overwrite")
            systems = read_json(RunFolder(Path(work) / "run").comparison)["systems"]
            cost = next(system["cost"] for system in systems if system["kind"] == "tuned")
            found[f"{count} rows, {precision}"] = {
                name: cost[name] for name in ("train_tokens", "tokens_per_second", "peak_memory_bytes")
            }
            print(f"  {count} rows, {precision}: {json.dumps(found[f'{count} rows, {precision}'])}", flush=True)
    return found


def show(what: str, found: dict[str, Any]) -> None:
    for name, rate in found["tokens_per_second"].items():
        print(f"  {what}: {name:12} {rate:8,.0f} tokens/s, peak {found['peak_bytes'][name] / (1 << 30):.2f} GiB")
    for name, ratio in sorted(found["ratios"].items()):
        print(f"  {what}: {name} {ratio['median']:.2f} times as fast", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["lengths", "tales", "rows"])
    parser.add_argument("--models", nargs="+", default=["starter:minilm-l6", "starter:smollm2-135m"])
    arguments = parser.parse_args()
    about = {"machine": describe_machine(), "versions": package_versions()}
    RESULTS.mkdir(exist_ok=True)
    if arguments.only in (None, "rows"):
        (RESULTS / "workloads-rows.json").write_text(json.dumps(about | measure_rows(), indent=1) + "\n")
    if arguments.only in (None, "tales"):
        (RESULTS / "workloads-tales.json").write_text(json.dumps(about | measure_tales(), indent=1) + "\n")
    for model in arguments.models if arguments.only in (None, "lengths") else ():
        name = f"workloads-lengths-{model.removeprefix('starter:')}.json"
        found = measure_lengths(model)
        (RESULTS / name).write_text(json.dumps(about | found, indent=1) + "\n")
        draw_lengths(f"{model} on Reuters, training", found, DOCS / f"lengths-{model.removeprefix('starter:')}.svg")


if __name__ == "__main__":
    main()
