"""Plots as inline SVG: scores with intervals, and the curves of training.

matplotlib draws in stand-in colours that become CSS variables, so one drawing suits light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trimtab.report.content import Content, Trial
from trimtab.report.number_format import PERCENTAGES, format_score
from trimtab.report.wording import METRIC_TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Each must be a colour that matplotlib writes as its own six digits and that nothing else uses.
_INK, _MUTED, _LINE = "#010101", "#020202", "#030303"
_KINDS = {"baseline": "#040404", "base": "#050505", "tuned": "#060606"}
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _LINE: "--line",
    _KINDS["baseline"]: "--baseline",
    _KINDS["base"]: "--base",
    _KINDS["tuned"]: "--tuned",
}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trimtab",
    "font.size": 9,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
# More points than this cannot be told apart at the width of the page.
_CURVE_POINTS = 800


# Scores further apart than this ratio are drawn on a logarithmic axis.
_WIDE_RANGE = 20


def score_figure(content: Content) -> str:
    """The primary metric of every system with its interval, as SVG; empty where nothing has a value."""
    metric = content.primary_metric
    found = [(system, system.scores[metric]) for system in content.systems if metric in system.scores]
    shown = [(system, score) for system, score in found if score.value is not None]
    if not shown:
        return ""
    scale = 100 if metric in PERCENTAGES else 1
    with _new_figure(6.6, 0.75 + 0.34 * len(shown)) as figure:
        axes = figure.add_subplot()
        for place, (system, score) in enumerate(shown):
            value = scale * (score.value or 0.0)
            colour = _KINDS.get(system.kind, _INK)
            if score.low is not None and score.high is not None:
                axes.plot([scale * score.low, scale * score.high], [place, place], color=colour, linewidth=2.2)
            axes.plot([value], [place], "o", color=colour, markersize=6.5)
            label = format_score(metric, score.value)
            above: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
            axes.annotate(label, (value, place), (0, 6.5), **above)
        if content.reference and content.primary(content.reference) is not None:
            bar = scale * (content.primary(content.reference) or 0.0)
            axes.axvline(bar, color=_MUTED, linewidth=0.8, dashes=(3, 3), zorder=1)
        axes.set_yticks(range(len(shown)), [system.title for system, _ in shown])
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set_ylim(len(shown) - 0.5, -0.75)
        axes.grid(axis="x", color=_LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        values = [score.value for _, score in shown if score.value is not None]
        if min(values) > 0 and max(values) > _WIDE_RANGE * min(values):  # perplexities of good and bad models
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter("")
            axes.margins(x=0.12)
        title = METRIC_TITLES.get(metric, metric)
        axes.set_xlabel(f"{title} (%)" if metric in PERCENTAGES else title)
        return _svg(figure, "scores", f"{title} of every system with its 95 % interval")


def loss_figure(trial: Trial) -> str:
    """Training loss, raw and smoothed, with validation loss; empty where there are no points."""
    if not trial.losses and not trial.validation_losses:
        return ""
    with _new_figure(4.9, 2.9) as figure:
        axes = figure.add_subplot()
        if trial.losses:
            steps, losses = zip(*_thinned(trial.losses), strict=True)
            axes.plot(steps, losses, color=_KINDS["tuned"], linewidth=0.8, alpha=0.3)
            steps, losses = zip(*_thinned(_smoothed(trial.losses)), strict=True)
            axes.plot(steps, losses, color=_KINDS["tuned"], linewidth=1.7, label="training, smoothed")
        if trial.validation_losses:
            _plot_validation(axes, trial.validation_losses)
        _finish_curve(axes, trial, "loss")
        return _svg(figure, f"loss-{trial.name}", f"Training and validation loss by step, {trial.title}")


def validation_figure(trial: Trial) -> str:
    """Validation accuracy by step; empty where there are no points."""
    if not trial.validation_accuracies:
        return ""
    with _new_figure(4.9, 2.9) as figure:
        axes = figure.add_subplot()
        points = [(step, 100 * value) for step, value in trial.validation_accuracies]
        _plot_validation(axes, points)
        _finish_curve(axes, trial, "accuracy (%)")
        return _svg(figure, f"accuracy-{trial.name}", f"Validation accuracy by step, {trial.title}")


def _plot_validation(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, "o-", color=_INK, linewidth=1.2, markersize=4, label="validation")


def _finish_curve(axes: Axes, trial: Trial, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    best_step = trial.training.get("best_step")
    if isinstance(best_step, int | float):
        axes.axvline(best_step, color=_MUTED, linewidth=0.8, dashes=(3, 3), label="step kept")
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential moving average over about a twentieth of the points, without the pull towards zero."""
    keep = 1 - 1 / max(len(points) / 20, 1)
    mean, weight, smoothed = 0.0, 0.0, []
    for step, value in points:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append((step, mean / weight))
    return smoothed


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    return points[:: -(-len(points) // _CURVE_POINTS)]


@contextmanager
def _new_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, outside pyplot, whose global state a library must not touch."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        yield Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any, name: str, label: str) -> str:
    """The figure as an SVG element that can stand in a page beside others."""
    from markupsafe import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    # Its rule for `*` would reach the whole page; the page's own style says the same for figures.
    drawing = re.sub(r"<style.*?</style>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"font: ((?:bold )?)([\d.]+px) [^;\"]+", r"font-size: \2", drawing)
    for colour, variable in _VARIABLES.items():
        drawing = drawing.replace(colour, f"var({variable})")
    # Ids count from one in every figure.
    drawing = re.sub(r'\bid="', f'id="{escape(name)}-', drawing)
    drawing = drawing.replace("url(#", f"url(#{escape(name)}-")
    drawing = re.sub(r'xlink:href="#', f'href="#{escape(name)}-', drawing)
    view_box = re.search(r'viewBox="[^"]+"', drawing)
    head = f'<svg {view_box[0] if view_box else ""} role="img" aria-label="{escape(label)}">'
    return re.sub(r"<svg[^>]*>", lambda _: head, drawing, count=1)
