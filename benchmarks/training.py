"""Trimtab beside `Trainer` + `peft`: throughput in turns, wall time to the peer's accuracy, accuracy.

    python benchmarks/training.py                         everything (over an hour on two cores)
    python benchmarks/training.py --only throughput       about ten minutes
    python benchmarks/training.py --only upper-half       about twenty minutes
    python benchmarks/training.py --models starter:minilm-l6 --seeds 0 1 2

Writes benchmarks/results/*.json; `docs/performance.md` quotes them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.evaluation.class_predictions import ClassPredictions
from trimtab.evaluation.comparison import compare_two
from trimtab.machine import describe_machine, measure_gemm_rates, package_versions

OURS = ("trimtab", "trimtab-int8")
PEERS = ("dynamic", "grouped")
# A turn is one step. `Trainer` sorts each run of 50 batches from long to short, so 50 turns see every length once;
# each window takes every fifth turn, so that windows compare.
WINDOWS = 5
TRAINING_TURNS = 50
# Parameters in linear layers: a frozen base costs 2 of these a token forward and 2 backward.
LINEAR_PARAMETERS = {"starter:smollm2-135m": 106.2e6, "starter:minilm-l6": 10.6e6}
# What of a training is timed: all, what the peer's clock counts and what comes before the steps, the steps alone.
CLOCKS = ("seconds", "seconds_but_validations", "seconds_of_steps")
EVALUATION_ROWS = {"starter:smollm2-135m": 160, "starter:minilm-l6": 400}
RESULTS = Path(__file__).parent / "results"


class Worker:
    """One contender in a process of its own, waiting for its turn."""

    def __init__(self, contender: str, work: str, model: str, **settings: Any) -> None:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        here = Path(__file__).with_name("contenders.py")
        command = [sys.executable, str(here), contender, work, f"--model={model}", *flags]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):  # the Trainer prints dicts of its own
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"a contender ended without an answer: {self.process.args!r}")

    def turn(self) -> tuple[float, float]:
        """Tokens and seconds of one turn; remembers the process's peak memory."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.read()
        self.peak_bytes = answer["peak_bytes"]
        return answer["tokens"], answer["seconds"]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def measure_throughput(model: str, work: str, turns: int, names: Sequence[str], **settings: Any) -> dict[str, Any]:
    """Medians of real tokens a second over windows, ratios taken window by window, and peak memory."""
    workers = {}
    for name in names:  # one warms up at a time
        workers[name] = Worker(name, work, model, **settings)
        workers[name].read()
    sums = {name: np.zeros((WINDOWS, 2)) for name in workers}
    for turn in range(turns):
        for name, worker in workers.items():
            sums[name][turn % WINDOWS] += worker.turn()
    for worker in workers.values():
        worker.stop()
    rates = {name: (window[:, 0] / window[:, 1]).tolist() for name, window in sums.items()}
    found: dict[str, Any] = {
        "tokens_per_second": {n: statistics.median(r) for n, r in rates.items()},
        "peak_bytes": {name: worker.peak_bytes for name, worker in workers.items()},
        "windows": rates,
    }
    found["ratios"] = {}
    for one, other in itertools.product(set(rates) - set(PEERS), set(rates) & set(PEERS)):
        ratios = [ours / theirs for ours, theirs in zip(rates[one], rates[other], strict=True)]
        found["ratios"][f"{one} to {other}"] = {"median": statistics.median(ratios), "windows": ratios}
    return found


def measure_learning(
    model: str, ours: dict[str, tuple[str, int]], seeds: list[int], counts: dict[str, int]
) -> dict[str, Any]:
    """Wall time to the grouped peer's final validation accuracy, and test accuracies, paired.

    The peer's clock runs over its steps alone; ours is told with its validations and, as the peer's, without.

    Args:
        ours: name -> contender and its epochs.
        counts: rows of train and validation, and the peer's epochs.
    """
    runs = []
    contenders = {"grouped": ("grouped", counts["epochs"]), **ours}
    predicted: dict[str, list[int]] = {name: [] for name in contenders}
    labels: list[int] = []
    for seed in seeds:
        found = {}
        for name, (contender, epochs) in contenders.items():
            worker = Worker(contender, "learn", model, seed=seed, **(counts | {"epochs": epochs}))
            found[name] = worker.read()
            worker.stop()
            predicted[name] += found[name]["predicted"]
        labels += found["grouped"]["labels"]
        target = found["grouped"]["validation"][-1]["accuracy"]
        run = {"seed": seed, "peer_seconds": found["grouped"]["seconds"], "peer_validation_accuracy": target}
        for name, one in found.items():
            right = np.mean(np.array(one["labels"]) == one["predicted"])
            run[name] = {"test_accuracy": float(right), "seconds": one["seconds"], "validation": one["validation"]}
            if name in ours:
                run[name] |= _time_to(target, one["validation"], run["peer_seconds"])
        print(f"  {json.dumps(run)}", flush=True)
        runs.append(run)
    ids = [str(number) for number in range(len(labels))]
    systems = {name: _as_predictions(ids, np.array(labels), said) for name, said in predicted.items()}
    contrasts = {name: compare_two(systems["grouped"], systems[name], ("peer", name))["contrasts"][0] for name in ours}
    means = {name: _mean_time(runs, name) for name in ours}
    return {**counts, "runs": runs, "means": means, "contrasts": contrasts}


