"""Where models and data come from: a local path, a Hub id, or a starter.

`locate_*` checks that a source can be had, cheaply and before any weight is read.
What is inside the files is read by `models` and `data`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from trimtab.cache import cache_folder
from trimtab.errors import SourceError, TrimtabError
from trimtab.progress import Progress
from trimtab.runs import TrialFolder, read_json, write_json
from trimtab.starters import PREFIX, STARTERS, Starter, fetch_starter, get_starter

_COMMIT = re.compile(r"^[0-9a-f]{40}$")  # the one kind of revision that never moves
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?$")
# What a model or an adapter is made of; in a repository, weights in other formats lie beside these.
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_ADAPTER_FILES = (*_MODEL_FILES, "README.md")
_SETTLED_SECONDS = 2.0
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*", "spiece.model", "sentencepiece.*")
_SHARD = re.compile(r"-\d+-of-(\d+)\.")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")


@dataclass(frozen=True)
class ModelSource:
    """`location` is what `from_pretrained` takes: a folder, or a Hub id."""

    name: str
    location: str
    is_local: bool

    @property
    def lasting_name(self) -> str:
        """The name under which it is found from any working folder, on any machine where it can be."""
        is_folder = not self.name.startswith(PREFIX) and Path(self.name).expanduser().is_dir()
        return self.location if is_folder else self.name


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def locate_model(source: str, progress: Progress) -> ModelSource:
    """Find a base model; starters are fetched.

    Raises:
        SourceError: no such folder, starter or Hub id, or a folder without config or weights.
    """
    if source.startswith(PREFIX):
        return ModelSource(source, str(fetch_starter(get_starter(source, "model"), progress)), True)
    path = Path(source).expanduser()
    if path.is_dir():
        _check_model_folder(path)
        return ModelSource(source, str(path.resolve()), True)
    if path.exists() or source.startswith((".", "/", "~")) or not _HUB_ID.match(source):
        raise SourceError(
            f"no model folder at {source!r}; give a folder with config.json and weights, a Hub id "
            f"(owner/name), or one of: {_starters('model')}"
        )
    name, _, revision = source.partition("@")
    if revision:
        with _hub_errors("model", source):
            return ModelSource(source, str(_fetch_files(name, revision, _MODEL_FILES)), True)
    from huggingface_hub import hf_hub_download

    kept = _kept_snapshot(source)
    if kept is not None and _is_complete(kept):  # what was fetched once is not asked for again
        return ModelSource(source, str(kept), True)
    with _hub_errors("model", source):
        hf_hub_download(source, "config.json")
    return ModelSource(source, source, False)


def hub_id_of(base: str) -> str | None:
    """The base on the Hub: its own id, or the twin of a starter; None for a folder."""
    if base.startswith(PREFIX):
        return get_starter(base, "model").hub_twin
    is_id = "/" in base and not Path(base).expanduser().exists() and _HUB_ID.match(base)
    return base.partition("@")[0] if is_id else None


def locate_adapter(source: str | Path) -> Path:
    """The folder of an adapter: one here, or fetched from the Hub (owner/name, with @revision where wanted).

    Raises:
        SourceError: the Hub has none of that name, or cannot be reached.
    """
    path = Path(source).expanduser()
    text = str(source)
    if path.exists() or isinstance(source, Path) or "/" not in text or not _HUB_ID.match(text):
        return path
    name, _, revision = text.partition("@")
    if not revision or _COMMIT.match(revision):
        kept = _kept_snapshot(name, revision or None)
        if kept is not None and _is_complete_adapter(kept):
            return kept
    with _hub_errors("adapter", text):
        return _fetch_files(name, revision or None, _ADAPTER_FILES)


def _fetch_files(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A repository's files of these kinds at its top; from the cache where the Hub cannot be reached."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]))


def _starters(kind: str) -> str:
    return ", ".join(PREFIX + starter.name for starter in STARTERS.values() if starter.kind == kind)


def _check_model_folder(path: Path) -> None:
    config = path / "config.json"
    if not config.is_file():
        hint = "; this looks like an adapter: give its base model" if (path / "adapter_config.json").is_file() else ""
        raise SourceError(f"{path} has no config.json, so it is not a model folder{hint}")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{config} is not valid JSON ({error}); fetch the model again") from error
    if not any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        raise SourceError(
            f"{path} has a config.json but no weights ({', '.join(_WEIGHTS)}); "
            "fetch the whole model: an untrained one would be tuned otherwise"
        )


@contextmanager
def _hub_errors(kind: str, source: str) -> Iterator[None]:
    """What the Hub's client raises, as one clear error."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if offline() else "the Hub cannot be reached"
        starters = f", or start with one of: {_starters('model')}" if kind == "model" else ""
        raise SourceError(
            f"{kind} {source!r} is neither a folder here nor in the Hub cache, and {reason}; "
            f"give a local folder{starters}"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise SourceError(f"{kind} {source!r} cannot be had from the Hub: {first}") from error


def locate_data_starter(source: str, progress: Progress) -> tuple[Starter, Path]:
    """The starter that `source` names, and its folder."""
    starter = get_starter(source, "data")
    return starter, fetch_starter(starter, progress)


def fingerprint_files(paths: list[Path]) -> str:
    """SHA-256 over the bytes of `paths`, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def weight_files(source: ModelSource, fetch: bool = True) -> list[Path]:
    """The files that hold a model's weights: safetensors where there are some.

    Args:
        fetch: from the Hub, where they are not here yet; else there may be none.

    Raises:
        SourceError: the Hub does not give them, or has none.
    """
    if source.is_local:
        return _weights_in(Path(source.location))
    folder = _kept_snapshot(source.location)
    kept = [] if folder is None else _weights_in(folder)
    if _are_whole(kept) or not fetch:
        return kept
    with _hub_errors("model", source.name):
        files = _weights_in(_fetch_files(source.location, None, _MODEL_FILES))
        files = files or _weights_in(_fetch_files(source.location, None, (*_MODEL_FILES, *_WEIGHTS)))
    if not files:
        raise SourceError(f"{source.name} holds no weights on the Hub ({', '.join(_WEIGHTS)}); give another model")
    return files


def _kept_snapshot(name: str, revision: str | None = None) -> Path | None:
    """The folder in the Hub's cache that holds what was fetched of a repository, all of it or a part."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot holds a model's config, tokenizer and all of its weights."""
    tokenizer = any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS)
    return (folder / "config.json").is_file() and tokenizer and _are_whole(_weights_in(folder))


def _is_complete_adapter(folder: Path) -> bool:
    """Whether a snapshot holds what an adapter's facts name; without facts, peft's two files."""
    facts = TrialFolder.facts_in(folder)
    names = (
        read_json(facts).get("files", ()) if facts.is_file() else ("adapter_config.json", "adapter_model.safetensors")
    )
    return all((folder / name).is_file() for name in names)


def _are_whole(files: Sequence[Path]) -> bool:
    """Whether all shards of a model are there: a fetch that was interrupted leaves some."""
    counts = [int(found[1]) for file in files if (found := _SHARD.search(file.name))]
    return bool(files) and len(files) >= max(counts, default=1)


def _weights_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(path for kind in _WEIGHTS for path in folder.glob(kind))


def fingerprint_model(source: ModelSource) -> str:
    """SHA-256 over the weight files of a base model; kept, and told again while the files' stamps stay as they are."""
    files = weight_files(source)
    stamps = [path.stat() for path in files]
    stamp = [[path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
             for path, stat in zip(files, stamps, strict=True)]  # fmt: skip
    place = hashlib.sha256(str([path.resolve() for path in files]).encode()).hexdigest()[:32]
    kept = cache_folder() / "fingerprints" / f"{place}.json"
    with suppress(OSError, TrimtabError, KeyError, TypeError):
        known = read_json(kept)
        if known["stamp"] == stamp:
            return str(known["sha256"])
    found = fingerprint_files(files)
    # A file that was changed a moment ago could be changed again within the same tick of its stamp.
    if all(time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS for stat in stamps):
        with suppress(OSError, TrimtabError):  # a disk that is full costs time only
            write_json(kept, {"stamp": stamp, "sha256": found})
    return found
