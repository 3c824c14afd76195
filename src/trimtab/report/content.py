"""The files of a run folder as plain values, read once for both outputs.

Owns what is read and which systems the report is about; says nothing about how it looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from trimtab.data.rows import Row, read_rows
from trimtab.errors import DataError
from trimtab.evaluation.predictions import LOWER_IS_BETTER
from trimtab.runs import RunFolder, SystemFolder, TrialFolder, read_json, read_jsonl


@dataclass(frozen=True)
class Score:
    """A metric with its 95 % interval; None where the run has no finite number."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Prediction:
    """`confidence` is the probability of the predicted label."""

    label: str
    prediction: str
    confidence: float | None

    @property
    def is_correct(self) -> bool:
        return self.label == self.prediction


@dataclass(frozen=True)
class System:
    """Anything that was scored; `predictions` is empty where the folder holds none."""

    name: str
    title: str
    kind: str
    method: str | None
    seed: int | None
    scores: dict[str, Score]
    clean_scores: dict[str, Score]
    cost: dict[str, float | None]
    predictions: list[Prediction] = field(repr=False)

    @property
    def short_title(self) -> str:
        """Without what stands in brackets, for sentences."""
        return self.title.partition(" (")[0] if self.kind != "tuned" else self.title


@dataclass(frozen=True)
class Contrast:
    """One system against another on one metric; `difference` is `system` minus `against`."""

    system: str
    against: str
    metric: str
    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    p_adjusted: float | None
    test: str
    minimum_detectable_difference: float | None
    verdict: str


@dataclass(frozen=True)
class Trial:
    """The record of one tuning: (step, value) points and training.json."""

    name: str
    title: str
    training: dict[str, Any]
    losses: list[tuple[float, float]]
    validation_losses: list[tuple[float, float]]
    validation_accuracies: list[tuple[float, float]]
    samples: list[dict[str, str]] = field(default_factory=list)  # prompt, truth, base and tuned
    base: str | None = None  # where the adapter finds it, from any folder

    @property
    def validation_score(self) -> float:
        """Accuracy, else minus the loss, at the step whose weights were kept; -inf where nothing was validated."""
        best_step = self.training.get("best_step")
        scores = self.validation_accuracies or [(step, -loss) for step, loss in self.validation_losses]
        kept = [value for step, value in scores if step == best_step]
        return max(kept or [value for _, value in scores], default=-math.inf)


@dataclass(frozen=True)
class Content:
    """Everything that a report shows."""

    name: str
    primary_metric: str
    study: dict[str, Any]
    manifest: dict[str, Any]
    data: dict[str, Any]
    systems: list[System]
    contrasts: list[Contrast]
    reload: dict[str, Any]
    estimate: dict[str, Any]
    failures: list[dict[str, Any]]
    rows: list[Row]
    trials: list[Trial]

    @cached_property
    def tuned(self) -> System | None:
        """The tuned system the headline is about: the best on validation, never on test."""
        validated = {trial.name: trial.validation_score for trial in self.trials}
        tuned = [system for system in self.systems if system.kind == "tuned"]
        return max(tuned, key=lambda system: validated.get(system.name, -math.inf), default=None)

    @cached_property
    def reference(self) -> System | None:
        """The best system that needs no tuning; chosen on test, which can only favour the baselines."""
        # A random head has learnt nothing; a base that needs no head is the system to beat.
        others = [system for system in self.untuned if system.name != "untrained-head"]
        candidates = [system for system in others or self.untuned if self.primary(system) is not None]
        sign = -1 if self.primary_metric in LOWER_IS_BETTER else 1
        return max(candidates, key=lambda system: sign * (self.primary(system) or 0.0), default=None)

    @cached_property
    def base(self) -> System | None:
        return next((system for system in self.systems if system.kind == "base"), None)

    @cached_property
    def untuned(self) -> list[System]:
        return [system for system in self.systems if system.kind != "tuned"]

    @cached_property
    def label_names(self) -> list[str]:
        """As data.json has them, then any that only predictions hold."""
        named = [str(name) for name in self.data.get("label_names") or []]
        seen = {label for system in self.systems for p in system.predictions for label in (p.label, p.prediction)}
        return named + sorted(seen - set(named))

    @property
    def has_classes(self) -> bool:
        """Whether each row bears one label."""
        return self.task == "classification"

    @property
    def task(self) -> str:
        return str(self.study.get("task") or "classification")

    def primary(self, system: System) -> float | None:
        score = system.scores.get(self.primary_metric)
        return score.value if score else None

    def system(self, name: str) -> System | None:
        return next((system for system in self.systems if system.name == name), None)

    def contrast(self, system: System | None, against: System | None) -> Contrast | None:
        """The contrast of two systems on the primary metric."""
        if system is None or against is None:
            return None
        wanted = (system.name, against.name, self.primary_metric)
        return next((c for c in self.contrasts if (c.system, c.against, c.metric) == wanted), None)


