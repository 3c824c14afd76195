"""Numbers as a reader meets them: percentages, points, p-values, seconds, bytes."""

from __future__ import annotations

from trimtab.report.content import Contrast, Score

# Metrics between 0 and 1 that people read as percentages; the others stay plain numbers.
PERCENTAGES = frozenset({"accuracy", "f1", "precision", "recall", "token_accuracy", "f1_macro", "exact_match", "rouge1",
                         "rouge2", "rougeL"})  # fmt: skip
MISSING = "–"
_MINUS = "\N{MINUS SIGN}"


def format_number(value: float | None, digits: int, signed: bool = False) -> str:
    if value is None:
        return MISSING
    text = f"{abs(value):,.{digits}f}"
    is_zero = not any(character in "123456789" for character in text)
    sign = "" if is_zero else _MINUS if value < 0 else "+" if signed else ""
    return sign + text


def format_score(metric: str, value: float | None) -> str:
    """`83.1 %` or `0.412`."""
    if value is None:
        return MISSING
    return f"{format_number(100 * value, 1)} %" if metric in PERCENTAGES else format_number(value, 3)


def format_interval(metric: str, low: float | None, high: float | None) -> str:
    """`[80.4, 85.6]`, in the unit of its score; empty where there is none."""
    if low is None or high is None:
        return ""
    scale, digits = (100, 1) if metric in PERCENTAGES else (1, 3)
    return f"[{format_number(scale * low, digits)}, {format_number(scale * high, digits)}]"


def format_score_interval(metric: str, score: Score | None) -> str:
    return format_interval(metric, score.low, score.high) if score else ""


def format_difference(metric: str, value: float | None, signed: bool = True) -> str:
    """`+1.9 points`, percentage points; or `−0.031`."""
    if value is None:
        return MISSING
    if metric in PERCENTAGES:
        return f"{format_number(100 * value, 1, signed)} points"
    return format_number(value, 3, signed)


def format_contrast(contrast: Contrast) -> str:
    """`+1.9 points [−0.3, 4.1]`."""
    difference = format_difference(contrast.metric, contrast.difference)
    return f"{difference} {format_interval(contrast.metric, contrast.low, contrast.high)}".rstrip()


def format_p_value(value: float | None) -> str:
    if value is None:
        return MISSING
    if value < 0.001:
        return "< 0.001"
    # Two digits would print 0.049 as 0.05 and hide on which side of the threshold it lies.
    return f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def format_count(value: float | None) -> str:
    return MISSING if value is None else f"{round(value):,}"


def format_seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def format_rate(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.{1 if value < 1000 else 0}f}"


def format_percent(value: float | None) -> str:
    """A value already in per cent; small shares keep the four digits that `peft` prints."""
    if value is None:
        return MISSING
    return f"{value:.4f} %" if 0 < value < 1 else f"{value:.1f} %"


def format_share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else MISSING


def format_bytes(value: float | None) -> str:
    if value is None:
        return MISSING
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= size:
            return f"{value / size:.{0 if value >= 100 * size else 1}f} {unit}"
    return f"{value:.0f} B"
