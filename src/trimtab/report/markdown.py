"""The report as Markdown text: the same numbers and sentences, no plots."""

from __future__ import annotations

import re

from trimtab.report import tables, wording
from trimtab.report.content import Content
from trimtab.report.estimate_table import estimate_table
from trimtab.report.number_format import format_count, format_score
from trimtab.report.row_changes import ChangedRow, count_confusions, find_changes
from trimtab.report.tables import Table

_SHOWN_ROWS = 20
_TEXT_CHARACTERS = 300


def render_markdown(content: Content) -> str:
    """The whole file, ending in a newline."""
    parts = [f"# Trimtab report: {plain(content.name)}", f"**{plain(wording.headline(content))}**"]
    parts += [plain(note) for note in wording.notes(content)]
    estimated = estimate_table(content)
    costs = [tables.cost_table(content), *([estimated] if estimated else [])]
    for table in (tables.score_table(content), *costs, tables.contrast_table(content)):
        parts += [f"## {table.caption}", table_grid(table) if table.lines else "None.", *_legend(table)]
    parts += (
        ["## What each system is", facts_list(tables.system_facts(content))] if tables.system_facts(content) else []
    )
    parts += _training(content)
    parts += _confusions(content)
    parts += _changes(content)
    parts += _samples(content)
    parts += ["## Data", facts_list(tables.data_facts(content))]
    for found in (tables.split_table(content), tables.clean_table(content), tables.token_table(content)):
        if found:
            parts += [f"### {found.caption}", table_grid(found)]
    parts += ["## The saved adapter", plain(wording.reload_sentence(content))]
    parts += _reproduction(content)
    return "\n\n".join(part for part in parts if part) + "\n"


def _training(content: Content) -> list[str]:
    parts = ["## Training"] if content.trials or content.failures else []
    for trial in content.trials:
        parts += [f"### {plain(trial.title)}", facts_list(tables.training_facts(trial))]
        points = dict(trial.validation_accuracies)
        rows = [[f"{step:g}", f"{loss:.4f}"] for step, loss in trial.validation_losses]
        head = ["step", "validation loss"]
        if points:
            head.append("validation accuracy")
            steps = [step for step, _ in trial.validation_losses]
            rows = [[*row, format_score("accuracy", points.get(step))] for row, step in zip(rows, steps, strict=True)]
        if rows:
            parts.append(_grid([head, *rows], [True] * len(head)))
    failed = [
        f"- {plain(failure.get('trial', ''))}: {plain(failure.get('reason', ''))}" for failure in content.failures
    ]
    return parts + (["### Failed", "\n".join(failed)] if failed else [])


def _confusions(content: Content) -> list[str]:
    """The tuned system's and the base's, or the reference's where nothing was tuned."""
    wanted = (content.tuned or content.reference, content.base)
    parts: list[str] = []
    for confusion in count_confusions(content):
        if any(confusion.system is system for system in wanted):
            labels = [plain(label) for label in confusion.labels]
            lines = [["true \\ predicted", *labels]]
            lines += [
                [label, *map(format_count, counts)] for label, counts in zip(labels, confusion.counts, strict=True)
            ]
            parts.append(f"### Confusion matrix: {plain(confusion.system.title)}")
            parts.append(_grid(lines, [False] + [True] * len(labels)))
    return parts


def _changes(content: Content) -> list[str]:
    changes = find_changes(content)
    if changes is None or not changes.others:
        return []
    against = changes.others[0]
    parts = [f"## Rows that {plain(changes.tuned.title)} changed, against {plain(against.title)}"]
    for word, rows, counts in (
        ("Fixed", changes.fixed, changes.fixed_counts),
        ("Broken", changes.broken, changes.broken_counts),
    ):
        count = counts[against.name]
        chosen = [row for row in rows if against.name in row.others][:_SHOWN_ROWS]
        shown = f", the first {len(chosen)} shown" if len(chosen) < count else ""
        parts.append(f"### {word}: {format_count(count)}{shown}")
        if chosen:
            lines = [["row", "true label", "before", "after", "text"]]
            lines += [_changed_line(row, against.name) for row in chosen]
            parts.append(_grid(lines, [False] * 5))
    return parts


def _changed_line(changed: ChangedRow, against: str) -> list[str]:
    text = changed.row.text if changed.row.text_pair is None else f"{changed.row.text} ⏵ {changed.row.text_pair}"
    if len(text) > _TEXT_CHARACTERS:
        text = text[:_TEXT_CHARACTERS] + "…"
    cells = (
        changed.row.id,
        changed.tuned.label,
        changed.others[against].prediction,
        changed.tuned.prediction,
        text,
    )
    return [plain(cell) for cell in cells]


def _samples(content: Content) -> list[str]:
    parts = []
    for trial in content.trials:
        if trial.samples:
            parts.append(f"## What base and {plain(trial.title)} write")
            for sample in trial.samples:
                names = (
                    ("prompt", "Prompt"),
                    ("truth", wording.truth_title(content)),
                    ("base", "Base"),
                    ("tuned", "Tuned"),
                )
                parts += [f"### {plain(sample['id'])}", facts_list([(title, sample[name]) for name, title in names])]
    return parts


def _reproduction(content: Content) -> list[str]:
    parts = ["## How to repeat this"]
    command = str(content.manifest.get("command") or "")
    if command:
        fence = "`" * (max(map(len, re.findall("`+", command)), default=0) + 3)
        parts.append(f"{fence}\n{command}\n{fence}")
    parts.append(facts_list(tables.manifest_facts(content)))
    if content.study:
        parts += ["### The study", facts_list([(name, str(value)) for name, value in content.study.items()])]
    return parts


def table_grid(table: Table) -> str:
    """A table of the report, the tuned system's line in bold."""
    lines = [[plain(column.title) for column in table.columns]]
    for line in table.lines:
        cells = [
            plain(f"{cell.text}{' ' if column.is_number else ': '}{cell.detail}" if cell.detail else cell.text)
            for column, cell in zip(table.columns, line.cells, strict=True)
        ]
        lines.append([f"**{cell}**" if line.kind == "tuned" else cell for cell in cells])
    return _grid(lines, [column.is_number for column in table.columns])


def _legend(table: Table) -> list[str]:
    return ["\n".join(f"- *{plain(column.title)}*: {plain(column.meaning)}" for column in table.legend)]


def _grid(lines: list[list[str]], numbers: list[bool]) -> str:
    rule = ["---:" if is_number else "---" for is_number in numbers]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def facts_list(facts: list[tuple[str, str]]) -> str:
    """Names and values, a line each."""
    return "\n".join(f"- {plain(name)}: {plain(value)}" for name, value in facts)


def plain(text: object) -> str:
    """Text on one line that Markdown shows as it is: no markup, table bars or HTML of the user's own."""
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", line)
    # An interval is no link, unless what makes it one follows.
    line = re.sub(r"\\\[(−?[\d.,]+, −?[\d.,]+)\\\](?![(\[:])", r"[\1]", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
