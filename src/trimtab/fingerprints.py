"""Fingerprints of files and of weights: by what is in them, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from trimtab.cache import cache_folder
from trimtab.errors import TrimtabError
from trimtab.runs import read_json, write_json
from trimtab.sources import ModelSource, weight_files

_BLOCK_BYTES = 1 << 22
_SETTLED_SECONDS = 2.0


def fingerprint_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the bytes of `paths`, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def fingerprint_model(source: ModelSource) -> str:
    """SHA-256 over the weights of a base model; kept, and told again while the files' stamps stay as they are.

    Of safetensors it is that of the tensors, each with its name, type and shape, in the order of names: the same
    model in more or fewer shards is the same base. Other formats count by their bytes.
    """
    files = weight_files(source)
    stamps = [path.stat() for path in files]
    stamp = [[path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
             for path, stat in zip(files, stamps, strict=True)]  # fmt: skip
    place = hashlib.sha256(str([path.resolve() for path in files]).encode()).hexdigest()[:32]
    kept = cache_folder() / "fingerprints" / f"{place}.json"
    with suppress(OSError, TrimtabError, KeyError, TypeError):
        known = read_json(kept)
        if known["stamp"] == stamp:
            return str(known["of_weights"])
    found = _fingerprint_weights(files)
    # A file that was changed a moment ago could be changed again within the same tick of its stamp.
    if all(time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS for stat in stamps):
        with suppress(OSError, TrimtabError):  # a disk that is full costs time only
            write_json(kept, {"stamp": stamp, "of_weights": found})
    return found


def _fingerprint_weights(files: Sequence[Path]) -> str:
    if any(path.suffix != ".safetensors" for path in files):
        return fingerprint_files(files)
    try:
        found = ((name, path, start, told) for path in files for name, start, told in _tensors_of(path))
        places = sorted(found, key=lambda place: place[0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged: loading says with what
        return fingerprint_files(files)
    digest = hashlib.sha256()
    for name, path, start, told in places:
        digest.update(json.dumps([name, told["dtype"], told["shape"]]).encode() + b"\0")
        with path.open("rb") as file:
            file.seek(start)
            for block in _blocks(file, told["size"]):
                digest.update(block)
    return digest.hexdigest()


def _tensors_of(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Name, where its data begin, and its type, shape and bytes, from the header (https://github.com/huggingface/safetensors#format)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("cut off")
        header = json.loads(file.read(size))
    for name, told in header.items():
        if name != "__metadata__":
            first, end = told["data_offsets"]
            yield name, 8 + size + first, {"dtype": told["dtype"], "shape": told["shape"], "size": end - first}


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (block := file.read(min(size, _BLOCK_BYTES))):
        size -= len(block)
        yield block
