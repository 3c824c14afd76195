"""Every format gives the same rows; labels keep their names; splits are stratified, grouped and seeded."""

import bz2
import contextlib
import gzip
import json
import lzma
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trimtab.data import prepare_data, read_rows, write_rows
from trimtab.data.reading import ArrivingRows, read_file, read_source, stream_file
from trimtab.errors import DataError, SourceError
from trimtab.progress import Silent
from trimtab.study_config import build_study

ROWS = [{"text": f'a "quoted", text\nnumber {i}' if i == 3 else f"text {i}", "label": "ab"[i % 2]} for i in range(40)]


def as_csv(delimiter):
    import csv
    import io

    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["text", "label"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", as_csv(",")),
        ("a.tsv", as_csv("\t")),
        ("a.jsonl", JSONL),
        ("bom.csv", b"\xef\xbb\xbf" + as_csv(",")),
        ("a.csv.gz", gzip.compress(as_csv(","), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(JSONL)),
        ("a.jsonl.xz", lzma.compress(JSONL)),
        ("a.jsonl.zst", pa.compress(JSONL, codec="zstd", asbytes=True)),
    ],
)
def test_formats(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    table = read_file(path)
    assert table.rows == ROWS
    assert table.place(2).endswith(f"{name}:{3 if 'jsonl' in name else 4}")


def test_parquet_and_saved_dataset_and_folder(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_file(tmp_path / "a.parquet").rows == ROWS
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    saved = datasets.Dataset.from_list([row | {"label": "ab".index(row["label"])} for row in ROWS], features=features)
    datasets.DatasetDict({"train": saved, "validation": saved.select(range(4))}).save_to_disk(tmp_path / "saved")
    splits = read_source(str(tmp_path / "saved"), Silent()).splits
    assert splits["train"].rows == ROWS
    assert len(splits["validation"].rows) == 4
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_bytes(JSONL)
    (tmp_path / "folder" / "dev.csv").write_bytes(as_csv(","))
    splits = read_source(str(tmp_path / "folder"), Silent()).splits
    assert splits.keys() == {"train", "validation"}


def test_conll_is_read_as_it_is_needed_and_without_tags_where_none_are_asked_for(tmp_path, monkeypatch):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield ["Rome B-LOC\n", "is O\n", "\n"][taken % 3 - 1]

    path = tmp_path / "new.conll"
    path.write_text("Rome\nis\n\nAnn\n")
    assert list(stream_file(path, is_labelled=False)) == [({"tokens": ["Rome", "is"]}, 1), ({"tokens": ["Ann"]}, 4)]
    with pytest.raises(DataError, match=r"new\.conll:1: 'Rome' has no tag; write a word and its tag on each line"):
        next(stream_file(path))
    monkeypatch.setattr("trimtab.data.reading._open_text", lambda _: contextlib.nullcontext(endless()))
    assert next(stream_file(path)) == ({"tokens": ["Rome", "is"], "tags": ["B-LOC", "O"]}, 1)
    assert taken == 3


@pytest.mark.parametrize("packed", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_line_that_is_not_utf8_is_named(tmp_path, packed):
    suffix = {bytes: "", gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}[packed]
    path = tmp_path / f"latin.csv{suffix}"
    path.write_bytes(packed('text\n"two\nlines"\ncafé\n'.encode("latin-1")))
    with pytest.raises(DataError, match=rf"latin\.csv{suffix}: not UTF-8 in line 4 \(byte 0xe9\); save it as UTF-8"):
        read_file(path)


def test_files_that_cannot_be_read_are_told_as_such(tmp_path, monkeypatch):
    for name, content in (
        ("cut.csv.gz", gzip.compress(b"0123456789" * 999)[:20] + b"?" * 20),
        ("no.csv.bz2", b"nonsense"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((DataError, SourceError), match=rf"{name}.*(damaged or cut off|cannot be read)"):
            read_file(tmp_path / name)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mine.csv").write_text("text\na\n")
    monkeypatch.setattr("trimtab.data.reading._open_bytes", refuse)
    with pytest.raises(SourceError, match=r"mine\.csv cannot be read \(Permission denied\); check that it is there"):
        read_file(tmp_path / "mine.csv")


class Slow:
    """A pipe that gives what was written in one go."""

    def __init__(self, *blocks):
        self.blocks = list(blocks)

    def read1(self, _):
        return self.blocks.pop(0) if self.blocks else b""


def test_rows_of_a_stream_are_taken_as_they_arrive():
    rows = ArrivingRows(Slow(b"\nfirst\n\nsec", b"ond\r\nthird\n\n", b"caf\xc3", b"\xa9"))
    assert rows.take(9) == [({"text": "first"}, 2)]  # and does not wait for what may never come
    assert rows.take(1) == [({"text": "second"}, 4)]
    assert rows.take(9) == [({"text": "third"}, 5)]
    assert rows.take(9) == [({"text": "café"}, 7)]
    assert rows.take(9) == []
    objects = ArrivingRows(Slow(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n{"te', b'xt": "c"}\n'))
    assert [row["text"] for row, _ in objects.take(9)] == ["a", "b"]
    assert list(objects) == [({"text": "c"}, 3)]
    latin = ArrivingRows(Slow(b"good\n", b"caf\xe9\n"))
    assert latin.take(9) == [({"text": "good"}, 1)]
    with pytest.raises(DataError, match=r"stdin:2: not UTF-8 \(byte 0xe9\); send it as UTF-8"):
        latin.take(9)


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def prepare(tmp_path, rows, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = Notes()
    return prepare_data(build_study({"train_data": str(path)} | settings), notes), notes.notes


def test_labels_and_guesses(tmp_path):
    rows = [{"Sentence": f"s{i}", "Category": [10, 9, 2][i % 3]} for i in range(90)]
    data, notes = prepare(tmp_path, rows)
    assert data.label_names == ["2", "9", "10"]  # numbers in their order, not as text
    assert any("'Sentence'" in note and "--text-column" in note for note in notes)
    assert any("'Category'" in note for note in notes)


def test_splits_are_stratified_disjoint_and_seeded(tmp_path):
    rows = [{"text": f"text number {i}", "label": "rare" if i % 5 == 0 else "often"} for i in range(500)]
    data, _ = prepare(tmp_path, rows)
    again, _ = prepare(tmp_path, rows)
    other, _ = prepare(tmp_path, rows, seed=1)
    ids = [{row.id for row in split} for split in (data.train, data.validation, data.test)]
    assert sum(map(len, ids)) == len(set.union(*ids)) == 500
    assert len(data.test) == 50
    assert 44 <= len(data.validation) <= 46
    for split in (data.train, data.validation, data.test):
        assert Counter(row.label for row in split)[1] / len(split) == pytest.approx(0.2, abs=0.03)
    assert again.sha256 == data.sha256 != other.sha256
    limited, _ = prepare(tmp_path, rows, max_train_rows=100, max_test_rows=20)
    assert (len(limited.train), len(limited.test)) == (100, 20)
    assert {row.id for row in limited.test} <= ids[2]


def test_a_rare_class_leaves_the_splits_at_a_tenth(tmp_path):
    rows = [{"text": f"text number {i}", "label": "ab"[i % 2] if i > 3 else "rare"} for i in range(1000)]
    data, _ = prepare(tmp_path, rows)
    assert [len(data.test), len(data.validation)] == pytest.approx([100, 90], abs=2)
    assert "rare" in {data.label_names[row.label] for row in data.train}


def test_few_rows_of_many_groups_can_be_cut(tmp_path):
    rows = [{"text": f"text number {i}", "label": "ab"[i % 2], "author": f"a{i}"} for i in range(16)]
    data, _ = prepare(tmp_path, rows, group_column="author")
    assert sum(map(len, (data.train, data.validation, data.test))) == 16
    assert len(data.test) in (2, 3)
    with pytest.raises(DataError, match=r"too few groups \(1\) to cut a validation split"):
        prepare(tmp_path, rows[:4], group_column="author")


def test_groups_stay_in_one_split(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2], "film": f"f{i // 7}"} for i in range(700)]
    data, _ = prepare(tmp_path, rows, group_column="film")
    groups = [{row.group for row in split} for split in (data.train, data.validation, data.test)]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    assert sum(map(len, groups)) == 100


def test_given_splits_are_used_as_given(tmp_path):
    test = tmp_path / "given.csv"
    test.write_text("text,label\nx,a\ny,b\nz,b\n")
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(60)]
    data, _ = prepare(tmp_path, rows, test_data=str(test), validation_data=str(test))
    assert [(row.text, row.label) for row in data.test] == [("x", 0), ("y", 1), ("z", 1)]
    assert [row.id for row in data.test] == ["test:2", "test:3", "test:4"]
    assert len(data.train) == 60


def test_near_duplicates_inside_train_and_into_test(tmp_path):
    long = "the quick brown fox jumps over the lazy dog while the moon is shining brightly over number"
    rows = [
        {"text": f"{i} {chr(97 + i % 26) * 3} unrelated words {i * i} {i**3}", "label": "ab"[i % 2]} for i in range(60)
    ]
    rows += [{"text": long, "label": "a"}, {"text": long.upper() + "!", "label": "a"}]
    test = tmp_path / "given.csv"
    test.write_text(f"text,label\n{long}.,a\nnothing of the kind at all,b\n")
    data, _ = prepare(tmp_path, rows, test_data=str(test), validation_data=str(test))
    assert data.duplicate_rows == 1
    assert data.leaked_test_ids == {"test:2"}


def test_rows_survive_the_run_folder(tmp_path):
    data, _ = prepare(tmp_path, ROWS)
    write_rows(tmp_path / "rows_kept.jsonl", data.test)
    assert read_rows(tmp_path / "rows_kept.jsonl") == data.test
