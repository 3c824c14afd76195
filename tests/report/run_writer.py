"""Run folders as a run leaves them, with seeded predictions whose numbers agree with each other."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from trimtab.data.rows import Row, write_rows
from trimtab.runs import RunFolder, write_json, write_jsonl, write_text

ATTACK = "</script><script>window.attacked = true</script><img src=http://example.invalid/x.png onerror=attack()>"
# Rows that tuning fixes and breaks against the linear probe, of 200.
CHANGES = {"better": (26, 4), "inconclusive": (16, 10), "worse": (3, 24)}
BASELINES = [
    ("majority-class", "majority class", "baseline", None),
    ("tfidf-logistic-regression", "TF-IDF + logistic regression", "baseline", 0.76),
    ("linear-probe", "linear probe (frozen base)", "baseline", 0.80),
    ("untrained-head", "untrained head", "base", 0.49),
]
_WORDS = [
    "a",
    "dull",
    "bright",
    "film",
    "with",
    "moving",
    "wit",
    "and",
    "no",
    "plot",
    "to",
    "speak",
    "of",
    "cast",
]


class RunWriter:
    """Writes one run folder into `path`."""

    def __init__(self, path: Path, labels: list[str], rows: int = 200) -> None:
        self.run = RunFolder(path)
        self.labels = labels
        self.random = random.Random(7)
        self.rows = [self._row(number) for number in range(1, rows + 1)]
        self.systems: list[dict[str, Any]] = []
        self.contrasts: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self.correct: dict[str, list[bool]] = {}

    def _row(self, number: int) -> Row:
        text = " ".join(self.random.choices(_WORDS, k=self.random.choice([8, 20, 30, 120])))
        pair = "and a second text" if len(self.labels) > 2 else None
        return Row(f"test:{number}", text, pair, self.random.randrange(len(self.labels)), None)

    def add_baselines(self) -> None:
        for name, title, kind, accuracy in BASELINES:
            if accuracy is None:
                correct = [row.label == 0 for row in self.rows]
            else:
                correct = [self.random.random() < accuracy for _ in self.rows]
            costs = {"train_seconds": None if accuracy is None or kind == "base" else 3.21}
            self.add_system(name, title, kind, correct, costs, always_first=accuracy is None)

    def add_tuned(self, verdict: str) -> None:
        """A tuned system that fixes and breaks as many of the probe's rows as the verdict needs."""
        probe = self.correct["linear-probe"]
        fixed, broken = CHANGES[verdict]
        wrong = [i for i, right in enumerate(probe) if not right][:fixed]
        right = [i for i, right in enumerate(probe) if right][:broken]
        correct = [(i in wrong) or (right_before and i not in right) for i, right_before in enumerate(probe)]
        costs = {
            "trainable_parameters": 462_336,
            "trainable_percent": 0.3425,
            "train_seconds": 81.4,
            "tokens_per_second": 702.3,
            "adapter_bytes": 1_857_000,
        }
        self.add_system("lora-s0", "LoRA, tuned", "tuned", correct, costs)
        for name, _, _, _ in BASELINES:
            self._add_contrast("lora-s0", name, verdict if name == "linear-probe" else "better")
        folder = self.run.trial("lora", 0)
        folder.adapter.mkdir()
        self.add_history("lora-s0", "finished")

    def add_system(
        self,
        name: str,
        title: str,
        kind: str,
        correct: list[bool],
        cost: dict[str, Any],
        always_first: bool = False,
    ) -> None:
        self.correct[name] = correct
        folder = self.run.trial(*_split(name)) if kind == "tuned" else self.run.baseline(name)
        count = len(self.labels)
        lines = []
        for row, is_right in zip(self.rows, correct, strict=True):
            chosen = 0 if always_first else row.label if is_right else (row.label + 1) % count
            sure = round(self.random.uniform(0.55, 0.99), 4)
            probabilities = dict.fromkeys(self.labels, (1 - sure) / (count - 1))
            probabilities[self.labels[chosen]] = sure
            lines.append(
                {
                    "id": row.id,
                    "label": self.labels[row.label],
                    "prediction": self.labels[chosen],
                    "probabilities": probabilities,
                    "loss": 0.4,
                }
            )
        write_jsonl(folder.predictions, lines)
        accuracy = sum(correct) / len(correct)
        shifts = {"accuracy": 0.0, "f1": 0.004, "precision": 0.002, "recall": 0.005}
        metrics = {metric: _interval(accuracy - shift) for metric, shift in shifts.items()}
        metrics |= {"loss": _interval(1.2 - accuracy), "brier": _interval(0.9 - 0.7 * accuracy)}
        write_json(folder.metrics, metrics)
        full_cost = {
            "trainable_parameters": 1_154 if kind == "baseline" else None,
            "total_parameters": 134_976_576,
            "trainable_percent": None,
            "evaluate_seconds": 6.43,
            "evaluate_samples_per_second": 31.1,
            "evaluate_steps_per_second": 3.9,
            "peak_memory_bytes": 1_610_612_736,
        }
        self.systems.append(
            {
                "name": name,
                "title": title,
                "kind": kind,
                "method": "lora" if kind == "tuned" else None,
                "seed": 0 if kind == "tuned" else None,
                "metrics": metrics,
                "metrics_clean": {m: _interval(found["value"] - 0.003) for m, found in metrics.items()},
                "cost": full_cost | cost,
            }
        )

    def _add_contrast(self, system: str, against: str, verdict: str) -> None:
        difference = (sum(self.correct[system]) - sum(self.correct[against])) / len(self.rows)
        p_value = 0.31 if verdict == "inconclusive" else 0.0004
        self.contrasts.append(
            {
                "system": system,
                "against": against,
                "metric": "accuracy",
                "difference": difference,
                "low": difference - 0.044,
                "high": difference + 0.044,
                "p_value": p_value,
                "p_adjusted": min(1.0, 3 * p_value),
                "test": "mcnemar_exact",
                "minimum_detectable_difference": 0.062,
                "verdict": verdict,
            }
        )

    def add_history(self, name: str, ending: str) -> None:
        folder = self.run.trial(*_split(name))
        lines: list[dict[str, Any]] = []
        for step in range(1, 121):
            loss = 0.2 + 0.5 * 0.98**step + self.random.uniform(-0.08, 0.08)
            if ending == "not_finite" and step > 40:
                loss = float("nan")
            rates = {"grad_norm": 1.1, "learning_rate": 1e-4, "tokens_per_second": 700.0}
            lines.append({"step": step, "loss": loss} | rates)
            if step % 30 == 0:
                scores = {"validation_loss": 0.55 - step / 1000, "validation_accuracy": 0.80 + step / 4000}
                lines.append({"step": step} | scores)
        write_jsonl(folder.history, lines)
        training = {
            "ending": ending,
            "best_step": 90,
            "steps": 120,
            "planned_steps": 140,
            "title": "LoRA, tuned",
            "cost": {"trainable_parameters": 462_336},
            "learning_rate": 0.0005,
            "target_modules": ["q_proj", "v_proj"],
            "forward": "packed",
            "forward_reason": "",
            "train_seconds": 81.4,
        }
        write_json(folder.training, training)

    def fail(self, reason: str) -> None:
        self.failures.append({"trial": "lora-s0", "reason": reason})
        self.add_history("lora-s0", "not_finite")

    def finish(self) -> RunFolder:
        run = self.run
        write_rows(run.test_rows, self.rows)
        counts = {label: sum(row.label == i for row in self.rows) for i, label in enumerate(self.labels)}
        rows = {"train_rows": 1600, "validation_rows": 300, "test_rows": len(self.rows)}
        leaks = {"duplicate_rows": 12, "leaked_test_rows": 3, "sha256": "ab" * 32}
        summary = {
            **rows,
            **leaks,
            "leaked_test_ids": ["test:4", "test:9", "test:31"],
            "label_names": self.labels,
            "label_counts": {"train": {label: 8 * n for label, n in counts.items()}, "test": counts},
            "columns": {"text": "text", "label": "label"},
            "tokens": {"train": {"median": 25, "p95": 49, "longest": 78, "truncated": 0, "total": 43_210}},
        }
        write_json(run.data_summary, summary)
        write_json(
            run.comparison,
            {
                "version": 1,
                "study": "smollm2-135m-reviews-lora",
                "task": "classification",
                "primary_metric": "accuracy",
                "data": rows | leaks,
                "systems": self.systems,
                "contrasts": self.contrasts,
                "reload": {
                    "max_abs_logit_difference": None if self.failures else 1.2e-7,
                    "passed": not self.failures,
                },
                "failures": self.failures,
            },
        )
        manifest = {
            "trimtab": "0.1.0",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "machine": {"processor": "x86_64", "cores": 2, "memory_bytes": 8 << 30, "platform": "Linux"},
            "git": "33ad7da",
            "model_sha256": "cd" * 32,
            "command": "trimtab run reviews.yaml --method lora --seed 0",
            "started": "2026-01-02T03:04:05Z",
            "seconds": {"baselines": 20.4, "tune": 84.0, "evaluate": 7.1},
        }
        write_json(run.manifest, manifest)
        write_text(run.study, "model: starter:smollm2-135m\ntrain_data: reviews.csv\nmethod: lora\nseed: 0\n")
        return run


def _split(name: str) -> tuple[str, int]:
    method, _, seed = name.rpartition("-s")
    return method, int(seed)


def _interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.027, "high": value + 0.026}