def _time_to(accuracy: float, validations: list[dict[str, float]], peer_seconds: float) -> dict[str, Any]:
    """When a validation first reached `accuracy`, and what share of the peer's seconds that is; None if none did."""
    reached = next((one for one in validations if one["accuracy"] >= accuracy), None)
    if reached is None:
        return {"reached": None}
    clocks = CLOCKS[:2]
    return {"reached": {clock: reached[clock] for clock in clocks} | {
        f"share of the peer's, by {clock}": reached[clock] / peer_seconds for clock in clocks}}  # fmt: skip


def _mean_time(runs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """When the mean over seeds first reaches the mean of the peer's last accuracies: one figure of a seed is noise."""
    target = statistics.mean(run["peer_validation_accuracy"] for run in runs)
    curve = []
    for validations in zip(*(run[name]["validation"] for run in runs), strict=True):
        shares = {
            f"share of the peer's, by {clock}": statistics.mean(
                one[clock] / run["peer_seconds"] for one, run in zip(validations, runs, strict=True)
            )
            for clock in CLOCKS[:2]
        }
        curve.append({"accuracy": statistics.mean(one["accuracy"] for one in validations), **shares})
    return {"peer": target, "reached": next((one for one in curve if one["accuracy"] >= target), None), "curve": curve}


def measure_upper_half(model: str, train_rows: int, epochs: int = 3) -> dict[str, Any]:
    """Whole trainings of the upper half of the layers: what lies below is computed once, by Trimtab."""
    found: dict[str, Any] = {"train_rows": train_rows, "epochs": epochs}
    for name in ("grouped", *OURS):
        worker = Worker(name, "learn", model, train_rows=train_rows, epochs=epochs, layers_to_transform="upper-half")
        answer = worker.read()
        worker.stop()
        right = np.mean(np.array(answer["labels"]) == answer["predicted"])
        # The peer's clock runs over its steps alone.
        clocks = {clock: answer.get(clock, answer["seconds"]) for clock in CLOCKS}
        found[name] = {**clocks, "test_accuracy": float(right)}
        for clock, seconds in clocks.items():
            found[name][f"peer's seconds to these {clock}"] = found["grouped"]["seconds"] / seconds
        print(f"  {model} upper half, {name}: {json.dumps(found[name])}", flush=True)
    return found


def _as_predictions(ids: list[str], labels: Any, predicted: list[int]) -> ClassPredictions:
    classes = max(int(labels.max()), max(predicted)) + 1
    names = [str(number) for number in range(classes)]
    return ClassPredictions(ids, names, labels.astype(np.int64), np.eye(classes)[predicted])


def print_throughput(model: str, work: str, found: dict[str, Any], gemm: float) -> None:
    limit = gemm * 1e9 / (LINEAR_PARAMETERS[model] * (4 if work == "train" else 2))
    for name, rate in found["tokens_per_second"].items():
        print(
            f"  {model} {work} {name:12} {rate:8,.0f} tokens/s  {rate / limit:4.0%} of the float32 GEMM limit",
            flush=True,
        )
    for name, ratio in sorted(found["ratios"].items()):
        print(f"  {model} {work} {name}: {ratio['median']:.2f} times as fast", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(LINEAR_PARAMETERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", choices=["throughput", "learning", "upper-half"])
    parser.add_argument("--train-rows", type=int, default=2000, help="of the runs that learn")
    parser.add_argument("--validation-rows", type=int, default=2000, help="of the runs that learn")
    parser.add_argument("--epochs", type=int, default=2, help="of the runs that learn")
    parser.add_argument("--our-epochs", nargs="+", type=int, help="of Trimtab's runs that learn, if not the peer's")
    parser.add_argument("--max-probe-positions", type=int, help="texts for Trimtab's linear probe, if not all")
    parser.add_argument("--contenders", nargs="+", choices=OURS, default=OURS, help="that learn beside the peer")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    about = {"machine": describe_machine(), "versions": package_versions()}
    for model in arguments.models:
        name = model.removeprefix("starter:")
        if arguments.only in (None, "throughput"):
            gemm = measure_gemm_rates()
            found: dict[str, Any] = {**about, "gemm_gflops": gemm}
            for work, turns, names in (
                ("train", TRAINING_TURNS, (*OURS, *PEERS)),
                ("evaluate", WINDOWS, (*OURS, "dynamic")),
            ):
                found[work] = measure_throughput(model, work, turns, names, rows=EVALUATION_ROWS[model])
                print_throughput(model, work, found[work], gemm["float32"] or 0)
            (RESULTS / f"throughput-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        if arguments.only in (None, "upper-half"):
            upper = {**about, **measure_upper_half(model, arguments.train_rows)}
            (RESULTS / f"upper-half-{name}.json").write_text(json.dumps(upper, indent=1) + "\n")
        if arguments.only in (None, "learning"):
            counts = {count: getattr(arguments, count) for count in ("train_rows", "validation_rows", "epochs")}
            if arguments.max_probe_positions:
                counts["max_probe_positions"] = arguments.max_probe_positions
            ours = {
                one if epochs == arguments.epochs else f"{one}, {epochs} epoch": (one, epochs)
                for one in arguments.contenders
                for epochs in arguments.our_epochs or [arguments.epochs]
            }
            learnt = {**about, **measure_learning(model, ours, arguments.seeds, counts)}
            probed = f"-probe{arguments.max_probe_positions}" if arguments.max_probe_positions else ""
            file = f"learning-{name}-{arguments.train_rows}x{arguments.epochs}-{arguments.validation_rows}{probed}.json"
            (RESULTS / file).write_text(json.dumps(learnt, indent=1) + "\n")
            print(f"  {model}: {json.dumps(learnt['contrasts'])}", flush=True)


if __name__ == "__main__":
    main()
