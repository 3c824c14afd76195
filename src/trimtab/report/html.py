"""The report as one self-contained HTML page: no network, and no script but its own."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from trimtab.report import figures, row_changes, tables, wording
from trimtab.report.content import Content, Score, System
from trimtab.report.estimate_table import estimate_table
from trimtab.report.number_format import (
    PERCENTAGES,
    format_contrast,
    format_count,
    format_score,
    format_score_interval,
)

# Longer texts are cut in the page (whole in test.jsonl), and folded above the smaller number.
_TEXT_CHARACTERS = 2000
_FOLDED_CHARACTERS = 260


@dataclass(frozen=True)
class Card:
    """One big number near the top."""

    role: str
    title: str
    value: str
    interval: str
    score: Score | None
    note: str
    kind: str
    tone: str = ""


def render_html(content: Content) -> str:
    """The whole page. Every text of the user's is escaped by the template engine."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trimtab.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(unbroken=_unbroken, count=format_count)
    style, script = _template_file("report.css"), _template_file("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    trials = [
        (
            trial,
            [Markup(figure) for figure in (figures.loss_figure(trial), figures.validation_figure(trial)) if figure],
        )
        for trial in content.trials
    ]
    return environment.get_template("report.html.j2").render(
        content=content,
        truth_title=wording.truth_title(content),
        scores_metric=wording.METRIC_TITLES.get(content.primary_metric, content.primary_metric),
        style=Markup(style),
        script=Markup(script),
        script_digest=digest,
        headline=wording.headline(content),
        notes=wording.notes(content),
        cards=_cards(content),
        scores=tables.score_table(content),
        system_facts=tables.system_facts(content),
        costs=tables.cost_table(content),
        estimated=estimate_table(content),
        contrasts=tables.contrast_table(content),
        score_figure=Markup(figures.score_figure(content)),
        trials=[(trial, drawings, tables.training_facts(trial)) for trial, drawings in trials],
        confusions=row_changes.count_confusions(content),
        changes=row_changes.find_changes(content),
        data_facts=tables.data_facts(content),
        data_tables=[
            table
            for table in (
                tables.split_table(content),
                tables.clean_table(content),
                tables.token_table(content),
            )
            if table
        ],
        reload_sentence=wording.reload_sentence(content),
        manifest_facts=tables.manifest_facts(content),
        study_facts=[(name, _setting(value)) for name, value in content.study.items()],
        text_characters=_TEXT_CHARACTERS,
        folded_characters=_FOLDED_CHARACTERS,
    )


def _template_file(name: str) -> str:
    return resources.files("trimtab.report").joinpath("templates", name).read_text(encoding="utf-8")


def _unbroken(sentence: str) -> str:
    """A number stays on the line of its unit, and an interval in one piece."""
    space = "\N{NO-BREAK SPACE}"
    return sentence.replace(" %", f"{space}%").replace(" points", f"{space}points").replace("p = ", f"p{space}={space}")


def _setting(value: Any) -> str:
    return "not set" if value is None else str(value)


def _cards(content: Content) -> list[Card]:
    """Base, best without tuning, tuned: the three numbers that the headline is about."""
    cards = []
    if content.base:
        note = "the base model before any training"
        if content.base.name == "untrained-head":
            note += ": its head is random"
        cards.append(_card(content, content.base, "Base", note))
    if content.reference and content.reference is not content.base:
        cards.append(_card(content, content.reference, "Best without tuning", "the bar that tuning has to clear"))
    if content.tuned:
        contrast = content.contrast(content.tuned, content.reference)
        note, tone = "not tested against the best without tuning", ""
        if contrast and content.reference:
            note = f"{format_contrast(contrast)} against {content.reference.short_title}: {contrast.verdict}"
            tone = contrast.verdict
        cards.append(_card(content, content.tuned, "Tuned", note, tone))
    elif content.failures:
        cards.append(Card("Tuned", "no adapter", "failed", "", None, "see the reason under training", "tuned", "worse"))
    return cards


def _card(content: Content, system: System, role: str, note: str, tone: str = "") -> Card:
    metric = content.primary_metric
    score = system.scores.get(metric)
    return Card(
        role=role,
        title=system.title,
        value=format_score(metric, score.value if score else None),
        interval=format_score_interval(metric, score),
        score=score if metric in PERCENTAGES else None,
        note=note,
        kind=system.kind,
        tone=tone,
    )
