"""Files, folders and Hub ids to tables of plain rows, with the line each came from."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trimtab.errors import DataError, SourceError
from trimtab.progress import Progress
from trimtab.runs import parse_jsonl
from trimtab.sources import locate_data_starter, offline
from trimtab.starters import PREFIX, Starter

_SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


@dataclass(frozen=True)
class Table:
    """Rows of one file or split; `line` gives the place of a row as a reader would look it up."""

    source: str
    rows: list[dict[str, Any]]
    lines: list[int]

    def place(self, index: int) -> str:
        return f"{self.source}:{self.lines[index]}"

    @property
    def columns(self) -> list[str]:
        return list(self.rows[0])


@dataclass(frozen=True)
class Source:
    """The splits of one data source; a starter also says what its columns mean."""

    splits: dict[str, Table]
    starter: Starter | None = None


def read_source(source: str, progress: Progress) -> Source:
    """Read every split of `source`.

    Raises:
        SourceError: nothing there, or a format that is not read.
        DataError: empty, malformed (file and line) or not UTF-8.
    """
    if source.startswith(PREFIX):
        starter, folder = locate_data_starter(source, progress)
        return Source(_read_folder(folder), starter)
    path = Path(source).expanduser()
    if path.is_dir():
        is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        return Source(_read_saved_dataset(path) if is_saved else _read_folder(path))
    if path.is_file():
        return Source({"train": read_file(path)})
    if path.suffix or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise SourceError(f"no data file or folder at {source!r} (looked in {Path.cwd()}); check the path")
    return Source(_read_hub(source))


def _read_folder(folder: Path) -> dict[str, Table]:
    splits: dict[str, Table] = {}
    for path in sorted(folder.iterdir()):
        name = _SPLIT_NAMES.get(path.name.split(".")[0].lower())
        if name and path.is_file() and _format_of(path):
            splits[name] = read_file(path)
    if "train" not in splits:
        raise SourceError(
            f"{folder} is neither a saved `datasets` folder nor holds a train file "
            "(train.csv, .tsv, .jsonl or .parquet, plain or compressed)"
        )
    return splits


def _format_of(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (*_OPENERS, ".zst"):
        suffixes.pop()
    known = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl",
             ".json": "jsonl", ".parquet": "parquet", ".conll": "conll", ".iob": "conll", ".iob2": "conll",
             ".bio": "conll"}  # fmt: skip
    return known.get(suffixes[-1]) if suffixes else None


def read_file(path: Path) -> Table:
    """One file as a table; the format is told by its name."""
    pairs = list(stream_file(path))
    return Table(str(path), [row for row, _ in pairs], [line for _, line in pairs])


def stream_file(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of a file, each with its line, one after another.

    Raises:
        SourceError: no such file, or a format that is not read.
        DataError: empty, malformed (file and line) or not UTF-8.
    """
    if not path.is_file():
        raise SourceError(f"no data file at {str(path)!r} (looked in {Path.cwd()}); check the path")
    kind = _format_of(path)
    if kind is None:
        raise SourceError(
            f"{path}: format not known by its name; use .csv, .tsv, .jsonl, .parquet or .conll "
            "(or .gz, .bz2, .xz, .zst of these)"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty; give a file with a row for each example")
    has_rows = False
    try:
        for pair in _read_parquet(path) if kind == "parquet" else _read_text(path, kind):
            has_rows = True
            yield pair
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start} of a block: "
                        f"{error.object[error.start:error.start + 1]!r}); save it as UTF-8") from error  # fmt: skip
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file is damaged or cut off ({error}); fetch it again") from error
    if not has_rows:
        raise DataError(f"{path}: the file holds no rows; give a file with a row for each example")


def _read_text(path: Path, kind: str) -> Iterator[tuple[dict[str, Any], int]]:
    with _open_text(path) as file:
        if kind == "conll":
            yield from _read_conll(file, path)
        else:
            yield from parse_jsonl(file, path) if kind == "jsonl" else _read_delimited(file, path, kind)


def _open_text(path: Path) -> IO[str]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return io.TextIOWrapper(pa.input_stream(str(path), compression="zstd"), "utf-8-sig", newline="")
    opener: Callable[..., IO[str]] = _OPENERS.get(suffix, open)
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _read_delimited(file: IO[str], path: Path, kind: str) -> Iterator[tuple[dict[str, Any], int]]:
    csv.field_size_limit(1 << 27)
    reader = csv.reader(file, delimiter="\t" if kind == "tsv" else ",", strict=True)
    start = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: two columns have the same name in {header}; rename one")
        start = reader.line_num + 1
        for fields in reader:
            if fields:
                if len(fields) != len(header):
                    raise DataError(
                        f"{path}:{start}: {len(fields)} fields where the header has {len(header)} "
                        f"({', '.join(header)}); quote fields that hold a {'tab' if kind == 'tsv' else 'comma'}"
                    )
                yield dict(zip(header, fields, strict=True)), start
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{start}: not valid {kind.upper()} ({error}); fix the quotes in this line") from error


def _read_conll(file: IO[str], path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """A word and its tag a line, first and last of its fields; a blank line after each sentence (CoNLL-2003)."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate((*file, ""), 1):
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-" and not line.startswith("# "):
            if len(fields) < 2:
                raise DataError(f"{path}:{number}: {line.strip()!r} has no tag; write a word and its tag on each line")
            words.append(fields[0])
            tags.append(fields[-1])
        elif words and not fields:
            yield {"tokens": words, "tags": tags}, number - len(words)
            words, tags = [], []


def _read_parquet(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, number
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error


def _numbered(source: str, rows: list[dict[str, Any]]) -> Table:
    if not rows:
        raise DataError(f"{source}: holds no rows; give one row for each example")
    return Table(source, rows, list(range(1, len(rows) + 1)))


def _read_saved_dataset(path: Path) -> dict[str, Table]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the saved data set cannot be read ({error})") from error
    return _tables_of(str(path), loaded)


def _read_hub(source: str) -> dict[str, Table]:
    import datasets

    named, _, revision = source.partition("@")
    name, _, config = named.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, revision=revision or None)
    except Exception as error:  # the builders raise many kinds; each becomes one clear line
        reason = "HF_HUB_OFFLINE is set" if offline() else str(error).strip().splitlines()[0]
        raise SourceError(
            f"data {source!r} is neither a file or folder here nor to be had from the Hub: {reason}; "
            "give a path to a CSV, TSV, JSONL or Parquet file"
        ) from error
    return _tables_of(source, loaded)


def _tables_of(source: str, loaded: Any) -> dict[str, Table]:
    """Tables of a Dataset or DatasetDict; ClassLabel numbers become their names."""
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    tables: dict[str, Table] = {}
    for split, dataset in splits.items():
        name = _SPLIT_NAMES.get(str(split).lower())
        if name is None:
            continue
        rows = dataset.to_list()
        for column, feature in dataset.features.items():
            listed = getattr(feature, "feature", None)
            names = getattr(feature, "names", None) or getattr(listed, "names", None)
            for row in rows if names else ():
                value = row[column]
                row[column] = [_label_name(one, names) for one in value or []] if listed else _label_name(value, names)
        tables[name] = _numbered(f"{source}[{split}]", rows)
    if "train" not in tables:
        raise SourceError(f"{source} has no train split; its splits are: {', '.join(map(str, splits))}")
    return tables


def _label_name(value: int | None, names: Any) -> str | None:
    """-1 is how published test sets say that a label is withheld."""
    return names[value] if value is not None and value >= 0 else None
