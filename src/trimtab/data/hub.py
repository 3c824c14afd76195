"""Data sets of the Hub: fetched once, and from then on read from where they lie here."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from trimtab.cache import cache_folder
from trimtab.errors import SourceError, TrimtabError
from trimtab.runs import read_json, write_json
from trimtab.sources import is_commit, offline, say_refusal


def load_hub_data(source: str) -> dict[str, Any]:
    """The splits of owner/name, :config and @revision where wanted, as `datasets` gives them.

    Which files belong to which revision is written down: where the Hub cannot be reached, `datasets` gives what it
    fetched last under a name, of whatever revision. A branch or a tag is asked for anew, since it may have moved.

    Raises:
        SourceError: the Hub has none of that name or revision, or does not give it, or cannot be reached.
    """
    import datasets

    named, _, revision = source.partition("@")
    name, _, config = named.partition(":")
    key = hashlib.sha256(f"{os.environ.get('HF_ENDPOINT', '')}\0{source}".encode()).hexdigest()[:32]
    record = cache_folder() / "hub-data" / f"{key}.json"
    kept = _kept_files(record) if not revision or is_commit(revision) or offline() else {}
    if kept:
        return {split: datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
                for split, files in kept.items()}  # fmt: skip
    try:
        commit = _find_commit(name, revision or None)
        loaded = datasets.load_dataset(name, config or None, revision=commit)
        splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
        files = {split: [str(file["filename"]) for file in data.cache_files] for split, data in splits.items()}
        if not all(commit in file for some in files.values() for file in some):
            raise SourceError("it broke off, and what lies here is another revision; try again")
    except Exception as error:  # the builders raise many kinds; each becomes one clear line
        raise SourceError(
            f"data {source!r} is neither a file or folder here nor to be had from the Hub: {_reason(error, source)}; "
            "give a path to a CSV, TSV, JSONL or Parquet file"
        ) from error
    with suppress(OSError, TrimtabError):  # a disk that is full costs another fetch only
        write_json(record, files)
    return splits


def _find_commit(name: str, revision: str | None) -> str:
    """The commit of a revision: the Hub's, or, where it cannot be asked, that of the data card in its cache."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except HfHubHTTPError:
        raise
    except Exception:
        card = try_to_load_from_cache(name, "README.md", repo_type="dataset", revision=revision)
        if isinstance(card, str):
            return Path(card).parent.name
        raise


def _reason(error: Exception, source: str) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return say_refusal(error, "data set", source)
    if offline():
        return "HF_HUB_OFFLINE is set"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _kept_files(record: Path) -> dict[str, list[str]]:
    """The files of each split; empty where some are no longer there."""
    with suppress(OSError, TrimtabError, AttributeError, TypeError):
        known: dict[str, list[str]] = read_json(record)
        if all(files and all(map(os.path.isfile, files)) for files in known.values()):
            return known
    return {}
