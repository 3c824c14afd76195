"""Files, folders and Hub ids to tables of plain rows, with the line each came from."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import lzma
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trimtab.data.hub import load_hub_data
from trimtab.errors import DataError, SourceError
from trimtab.progress import Progress
from trimtab.runs import parse_jsonl
from trimtab.sources import locate_data_starter
from trimtab.starters import PREFIX, Starter

_SPLIT_NAMES = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test",
}  # fmt: skip
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BLOCK_BYTES = 1 << 16  # as much as a pipe holds


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
    is_file_name = _format_of(path) or (path.suffix and "/" not in source)  # owner/name@v1.0 is on the Hub
    if is_file_name or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise SourceError(f"no data file or folder at {source!r} (looked in {Path.cwd()}); check the path")
    return Source(_tables_of(source, load_hub_data(source)))


def _read_folder(folder: Path) -> dict[str, Table]:
    splits: dict[str, Table] = {}
    for path in sorted(folder.iterdir()):
        name = _SPLIT_NAMES.get(path.name.split(".")[0].lower())
        if name and path.is_file() and _format_of(path):
            splits[name] = read_file(path)
    if "train" not in splits:
        raise SourceError(
            f"{folder} is neither a saved `datasets` folder nor holds a train file "
            "(train.csv, .tsv or .jsonl, plain or compressed, or train.parquet)"
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


def stream_file(path: Path, *, is_labelled: bool = True) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of a file, each with its line, one after another.

    Args:
        is_labelled: whether a word of a CoNLL file needs a tag.

    Raises:
        SourceError: no such file, one that cannot be read, or a format that is not read.
        DataError: empty, malformed (file and line) or not UTF-8.
    """
    has_rows = False
    try:
        kind = _check_file(path)
        for pair in _read_parquet(path) if kind == "parquet" else _read_text(path, kind, is_labelled):
            has_rows = True
            yield pair
    except UnicodeDecodeError as error:
        line, byte = _first_not_utf8(path)
        raise DataError(f"{path}: not UTF-8 in line {line} (byte {byte:#04x}); save it as UTF-8") from error
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the compressed file is damaged or cut off ({error}); fetch it again") from error
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read ({error.strerror or error}); check that it is there, whole, and yours to read"
        ) from error
    if not has_rows:
        raise DataError(f"{path}: the file holds no rows; give a file with a row for each example")


def _check_file(path: Path) -> str:
    """The format of a file that is there, by its name."""
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
    return kind


def _read_text(path: Path, kind: str, is_labelled: bool) -> Iterator[tuple[dict[str, Any], int]]:
    with _open_text(path) as file:
        if kind == "conll":
            yield from _read_conll(file, path, is_labelled)
        else:
            yield from parse_jsonl(file, path) if kind == "jsonl" else _read_delimited(file, path, kind)


def _open_text(path: Path) -> IO[str]:
    return io.TextIOWrapper(_open_bytes(path), "utf-8-sig", newline="")


def _open_bytes(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow as pa

        return pa.input_stream(str(path), compression="zstd")
    return _OPENERS.get(suffix, open)(path, "rb")


def _first_not_utf8(path: Path) -> tuple[int, int]:
    """The first line that is not UTF-8, and the byte that it fails at: a decoder knows only blocks."""
    with _open_bytes(path) as file:
        for number, line in enumerate(io.BufferedReader(file), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return number, line[error.start]
    raise DataError(f"{path} was changed while it was read; try again")


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


def _read_conll(file: IO[str], path: Path, is_labelled: bool) -> Iterator[tuple[dict[str, Any], int]]:
    """A word and its tag a line, first and last of its fields; a blank line after each sentence (CoNLL-2003)."""
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate(itertools.chain(file, [""]), 1):
        fields = line.split()
        if fields and fields[0] != "-DOCSTART-" and not line.startswith("# "):
            if len(fields) > 1:
                tags.append(fields[-1])
            elif is_labelled:
                raise DataError(f"{path}:{number}: {line.strip()!r} has no tag; write a word and its tag on each line")
            words.append(fields[0])
        elif words and not fields:
            # Tags of some words alone cannot be told apart, and where they may be missing nobody reads them.
            yield {"tokens": words} | ({"tags": tags} if len(tags) == len(words) else {}), number - len(words)
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
    except PermissionError:  # an OSError that says nothing of the format
        raise
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error


class ArrivingRows:
    """The rows of standard input, JSON objects or a plain text a line, each with its line.

    Raises:
        DataError: no rows, a line that is not UTF-8, or as for a file of JSON objects.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._held: deque[bytes] = deque()  # whole lines that are there
        self._rows = self._parse()

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int]]:
        return self._rows

    def take(self, most: int) -> list[tuple[dict[str, Any], int]]:
        """Up to `most` rows: waits for one, then gives those that are there, so that a slow writer is answered."""
        rows = list(itertools.islice(self._rows, 1))
        while rows and len(rows) < most and any(map(bytes.strip, self._held)):
            rows += itertools.islice(self._rows, 1)
        return rows

    def _parse(self) -> Iterator[tuple[dict[str, Any], int]]:
        lines, begun = self._lines(), []
        for line in lines:
            begun.append(line)
            if line.strip():
                break
        else:
            raise DataError("standard input holds no rows; give a text on each line, or JSON objects")
        whole = itertools.chain(begun, lines)
        if begun[-1].lstrip().startswith("{"):
            yield from parse_jsonl(whole, Path("stdin"))
        else:
            yield from (({"text": line.rstrip("\r")}, number) for number, line in enumerate(whole, 1) if line.strip())

    def _lines(self) -> Iterator[str]:
        rest = b""  # of a line whose end has not arrived
        for number in itertools.count(1):
            while not self._held and (block := self.stream.read1(_BLOCK_BYTES)):
                *lines, rest = (rest + block).split(b"\n")
                self._held.extend(lines)
            if not self._held and not rest:
                return
            line, rest = (self._held.popleft(), rest) if self._held else (rest, b"")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"stdin:{number}: not UTF-8 (byte {line[error.start]:#04x}); send it as UTF-8"
                ) from error
            yield text


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
