"""Cutting missing splits from train, and taking fewer rows; both stratified and seeded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from trimtab.data.rows import Row
from trimtab.errors import DataError

# A tenth of the rows each for validation and for test, where they are not given; of few long texts a fifth, since a
# test needs some of them.
_FOLDS = 10
_FOLDS_OF_FEW = 5
_FEW_TEXTS = 200


def cut_split(rows: Sequence[Row], seed: int, what: str, has_labels: bool = True) -> tuple[list[Row], list[Row]]:
    """(kept, cut): a tenth cut off, by label share; groups stay whole where rows have them.

    Of fewer than 200 rows without labels a fifth is cut off.

    Raises:
        DataError: too few rows or groups to cut from.
    """
    import warnings

    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    labels = [row.label for row in rows]  # all alike where the task has none
    grouped = rows[0].group is not None
    counts = Counter(labels).values()
    units = min(max(counts), len({row.group for row in rows})) if grouped else min(counts)
    if units < 2:
        kind = "groups" if grouped else "rows of the rarest class"
        raise DataError(f"too few {kind} ({units}) to cut a {what} split from train; give --{what}-data, or more rows")
    splitter = StratifiedGroupKFold if grouped else StratifiedKFold
    wanted = _FOLDS if has_labels or len(rows) >= _FEW_TEXTS else _FOLDS_OF_FEW
    folds = splitter(n_splits=min(wanted, units if grouped else max(counts)), shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # that a class has fewer rows than there are folds
        warnings.simplefilter("ignore", UserWarning)
        kept, cut = next(folds.split(labels, labels, [row.group for row in rows] if grouped else None))
    return [rows[i] for i in kept], [rows[i] for i in cut]


def take_rows(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """At most `limit` rows by label share, in their order."""
    if limit is None or limit >= len(rows):
        return rows
    from sklearn.model_selection import train_test_split

    labels = [row.label for row in rows]
    classes = len(set(labels))
    can_stratify = min(Counter(labels).values()) >= 2 and classes <= min(limit, len(rows) - limit)
    taken, _ = train_test_split(
        range(len(rows)), train_size=limit, random_state=seed, stratify=labels if can_stratify else None
    )
    return [rows[i] for i in sorted(taken)]
