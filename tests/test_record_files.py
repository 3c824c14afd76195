"""Rows from files and streams, and what is written beside them."""

import json
from datetime import datetime

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from samples import Notes
from trimtab.errors import DataError
from trimtab.record_files import ROWS_AT_ONCE, write_records


@pytest.mark.parametrize("name", ["found.csv", "found.parquet"])
def test_a_column_that_a_probability_replaces_is_told_once(tmp_path, name):
    mine = {"probability_good": "mine", "prediction": "good", "probabilities": {"good": 0.75}}
    heard = Notes()
    write_records([mine, mine], str(tmp_path / name), progress=heard)
    rows = pq.read_table(tmp_path / name) if name.endswith("parquet") else pyarrow.csv.read_csv(tmp_path / name)
    assert rows["probability_good"].to_pylist() == [0.75, 0.75]
    assert heard.notes == [
        "what the adapter says replaces columns of the input: 'probability_good'; rename them to keep both"
    ]


def test_columns_that_change_their_type_are_told(tmp_path):
    """Past the rows that a Parquet file's types are found in."""

    def rows(last):
        return [{"value": place, "note": None} for place in range(ROWS_AT_ONCE)] + [last]

    with pytest.raises(DataError, match=r"column 'value' holds int64 in the first rows and double after row 512"):
        write_records(rows({"value": 1.5, "note": None}), str(tmp_path / "found.parquet"))
    write_records(rows({"value": 1, "note": "late"}), str(tmp_path / "found.parquet"))
    assert pq.read_table(tmp_path / "found.parquet").to_pylist()[-1] == {"value": 1, "note": "late"}
    for name in ("found.csv", "other.parquet"):
        with pytest.raises(DataError, match="row 513 has a column 'more' that the first one lacks; use --format jsonl"):
            write_records(rows({"value": 1, "more": 2}), str(tmp_path / name))
    with pytest.raises(DataError, match="Parquet is no stream of text; give a file"):
        write_records([], "-", "parquet")
    write_records([{"when": datetime(2026, 1, 2), "probabilities": 0.5}], str(tmp_path / "found.jsonl"))
    assert json.loads((tmp_path / "found.jsonl").read_text()) == {"when": "2026-01-02 00:00:00", "probabilities": 0.5}
    write_records([{"probabilities": 0.5}], str(tmp_path / "own.csv"))
    assert (tmp_path / "own.csv").read_text().split() == ["probabilities", "0.5"]
