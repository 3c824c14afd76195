"""What was estimated before the run, beside what happened."""

from __future__ import annotations

from trimtab.report.content import Content, finite
from trimtab.report.number_format import MISSING, format_bytes, format_count, format_seconds
from trimtab.report.tables import Cell, Column, Line, Table


def estimate_table(content: Content) -> Table | None:
    """Parameters, adapter, memory and time; None where the run holds no estimate, or no tuned system."""
    estimate, tuned = content.estimate, content.tuned
    if not estimate or tuned is None:
        return None
    stages = [finite(value) or 0.0 for value in (content.manifest.get("seconds") or {}).values()]
    rows = [
        ("Trainable parameters", "trainable_parameters", tuned.cost.get("trainable_parameters"), format_count),
        ("Adapter size", "adapter_bytes", tuned.cost.get("adapter_bytes"), format_bytes),
        ("Peak memory", "peak_memory_bytes", tuned.cost.get("peak_memory_bytes"), format_bytes),
        ("Time (s)", "total_seconds", sum(stages) or None, format_seconds),
    ]
    lines = []
    for title, name, measured, show in rows:
        said = finite(estimate.get(name))
        ratio = f"{measured / said:.2f}" if measured and said else MISSING
        interval = ""
        if name == "total_seconds":
            low, high = (finite(estimate.get(f"{end}_seconds")) for end in ("low", "high"))
            interval = f"{format_seconds(low)} to {format_seconds(high)}"
        lines.append(Line([Cell(title), Cell(show(said), interval), Cell(show(measured)), Cell(ratio)]))
    columns = [
        Column("Of the tuned system", is_number=False),
        Column("Estimated", "Before any weight was read, from the model's shapes and this machine's rates."),
        Column("Measured"),
        Column("Ratio", "Measured divided by estimated."),
    ]
    return Table("Estimated before the run, and measured", columns, lines)