def read_content(run: RunFolder) -> Content:
    """Read a run folder; of its files only comparison.json and test.jsonl must be there.

    Raises:
        DataError: one of them is missing, or predictions are not about the test rows.
    """
    comparison = read_json(run.comparison)
    rows = read_rows(run.test_rows)
    folders = {folder.name: folder for folder in run.systems()}
    titles = _unique_titles(comparison.get("systems") or [])
    systems = [
        _system(record, titles[record["name"]], folders.get(record["name"]), rows)
        for record in comparison.get("systems") or []
    ]
    metric = str(comparison.get("primary_metric") or "accuracy")
    systems.sort(key=lambda system: _place(system, metric))
    places = {system.name: place for place, system in enumerate(systems)}
    contrasts = [_contrast(record) for record in comparison.get("contrasts") or []]
    contrasts.sort(key=lambda found: (places.get(found.system, 0), places.get(found.against, 0)))
    return Content(
        name=str(comparison.get("study") or run.path.name),
        primary_metric=metric,
        study=_read_study(run.study),
        manifest=_read_mapping(run.manifest),
        data=(comparison.get("data") or {}) | _read_mapping(run.data_summary),
        systems=systems,
        contrasts=contrasts,
        reload=comparison.get("reload") or {},
        estimate=_read_mapping(run.estimate),
        failures=[_failure(record) for record in comparison.get("failures") or []],
        rows=rows,
        trials=_trials(run, systems, comparison.get("failures") or []),
    )


def _place(system: System, metric: str) -> tuple[int, float]:
    """Baselines from worst to best, then base and tuned beside each other in the order given."""
    kinds = ("baseline", "base", "tuned")
    kind = kinds.index(system.kind) if system.kind in kinds else len(kinds)
    value = (system.scores[metric].value if metric in system.scores else None) or 0.0
    return kind, (-value if metric in LOWER_IS_BETTER else value) if system.kind == "baseline" else 0.0


def finite(value: Any) -> float | None:
    """A finite number as float; None for everything else, NaN and true/false among it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _read_study(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    return study if isinstance(study, dict) else {}


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique_titles(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Titles by system name; the seeds of one method are told apart."""
    titles = [str(record.get("title") or record["name"]) for record in records]
    return {
        record["name"]: title if titles.count(title) == 1 else f"{title} ({record['name']})"
        for record, title in zip(records, titles, strict=True)
    }


def _system(record: dict[str, Any], title: str, folder: SystemFolder | None, rows: Sequence[Row]) -> System:
    return System(
        name=str(record["name"]),
        title=title,
        kind=str(record.get("kind") or "baseline"),
        method=record.get("method"),
        seed=record.get("seed"),
        scores=_scores(record.get("metrics")),
        clean_scores=_scores(record.get("metrics_clean")),
        cost={name: finite(value) for name, value in (record.get("cost") or {}).items()},
        predictions=_predictions(folder.predictions, rows) if folder else [],
    )


def _scores(metrics: dict[str, Any] | None) -> dict[str, Score]:
    return {
        name: Score(finite(found.get("value")), finite(found.get("low")), finite(found.get("high")))
        for name, found in (metrics or {}).items()
        if found
    }


def _predictions(path: Path, rows: Sequence[Row]) -> list[Prediction]:
    lines = list(read_jsonl(path))
    if [str(line.get("id")) for line in lines] != [row.id for row in rows]:
        raise DataError(
            f"{path}: {len(lines)} predictions are not about the {len(rows)} rows of test.jsonl, in order; "
            "score this system again"
        )
    predictions = []
    for line in lines:
        if "label" not in line or isinstance(line["label"], float):  # a language model says no label, a value is none
            return []
        label, prediction = _as_text(line["label"]), _as_text(line.get("prediction"))
        confidence = finite((line.get("probabilities") or {}).get(prediction))
        predictions.append(Prediction(label, prediction, confidence))
    return predictions


def _as_text(label: Any) -> str:
    return ", ".join(map(str, label)) if isinstance(label, list) else str(label)


def _contrast(record: dict[str, Any]) -> Contrast:
    return Contrast(
        system=str(record["system"]),
        against=str(record["against"]),
        metric=str(record["metric"]),
        difference=finite(record.get("difference")),
        low=finite(record.get("low")),
        high=finite(record.get("high")),
        p_value=finite(record.get("p_value")),
        p_adjusted=finite(record.get("p_adjusted")),
        test=str(record.get("test") or ""),
        minimum_detectable_difference=finite(record.get("minimum_detectable_difference")),
        verdict=str(record.get("verdict") or "not tested"),
    )


def _failure(record: Any) -> dict[str, Any]:
    return record if isinstance(record, dict) else {"trial": "", "reason": str(record)}


def _trials(run: RunFolder, systems: Sequence[System], failures: Sequence[Any]) -> list[Trial]:
    """Finished trials, then failed ones: the curve of a trial that diverged says where."""
    folders = {folder.name: folder for folder in run.trials()}
    for failure in map(_failure, failures):
        method, separator, seed = str(failure.get("trial", "")).rpartition("-s")
        if separator and seed.isdigit():
            folder = run.trial(method, int(seed))
            folders.setdefault(folder.name, folder)
    titles = {system.name: system.title for system in systems}
    return [_trial(folder, titles.get(name)) for name, folder in folders.items()]


def _trial(folder: TrialFolder, title: str | None) -> Trial:
    history = list(read_jsonl(folder.history)) if folder.history.is_file() else []

    def points(name: str) -> list[tuple[float, float]]:
        found = [(finite(line.get("step")), finite(line.get(name))) for line in history]
        return [(step, value) for step, value in found if step is not None and value is not None]

    training = _read_mapping(folder.training)
    scored = _read_mapping(folder.metrics)
    other = scored.get("in_training_precision")
    if isinstance(other, dict):
        training["scores_in_training_precision"] = other | {"float32": scored.get("metrics") or {}}
    return Trial(
        name=folder.name,
        title=title or str(training.get("title") or folder.name),
        base=_read_mapping(folder.facts_in(folder.adapter)).get("base"),
        training=training,
        losses=points("loss"),
        validation_losses=points("validation_loss"),
        validation_accuracies=points("validation_accuracy"),
        samples=[{name: str(text) for name, text in line.items()} for line in read_jsonl(folder.samples)]
        if folder.samples.is_file()
        else [],
    )
