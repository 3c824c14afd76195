"""Row by row: what the tuned system fixed and broke, and what every system confuses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from trimtab.data.rows import Row
from trimtab.report.content import Content, Prediction, System

# Per direction and compared system, in the page; predictions.jsonl holds them all.
SHOWN_ROWS = 200


@dataclass(frozen=True)
class ChangedRow:
    """A test row on which the tuned system and some other differ in being right."""

    row: Row
    tuned: Prediction
    others: dict[str, Prediction]


@dataclass(frozen=True)
class Changes:
    """`others` that a reader may compare with; counts are of all rows, the lists are cut."""

    tuned: System
    others: list[System]
    fixed: list[ChangedRow]
    broken: list[ChangedRow]
    fixed_counts: dict[str, int]
    broken_counts: dict[str, int]


def find_changes(content: Content, shown_rows: int = SHOWN_ROWS) -> Changes | None:
    """Rows fixed and broken by the headline's tuned system; None without its predictions.

    The compared systems begin with the best baseline.
    """
    tuned = content.tuned
    if tuned is None or not tuned.predictions:
        return None
    others = [system for system in content.systems if system is not tuned and system.predictions]
    others.sort(key=lambda system: system is not content.reference)
    fixed, fixed_counts = _changed(content, tuned, others, True, shown_rows)
    broken, broken_counts = _changed(content, tuned, others, False, shown_rows)
    return Changes(tuned, others, fixed, broken, fixed_counts, broken_counts)


def _changed(
    content: Content, tuned: System, others: list[System], tuned_is_correct: bool, shown_rows: int
) -> tuple[list[ChangedRow], dict[str, int]]:
    counts = {system.name: 0 for system in others}
    found = []
    for index, (row, prediction) in enumerate(zip(content.rows, tuned.predictions, strict=True)):
        if prediction.is_correct != tuned_is_correct:
            continue
        differing = {}
        for system in others:
            other = system.predictions[index]
            if other.is_correct != tuned_is_correct:
                counts[system.name] += 1
                if counts[system.name] <= shown_rows:
                    differing[system.name] = other
        if differing:
            found.append(ChangedRow(row, prediction, differing))
    return found, counts


@dataclass(frozen=True)
class Confusion:
    """`counts[i][j]`: rows with true label i and predicted label j."""

    system: System
    labels: list[str]
    counts: list[list[int]]

    def share(self, true: int, predicted: int) -> float:
        """Of the rows that truly have the label, the share predicted so."""
        return self.counts[true][predicted] / max(sum(self.counts[true]), 1)


def count_confusions(content: Content) -> list[Confusion]:
    """A confusion matrix for each system with predictions of one label a row, in their order."""
    if not content.has_classes:
        return []
    labels = content.label_names
    confusions = []
    for system in content.systems:
        if system.predictions:
            pairs = Counter((p.label, p.prediction) for p in system.predictions)
            counts = [[pairs[true, predicted] for predicted in labels] for true in labels]
            confusions.append(Confusion(system, labels, counts))
    return confusions
