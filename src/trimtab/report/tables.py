"""The tables of the report, as text cells that HTML and Markdown lay out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.evaluation.predictions import LOWER_IS_BETTER
from trimtab.report.content import Content, System, Trial, finite
from trimtab.report.number_format import (
    MISSING,
    format_bytes,
    format_count,
    format_difference,
    format_interval,
    format_p_value,
    format_percent,
    format_rate,
    format_score,
    format_score_interval,
    format_seconds,
    format_share,
)
from trimtab.report.wording import METRIC_TITLES, SYSTEM_MEANINGS, TUNED_MEANING, metric_meaning, metric_word

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Column:
    """`meaning` feeds the legend."""

    title: str
    meaning: str = ""
    is_number: bool = True


@dataclass(frozen=True)
class Cell:
    """`detail` is smaller print beside the text; `tone` is a verdict to colour by."""

    text: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Line:
    cells: list[Cell]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    caption: str
    columns: list[Column]
    lines: list[Line]

    @property
    def legend(self) -> list[Column]:
        return [column for column in self.columns if column.meaning]


_SYSTEM = Column("System", "Everything that was scored, on the same test rows in the same order.", is_number=False)


def _system_cell(system: System) -> Cell:
    return Cell(system.title, system.name if system.name != system.title else "")


def score_table(content: Content) -> Table:
    metrics = [name for name in METRIC_TITLES if any(name in system.scores for system in content.systems)]
    columns = [Column(METRIC_TITLES[name] + _unit(name), metric_meaning(content.task, name)) for name in metrics]
    lines = []
    for system in content.systems:
        scores = [(name, system.scores.get(name)) for name in metrics]
        cells = [
            Cell(format_score(name, score.value if score else None), format_score_interval(name, score))
            for name, score in scores
        ]
        lines.append(Line([_system_cell(system), *cells], system.kind))
    return Table("Scores on the test rows, with 95 % intervals", [_SYSTEM, *columns], lines)


def _unit(metric: str) -> str:
    return " ↓" if metric in LOWER_IS_BETTER else ""


_COSTS: list[tuple[str, str, Callable[[float | None], str], str]] = [
    ("evaluate_seconds", "Evaluation (s)", format_seconds, "Time to score all test rows once."),
    ("evaluate_samples_per_second", "Samples/s", format_rate, "Test rows scored in a second."),
    ("evaluate_steps_per_second", "Steps/s", format_rate, "Batches scored in a second."),
    (
        "trainable_parameters",
        "Trainable parameters",
        format_count,
        "Numbers that training changes.",
    ),
    ("trainable_percent", "Trainable share", format_percent, "Their share of all parameters of the model."),
    ("train_seconds", "Training (s)", format_seconds, "Wall time of the training, validation included."),
    (
        "tokens_per_second",
        "Training tokens/s",
        format_rate,
        "Real tokens trained on in a second; no padding.",
    ),
    (
        "adapter_bytes",
        "Adapter size",
        format_bytes,
        "What is saved and shipped; the base model stays as it is.",
    ),
    ("peak_memory_bytes", "Peak memory", format_bytes, "The most memory that the process held."),
]


def cost_table(content: Content) -> Table:
    columns = [Column(title, meaning) for _, title, _, meaning in _COSTS]
    lines = [
        Line(
            [_system_cell(system), *(Cell(show(system.cost.get(name))) for name, _, show, _ in _COSTS)],
            system.kind,
        )
        for system in content.systems
    ]
    return Table("What each system cost", [_SYSTEM, *columns], lines)


_INTERVAL_MEANING = (
    "From resampling the test rows, rows of one group together where the study names a group column. "
    "With zero inside, no difference is shown."
)


def contrast_table(content: Content) -> Table:
    columns = [
        Column("Contrast", "Two systems on the same rows; the difference is the first minus the second.", False),
        Column("Difference", "Of the metric; in percentage points where the metric is a percentage."),
        Column("95 % interval", _INTERVAL_MEANING),
        Column("p", "How often so large a difference would come up if the two systems were equally good."),
        Column("p, Holm", "The same, corrected for the number of contrasts claimed together."),
        Column("Detectable", "The smallest difference that this test set would show four times in five."),
        Column(
            "Verdict",
            "Better or worse only if the corrected p is below 0.05 and the interval excludes zero; "
            "inconclusive means not shown, and not that the two are equal.",
            False,
        ),
    ]
    lines = []
    for contrast in content.contrasts:
        system, against = content.system(contrast.system), content.system(contrast.against)
        first = system.title if system else contrast.system
        second = against.title if against else contrast.against
        cells = [
            Cell(
                f"{first} against {second}",
                f"{metric_word(contrast.metric, content.task)}, {_test_word(contrast.test)}",
            ),
            Cell(format_difference(contrast.metric, contrast.difference)),
            Cell(format_interval(contrast.metric, contrast.low, contrast.high) or MISSING),
            Cell(format_p_value(contrast.p_value)),
            Cell(format_p_value(contrast.p_adjusted)),
            Cell(format_difference(contrast.metric, contrast.minimum_detectable_difference, signed=False)),
            Cell(contrast.verdict, tone=contrast.verdict),
        ]
        lines.append(Line(cells))
    return Table("Contrasts: paired tests on the same rows", columns, lines)


def _test_word(test: str) -> str:
    return {"mcnemar_exact": "exact McNemar test", "paired_bootstrap": "paired bootstrap"}.get(test, test or "no test")


def split_table(content: Content) -> Table | None:
    """Labels by split; None where data.json has no counts."""
    counts = content.data.get("label_counts") or {}
    splits = [split for split in SPLITS if counts.get(split)]
    if not splits:
        return None
    labels = [str(name) for name in content.data.get("label_names") or []] or sorted(counts[splits[0]])
    lines = []
    totals = {split: sum(counts[split].values()) for split in splits}
    for label in labels:
        found = [(counts[split].get(label, 0), totals[split]) for split in splits]
        lines.append(Line([Cell(label), *(Cell(format_count(n), format_share(n, whole)) for n, whole in found)]))
    lines.append(Line([Cell("all"), *(Cell(format_count(totals[split])) for split in splits)], "total"))
    caption = "Rows by label" if content.has_classes else "Labels by split"
    return Table(caption, [Column("Label", is_number=False), *map(Column, splits)], lines)


def token_table(content: Content) -> Table | None:
    tokens = content.data.get("tokens") or {}
    splits = [split for split in SPLITS if tokens.get(split)]
    if not splits:
        return None
    names = {
        "median": "Median",
        "p95": "95 of 100 below",
        "longest": "Longest",
        "truncated": "Cut",
        "total": "Total",
    }
    lines = [
        Line([Cell(split), *(Cell(format_count(finite(tokens[split].get(name)))) for name in names)])
        for split in splits
    ]
    columns = [Column("Split", is_number=False), *map(Column, names.values())]
    return Table("Text lengths in tokens; “Cut” counts the texts that were shortened", columns, lines)


def clean_table(content: Content) -> Table | None:
    """The primary metric with and without leaked rows; None where nothing leaked."""
    metric = content.primary_metric
    if not content.data.get("leaked_test_rows") or not any(system.clean_scores for system in content.systems):
        return None
    lines = []
    for system in content.systems:
        pair = [system.scores.get(metric), system.clean_scores.get(metric)]
        shown = [Cell(format_score(metric, s.value if s else None), format_score_interval(metric, s)) for s in pair]
        change = None
        if pair[0] and pair[1] and pair[0].value is not None and pair[1].value is not None:
            change = pair[1].value - pair[0].value
        lines.append(Line([_system_cell(system), *shown, Cell(format_difference(metric, change))], system.kind))
    title = METRIC_TITLES.get(metric, metric)
    columns = [_SYSTEM, Column(f"{title}, all rows"), Column(f"{title}, clean rows"), Column("Change")]
    return Table("Scores without the test rows that stand in the training data too", columns, lines)


# The costs and titles of a trial stand in the tables of systems.
_SHOWN_ELSEWHERE = frozenset({"cost", "title", "label_names", "errors"})
_ENDINGS = {
    "finished": "ran to its end",
    "early_stop": "stopped early: validation no longer improved",
    "not_finite": "broke off: the loss was no longer finite",
}


def training_facts(trial: Trial) -> list[tuple[str, str]]:
    """training.json in words, then whatever else it holds."""
    training = dict(trial.training)
    facts = []
    if "ending" in training:
        ending = str(training.pop("ending"))
        facts.append(("Ending", _ENDINGS.get(ending, ending)))
    if "steps" in training:
        facts.append(("Steps", _step_words(training)))
    if "forward" in training:
        reason = f" ({training.pop('forward_reason')})" if training.get("forward_reason") else ""
        facts.append(("Forward pass", f"{training.pop('forward')}{reason}"))
    if scores := training.pop("scores_in_training_precision", None):
        facts.append((f"Test scores in {scores.get('precision')}", _precision_words(scores)))
    for name, value in training.items():
        if name not in _SHOWN_ELSEWHERE and value not in (None, "", [], {}):
            facts.append((_sentence_case(name), plain_value(name, value)))
    return facts


def _precision_words(scores: dict[str, Any]) -> str:
    """Both number formats side by side: the tables of systems have float32 only."""
    trained, whole = scores.get("metrics") or {}, scores.get("float32") or {}
    pairs = [
        f"{metric_word(name)} {format_score(name, finite(trained.get(name)))} "
        f"(in float32 {format_score(name, finite(whole.get(name)))})"
        for name in ("accuracy", "f1", "perplexity", "rmse", "loss")
        if name in trained
    ]
    return "; ".join(pairs)


def _step_words(training: dict[str, Any]) -> str:
    steps, planned, best = (training.pop(name, None) for name in ("steps", "planned_steps", "best_step"))
    words = f"{steps} of {planned}" if planned is not None else str(steps)
    if best == 0:
        return f"{words}; the start (the linear probe) was best on validation, and is what was kept"
    return words if best is None else f"{words}; the state of step {best}, the best on validation, was kept"


def manifest_facts(content: Content) -> list[tuple[str, str]]:
    """manifest.json flattened, but for the command, which stands alone."""
    facts = []
    for name, value in content.manifest.items():
        if name in ("command", "seconds") or value in (None, "", [], {}):
            continue
        if isinstance(value, dict):
            text = "; ".join(
                f"{_plain_name(key)} {plain_value(key, inner)}" for key, inner in value.items() if inner is not None
            )
            facts.append((_sentence_case(name), text))
        else:
            facts.append((_sentence_case(name), plain_value(name, value)))
    stages = content.manifest.get("seconds") or {}
    if stages:
        text = "; ".join(f"{stage} {format_seconds(finite(value))} s" for stage, value in stages.items())
        total = sum(finite(value) or 0.0 for value in stages.values())
        facts.append(("Time by stage", f"{text}; in all {format_seconds(total)} s"))
    return facts


def system_facts(content: Content) -> list[tuple[str, str]]:
    """What each system is, for those that Trimtab makes itself."""
    known = SYSTEM_MEANINGS | {system.name: TUNED_MEANING for system in content.systems if system.kind == "tuned"}
    return [(system.title, known[system.name]) for system in content.systems if system.name in known]


def data_facts(content: Content) -> list[tuple[str, str]]:
    data = content.data
    counts = [(split, finite(data.get(f"{split}_rows"))) for split in SPLITS]
    rows = [f"{format_count(count)} {split}" for split, count in counts if count is not None]
    facts = [("Rows", ", ".join(rows))] if rows else []
    if finite(data.get("duplicate_rows")) is not None:
        text = f"{format_count(data['duplicate_rows'])} training rows repeat another, exactly or nearly"
        facts.append(("Duplicates", text))
    if finite(data.get("leaked_test_rows")) is not None:
        share = format_share(data["leaked_test_rows"], len(content.rows))
        text = f"{format_count(data['leaked_test_rows'])} test rows ({share}) stand in train too, or nearly"
        facts.append(("Leaked", text))
    if data.get("columns"):
        facts.append(("Columns", "; ".join(f"{name}: {value}" for name, value in data["columns"].items() if value)))
    if data.get("sha256"):
        facts.append(("SHA-256", str(data["sha256"])))
    return facts


def plain_value(name: str, value: Any) -> str:
    """A JSON value on one line, with units where its name tells them."""
    number = finite(value)
    if number is not None:
        if name.endswith("_bytes"):
            return format_bytes(number)
        if name.endswith("seconds"):
            return f"{format_seconds(number)} s"
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _plain_name(name: str) -> str:
    return name.removesuffix("_bytes").replace("seconds", "time").replace("_", " ")


def _sentence_case(name: str) -> str:
    text = _plain_name(name)
    return (text[:1].upper() + text[1:]).replace("sha256", "SHA-256")
