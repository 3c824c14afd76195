"""Several adapters of one base as one adapter by weight, scored beside each of its parts on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.adapters import load_adapter
from trimtab.adapters.files import check_folder
from trimtab.adapters.judging import encode_beside_base, find_test_rows, judge
from trimtab.errors import InputError
from trimtab.evaluation.comparison import compare_with
from trimtab.evaluation.predictions import Predictions
from trimtab.progress import Progress, Silent

_RESULT = "combined"


def combine_adapters(
    weights: Mapping[Path, float],
    out: Path,
    combination_type: str = "linear",
    density: float | None = None,
    *,
    data: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the weighted combination of adapters as an adapter of its own, and compare it with each of them.

    All are scored on the test rows of the first one's run, or on `data`. Choose weights elsewhere: what is chosen by
    these rows is flattered by them.

    Args:
        weights: by adapter folder.
        density: the share of each adapter that is kept, for ties, dare and magnitude pruning.
        data: rows with labels, as for training.
        columns: of `data`, by what they are for (text, label, …), where their names do not tell.

    Returns:
        The shape of `compare_two`: the metrics of every system with intervals, and the contrasts of the result.

    Raises:
        InputError: adapters that cannot be combined, no test rows, or `out` is taken.
    """
    listener = progress or Silent()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; give another --out")
    first, *others = weights
    rows = find_test_rows(first, check_folder(first), data, columns, listener)
    names = _names_of(list(weights))
    listener.stage(f"Loading {len(names)} adapters on one base")
    loaded = load_adapter(first, name=names[first], progress=listener)
    for other in others:
        loaded.load(other, names[other])
    by_name = {names[path]: weight for path, weight in weights.items()}
    loaded.combine(by_name, _RESULT, combination_type, density)
    encoded = encode_beside_base(loaded, rows, listener)
    predictions: dict[str, Predictions] = {}
    for name in (*by_name, _RESULT):
        listener.stage(f"Scoring {name} on {len(rows)} test rows")
        loaded.switch(name)
        _, predictions[name] = judge(loaded, rows, encoded, listener)
    found = compare_with(predictions, _RESULT)
    metric = found["primary_metric"]
    value = found["systems"][-1]["metrics"][metric]["value"]
    loaded.save(out, score={"metric": metric, "value": value, "test_rows": len(rows)})
    return found


def _names_of(adapters: Sequence[Path]) -> dict[Path, str]:
    """A name for each: its run and its trial."""
    if len(set(adapters)) < 2:
        raise InputError("give two adapters or more, each with its weight: FOLDER=0.5")
    found: dict[Path, str] = {}
    for path in adapters:
        parts = path.absolute().parts
        name = "-".join(part for part in (parts[-4:-3] + parts[-2:-1])) if path.name == "adapter" else path.name
        name = name.replace(".", "_").lstrip("_") or "adapter"
        found[path] = name if name not in (*found.values(), _RESULT) else f"{name}-{len(found) + 1}"
    return found
