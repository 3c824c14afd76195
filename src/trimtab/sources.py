"""Where models and data come from: a local path, a Hub id, or a starter.

`locate_*` checks that a source can be had, cheaply and before any weight is read.
What is inside the files is read by `models` and `data`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import SourceError
from trimtab.progress import Progress
from trimtab.runs import TrialFolder, read_json
from trimtab.starters import PREFIX, STARTERS, Starter, fetch_starter, get_starter

_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?$")
# What a model or an adapter is made of; in a repository, weights in other formats lie beside these.
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
ADAPTER_FILES = (*_MODEL_FILES, "README.md")
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

    @property
    def hub_id(self) -> str | None:
        """Its repository on the Hub; None for a folder or a starter."""
        is_here = self.name.startswith(PREFIX) or Path(self.name).expanduser().is_dir()
        return None if is_here else self.name.partition("@")[0]

    @property
    def commit(self) -> str | None:
        """What of its repository is here, where it is one on the Hub."""
        folder = Path(self.location) if self.is_local else _kept_snapshot(self.location, "config.json")
        return folder.name if self.hub_id and folder and is_commit(folder.name) else None


def offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def is_commit(revision: str) -> bool:
    """Whether it is a revision that never moves."""
    return _COMMIT.match(revision) is not None


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
    if not revision or is_commit(revision):
        kept = _kept_snapshot(name, "config.json", revision or None)
        if kept is not None and _is_complete(kept):  # what was fetched once is not asked for again
            return ModelSource(source, str(kept), True)
    with _hub_errors("model", source):
        if revision:
            return ModelSource(source, str(_fetch_model(name, revision)), True)
        from huggingface_hub import hf_hub_download

        hf_hub_download(source, "config.json")
    return ModelSource(source, source, False)


def hub_id_of(base: str) -> str | None:
    """The base on the Hub: its own id, or the twin of a starter; None for a folder."""
    if base.startswith(PREFIX):
        return get_starter(base, "model").hub_twin
    is_id = not Path(base).expanduser().exists() and _HUB_ID.match(base)
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
    if not revision or is_commit(revision):
        for config in ("adapter_config.json", "config.json"):
            kept = _kept_snapshot(name, config, revision or None)
            if kept is not None and _is_complete_adapter(kept):
                return kept
    with _hub_errors("adapter", text):
        return _fetch_files(name, revision or None, ADAPTER_FILES)


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
    except SourceError:
        raise
    except HfHubHTTPError as error:
        reason = say_refusal(error, kind, source)
        raise SourceError(f"{kind} {source!r} cannot be had from the Hub: {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if offline() else "the Hub cannot be reached"
        starters = f", or start with one of: {_starters('model')}" if kind == "model" else ""
        raise SourceError(
            f"{kind} {source!r} is neither a folder here nor in the Hub cache, and {reason}; "
            f"give a local folder{starters}"
        ) from error
    except Exception as error:  # by the client's version, those of one HTTP library or another
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"{kind} {source!r} cannot be had from the Hub: {first}; "
            "try again: files that came whole are not fetched anew"
        ) from error


def say_refusal(error: Any, kind: str, source: str) -> str:
    """Why the Hub does not give or take something, and what helps: the client's own words stand on many lines."""
    from huggingface_hub import errors

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    status = f"{error.response.status_code}, "
    if isinstance(error, errors.GatedRepoError):
        return f"{status}its owner gives access on request; ask for it on its page, then {log_in}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{status}no such repository, or a private one; check the name, or {log_in}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{status}it has no revision {source.partition('@')[2]!r}; leave @… away for the newest"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{status}it holds no config.json, so it is no {kind}"
    if error.response.status_code in (401, 403):
        return f"{status}{error.server_message or 'no access'}; {log_in}"
    return str(error).strip().splitlines()[0]


def locate_data_starter(source: str, progress: Progress) -> tuple[Starter, Path]:
    """The starter that `source` names, and its folder."""
    starter = get_starter(source, "data")
    return starter, fetch_starter(starter, progress)


def weight_files(source: ModelSource, fetch: bool = True) -> list[Path]:
    """The files that hold a model's weights: safetensors where there are some.

    Args:
        fetch: from the Hub, where they are not here yet; else there may be none.

    Raises:
        SourceError: the Hub does not give them, or has none.
    """
    if source.is_local:
        return _weights_in(Path(source.location))
    folder = _kept_snapshot(source.location, "config.json")
    kept = [] if folder is None else _weights_in(folder)
    if _are_whole(kept) or not fetch:
        return kept
    with _hub_errors("model", source.name):
        return _weights_in(_fetch_model(source.location, None))


def _fetch_model(name: str, revision: str | None) -> Path:
    """A model's files at the top of its repository: weights in other formats only where there are no safetensors."""
    folder = _fetch_files(name, revision, _MODEL_FILES)
    if not _weights_in(folder):
        folder = _fetch_files(name, revision, (*_MODEL_FILES, *_WEIGHTS))
    if not _weights_in(folder):
        raise SourceError(f"{name} holds no weights on the Hub ({', '.join(_WEIGHTS)}); give another model")
    return folder


def _kept_snapshot(name: str, config: str, revision: str | None = None) -> Path | None:
    """The folder in the Hub's cache that holds what was fetched of a repository, all of it or a part, by its config."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, config, revision=revision)
    except HFValidationError:  # no such name can be fetched, which says it
        return None
    return Path(found).parent if isinstance(found, str) else None


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
