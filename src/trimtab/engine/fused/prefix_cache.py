"""States that enter the lowest adapted layer, of texts seen before: nothing below trains, so they never change.

Kept in a plain file, read where they lie (the system's page cache holds what is used), found by a hash of a text's
tokens. The folder's name must tell all else that they depend on: base, layer, position offset, kernels.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from trimtab.runs import write_file

_LEFT_FREE_BYTES = 1 << 30
_BYTES = 4  # float32: what is read back is what was computed, to the last bit


class CacheInUseError(Exception):
    """Another process writes to this folder."""


class PrefixCache:
    """States [tokens, `width`] before layer `layer`, at most `budget_bytes` of them.

    Raises:
        CacheInUseError: see there.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, layer: int, width: int, budget_bytes: int) -> None:
        self.layer, self.width, self.budget_bytes = layer, width, budget_bytes
        self.hits = self.misses = 0  # texts
        folder.mkdir(parents=True, exist_ok=True)
        self._index = folder / "index.npz"
        self._lock = FileLock(folder / "lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout as error:
            raise CacheInUseError(str(folder)) from error
        try:
            self._file = os.open(folder / "states.bin", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            self._lock.release()
            raise
        self._places, self._end = self._read_index()
        if not self._places:
            self._index.unlink(missing_ok=True)  # before what it may point to is written over
        os.ftruncate(self._file, self._end)

    def _read_index(self) -> tuple[dict[bytes, int], int]:
        """Offsets of the texts that the index lists, and where they end; nothing where it cannot be trusted."""
        try:
            with np.load(self._index, allow_pickle=False) as index:
                places = dict(zip(map(bytes, index["keys"]), map(int, index["offsets"]), strict=True))
                end = int(index["end"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return {}, 0
        return (places, end) if os.fstat(self._file).st_size >= end else ({}, 0)

    @property
    def bytes_used(self) -> int:
        return self._end

    def look_up(self, inputs: dict[str, Any], lengths: Sequence[int]) -> Prefix:
        """What is known of a pack's texts, by their tokens and token types."""
        rows = [inputs[name][0].numpy() for name in ("input_ids", "token_type_ids") if name in inputs]
        keys, start = [], 0
        for length in lengths:
            digest = hashlib.blake2b(length.to_bytes(8, "little"), digest_size=16)
            for row in rows:
                digest.update(row[start : start + length].tobytes())
            keys.append(digest.digest())
            start += length
        return Prefix(self, keys, lengths)

    def read(self, keys: Sequence[bytes], lengths: Sequence[int]) -> Tensor | None:
        """The states of all these texts, or None where one is missing."""
        if not all(key in self._places for key in keys):
            self.misses += len(keys)
            return None
        states = np.empty((sum(lengths), self.width), dtype=np.float32)
        start = 0
        for key, length in zip(keys, lengths, strict=True):
            part = states[start : start + length]
            if os.preadv(self._file, [part.data], self._places[key]) != part.nbytes:
                self._places.clear()  # someone cut the file
                return None
            start += length
        self.hits += len(keys)
        return torch.from_numpy(states)

    def write(self, keys: Sequence[bytes], lengths: Sequence[int], states: Tensor) -> None:
        """Keep the texts that are not there yet, as far as the budget and the disk go."""
        for key, part in zip(keys, torch.split(states, list(lengths)), strict=True):
            size = part.numel() * _BYTES
            if key in self._places or self._end + size > self.budget_bytes:
                continue
            try:
                written = os.pwrite(self._file, part.contiguous().numpy().data, self._end)
            except OSError:  # the disk is full
                written = 0
            if written != size:
                self.budget_bytes = 0
                return
            self._places[key] = self._end
            self._end += size

    def close(self) -> None:
        """Write the index, so that the next process finds what is here.

        Raises:
            StorageError, OSError: it cannot be written; nothing is held open all the same.
        """
        keys = np.frombuffer(b"".join(self._places), dtype="V16")
        offsets = np.fromiter(self._places.values(), dtype=np.int64)

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, keys=keys, offsets=offsets, end=np.int64(self._end))

        try:
            os.fsync(self._file)
            write_file(self._index, write)
        finally:
            os.close(self._file)
            self._lock.release()


class Prefix:
    """One pack's part of a cache: `states` where all its texts are known."""

    def __init__(self, cache: PrefixCache, keys: Sequence[bytes], lengths: Sequence[int]) -> None:
        self.cache, self.keys, self.lengths = cache, keys, lengths
        self.states = cache.read(keys, lengths)

    def keep(self, states: Tensor) -> None:
        self.cache.write(self.keys, self.lengths, states)


def make_room(root: Path, folder: Path, budget_bytes: int) -> int:
    """Bytes that `folder` may use of a budget for all caches under `root`, and of what the disk has left.

    The others are deleted, those used longest ago first, until they take no more than half of the budget.
    """
    others = [path for path in root.glob("*") if path.is_dir() and path != folder]
    used = {path: sum(file.stat().st_size for file in path.glob("*")) for path in others}
    for path in sorted(others, key=lambda path: path.stat().st_mtime):
        if sum(used.values()) <= budget_bytes // 2:
            break
        try:
            with FileLock(path / "lock").acquire(blocking=False):
                for name in ("index.npz", "states.bin"):
                    (path / name).unlink(missing_ok=True)
        except Timeout:
            continue
        used.pop(path)
    existing = next(path for path in (root, *root.absolute().parents) if path.is_dir())
    own = sum(file.stat().st_size for file in folder.glob("*"))
    on_disk = own + shutil.disk_usage(existing).free - _LEFT_FREE_BYTES
    return max(0, min(budget_bytes - sum(used.values()), on_disk))
