"""Training in int8 held against training in float32: the same studies and seeds, paired on their test rows.

    python benchmarks/accuracy.py                                       MiniLM on both data sets, about 20 minutes
    python benchmarks/accuracy.py --models starter:smollm2-135m --data starter:rotten-tomatoes

Writes benchmarks/results/accuracy-*.json; `docs/performance.md` quotes them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.evaluation.class_predictions import ClassPredictions
from trimtab.evaluation.comparison import compare_two
from trimtab.evaluation.prediction_files import read_predictions
from trimtab.machine import describe_machine, package_versions
from trimtab.runs import RunFolder, read_json

PRECISIONS = ("float32", "int8")
RESULTS = Path(__file__).parent / "results"


def run_study(settings: dict[str, str], folder: Path) -> tuple[ClassPredictions, dict[str, Any]]:
    """One study through the command; its test predictions, and how it was trained."""
    flags = [f"--{name}={value}" for name, value in (settings | {"out": str(folder)}).items()]
    subprocess.run([sys.executable, "-m", "trimtab", "run", "--quiet", *flags], check=True)
    trial = RunFolder(folder).trial("lora", int(settings["seed"]))
    predictions = read_predictions(trial.predictions)
    assert isinstance(predictions, ClassPredictions)
    return predictions, read_json(trial.training)


def join(parts: list[ClassPredictions]) -> ClassPredictions:
    """The predictions of all seeds as those of one test set; each seed has rows of its own."""
    return dataclasses.replace(
        parts[0],
        ids=[f"{number}:{row}" for number, part in enumerate(parts) for row in part.ids],
        labels=np.concatenate([part.labels for part in parts]),
        probabilities=np.concatenate([part.probabilities for part in parts]),
    )


def compare(settings: dict[str, str], seeds: list[int]) -> dict[str, Any]:
    found: dict[str, list[tuple[ClassPredictions, dict[str, Any]]]] = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory() as work:
        for seed in seeds:
            for precision in PRECISIONS:
                study = settings | {"seed": str(seed), "precision": precision}
                found[precision].append(run_study(study, Path(work) / f"{precision}-{seed}"))
            accuracies = {name: _accuracy(runs[-1][0]) for name, runs in found.items()}
            print(f"  seed {seed}: {json.dumps(accuracies)}", flush=True)
    whole, lower = (join([predictions for predictions, _ in found[precision]]) for precision in PRECISIONS)
    trained = [training for _, training in found["int8"]]
    return {
        "settings": settings,
        "accuracy": {name: [_accuracy(predictions) for predictions, _ in runs] for name, runs in found.items()},
        "contrast": compare_two(whole, lower, PRECISIONS)["contrasts"][0],
        "least_output_cosine": min(training["least_output_cosine"] for training in trained),
        "least_gradient_cosine": min(training["least_gradient_cosine"] for training in trained),
        "kept_in_float32": [training["kept_in_float32"] for training in trained],
    }


def _accuracy(predictions: ClassPredictions) -> float:
    return float(predictions.correct.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["starter:minilm-l6"])
    parser.add_argument("--data", nargs="+", default=["starter:rotten-tomatoes", "starter:reuters-r8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", type=int, default=1600, help="training rows")
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    for model in arguments.models:
        for data in arguments.data:
            settings = {
                "model": model, "train-data": data, "max-train-rows": str(arguments.rows),
                "max-validation-rows": "300", "max-test-rows": "1000", "max-length-tokens": "128",
                "num-train-epochs": str(arguments.epochs),
            }  # fmt: skip
            print(f"{model} on {data}", flush=True)
            result = compare(settings, arguments.seeds)
            contrast = result["contrast"]
            print(f"  int8 - float32: {contrast['difference']:+.4f} [{contrast['low']:+.4f}, {contrast['high']:+.4f}]")
            about = {"machine": describe_machine(), "versions": package_versions()}
            name = f"accuracy-{model.removeprefix('starter:')}-{data.removeprefix('starter:')}.json"
            (RESULTS / name).write_text(json.dumps(about | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
