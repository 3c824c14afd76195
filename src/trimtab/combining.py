"""Several adapters of one base as one adapter by weight, scored beside each of its parts on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from trimtab.adapters import load_adapter
from trimtab.adapters.files import check_folder
from trimtab.adapters.judging import encode_beside_base, find_test_rows, judge
from trimtab.adapters.origin import find_base
from trimtab.data import Row, groups_of, read_rows
from trimtab.errors import InputError
from trimtab.evaluation.comparison import compare_with
from trimtab.evaluation.predictions import Predictions
from trimtab.progress import Progress, Silent
from trimtab.runs import RunFolder
from trimtab.sources import locate_adapter

_RESULT = "combined"
# Test rows that runs which were cut in other ways must share.
_FEWEST_ROWS = 30


def combine_adapters(
    weights: Mapping[str | Path, float],
    out: Path,
    combination_type: str = "linear",
    density: float | None = None,
    *,
    base: str | None = None,
    data: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the weighted combination of adapters as an adapter of its own, and compare it with each of them.

    All are scored on the test rows that their runs share, or on `data`. Choose weights elsewhere: what is chosen by
    these rows is flattered by them.

    Args:
        weights: by adapter folder, or Hub id.
        density: the share of each adapter that is kept, for ties, dare and magnitude pruning.
        base: where the base is, if not where it was.
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
    names = _names_of(list(weights))
    folders = {locate_adapter(given): given for given in weights}
    if len(folders) < len(weights):
        raise InputError(f"{', '.join(map(str, weights))}: an adapter is given twice; add its weights up")
    first, *others = folders
    _, facts = find_base(first, check_folder(first), base, listener)
    rows = find_test_rows(first, facts, data, columns, listener)
    if data is None:
        rows = _unseen_rows(rows, others, listener)
    listener.stage(f"Loading {len(names)} adapters on one base")
    loaded = load_adapter(first, base, name=names[folders[first]], progress=listener)
    for other in others:
        loaded.load(other, names[folders[other]])
    by_name = {names[given]: weight for given, weight in weights.items()}
    loaded.combine(by_name, _RESULT, combination_type, density)
    encoded = encode_beside_base(loaded, rows, listener)
    predictions: dict[str, Predictions] = {}
    for name in (*by_name, _RESULT):
        listener.stage(f"Scoring {name} on {len(rows)} test rows")
        loaded.switch(name)
        _, predictions[name] = judge(loaded, rows, encoded, listener)
    found = compare_with(predictions, _RESULT, groups=groups_of(rows))
    metric = found["primary_metric"]
    value = found["systems"][-1]["metrics"][metric]["value"]
    loaded.save(out, score={"metric": metric, "value": value, "test_rows": len(rows)})
    return found


def _unseen_rows(rows: list[Row], others: Sequence[Path], progress: Progress) -> list[Row]:
    """Those test rows of the first adapter's run that all other runs tested on, too: no part was trained on them.

    Raises:
        InputError: few are left.
    """
    kept = rows
    for other in others:
        run = RunFolder.around(other)
        if run is None or not run.test_rows.is_file():
            progress.note(f"{other} lies in no run, so whether it was trained on these test rows cannot be checked")
            continue
        theirs = {_content(row) for row in read_rows(run.test_rows)}
        kept = [row for row in kept if _content(row) in theirs]
    if len(kept) < len(rows):
        if len(kept) < _FEWEST_ROWS:
            raise InputError(
                f"of {len(rows)} test rows {len(kept)} are test rows of every run, and on the others an adapter may "
                "have been trained; give rows that none has seen: --data"
            )
        progress.note(f"{len(kept)} of {len(rows)} test rows are test rows of every run; the others are left out")
    return kept


def _content(row: Row) -> str:
    """A row without its place, which differs from run to run."""
    return repr(astuple(replace(row, id="", label=0, group=None)))


def _names_of(adapters: Sequence[str | Path]) -> dict[str | Path, str]:
    """A name for each: its run and its trial; of a repository its own, without owner and revision."""
    if len(set(adapters)) < 2:
        raise InputError("give two adapters or more, each with its weight: FOLDER=0.5")
    found: dict[str | Path, str] = {}
    for given in adapters:
        path = Path(given).expanduser()
        if not path.exists():
            path = Path(str(given).partition("@")[0])
        parts = path.absolute().parts
        name = "-".join(part for part in (parts[-4:-3] + parts[-2:-1])) if path.name == "adapter" else path.name
        name = name.replace(".", "_").lstrip("_") or "adapter"
        found[given] = name if name not in (*found.values(), _RESULT) else f"{name}-{len(found) + 1}"
    return found
