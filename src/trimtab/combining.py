"""Several adapters of one base as one adapter by weight, scored beside each of its parts on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.adapters import LoadedAdapter, load_adapter
from trimtab.data import Row, read_rows
from trimtab.errors import AdapterError, InputError
from trimtab.evaluation.comparison import compare_with
from trimtab.evaluation.evaluate import predict_outputs
from trimtab.evaluation.predictions import Predictions
from trimtab.progress import Progress, Silent
from trimtab.runs import RunFolder

_RESULT = "combined"


def combine_adapters(
    weights: Mapping[Path, float],
    out: Path,
    combination_type: str = "linear",
    density: float | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the weighted combination of adapters as an adapter of its own, and compare it with each of them.

    All are scored on the test rows of the first one's run. Choose weights elsewhere: what is chosen by these rows
    is flattered by them.

    Args:
        weights: by adapter folder.
        density: the share of each adapter that is kept, for ties, dare and magnitude pruning.

    Returns:
        The shape of `compare_two`: the metrics of every system with intervals, and the contrasts of the result.

    Raises:
        InputError: adapters that cannot be combined, no test rows beside the first, or `out` is taken.
    """
    listener = progress or Silent()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; give another --out")
    first, *others = weights
    rows = _test_rows(first)
    names = _names_of(list(weights))
    listener.stage(f"Loading {len(names)} adapters on one base")
    loaded = load_adapter(first, name=names[first], progress=listener)
    for other in others:
        loaded.load(other, names[other])
    if loaded.scorer.task.writes_answers or loaded.scorer.task.name == "preference":
        raise AdapterError(f"{loaded.scorer.task.name} adapters are not combined here; use LoadedAdapter.combine")
    by_name = {names[path]: weight for path, weight in weights.items()}
    loaded.combine(by_name, _RESULT, combination_type, density)
    predictions = {name: _predict(loaded, name, rows, listener) for name in (*by_name, _RESULT)}
    found = compare_with(predictions, _RESULT)
    metric = found["primary_metric"]
    value = found["systems"][-1]["metrics"][metric]["value"]
    loaded.switch(_RESULT)
    loaded.save(out, score={"metric": metric, "value": value, "test_rows": len(rows)})
    return found


def _test_rows(adapter: Path) -> list[Row]:
    run = RunFolder(adapter.absolute().parent.parent.parent)
    if not run.test_rows.is_file():
        raise InputError(f"{adapter} is no adapter in a run folder, whose test rows are needed; give it first")
    return read_rows(run.test_rows)


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


def _predict(loaded: LoadedAdapter, name: str, rows: Sequence[Row], progress: Progress) -> Predictions:
    progress.stage(f"Scoring {name} on {len(rows)} test rows")
    loaded.switch(name)
    scorer = loaded.scorer
    encoded = scorer.encode(rows)
    return predict_outputs(scorer.task, rows, encoded, loaded.label_names, scorer.score(encoded, progress).outputs)
