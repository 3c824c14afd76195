"""An adapter folder on the Hub: checked, with its model card, as one commit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft.utils import CONFIG_NAME

from trimtab.adapters.files import check_folder, write_facts
from trimtab.errors import AdapterError, SourceError
from trimtab.progress import Progress, Silent
from trimtab.runs import TrialFolder, read_json, write_json
from trimtab.sources import ADAPTER_FILES, hub_id_of, say_refusal


@dataclass(frozen=True)
class Push:
    """What is, or would be, on the Hub: bytes by file; `url` is that of the commit, None where nothing was sent."""

    repository: str
    files: dict[str, int]
    url: str | None


def push_adapter(
    adapter: Path,
    repository: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    message: str | None = None,
    progress: Progress | None = None,
) -> Push:
    """Upload an adapter folder to the Hub, whose repository is made where there is none.

    Args:
        repository: owner/name.
        private: who may see a new repository; one that is there stays as it is.
        dry_run: check all, and send nothing.

    Raises:
        AdapterError: a damaged folder, or one without a model card that the Hub can read.
        SourceError: the Hub refuses, or cannot be reached.
    """
    listener = progress or Silent()
    facts = check_folder(adapter)
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise SourceError(f"{repository!r} is no name on the Hub ({error}); give owner/name") from error
    if "/" not in repository:
        raise SourceError(f"{repository!r} names no owner; give owner/name")
    _check_card(adapter)
    own = [*facts["files"], TrialFolder.facts_in(adapter).name, "README.md"] if facts else ADAPTER_FILES
    files = {path.name: path.stat().st_size for path in sorted(adapter.iterdir())
             if path.is_file() and any(path.match(pattern) for pattern in own)}  # fmt: skip
    if dry_run:
        return Push(repository, files, None)
    listener.stage(f"Sending {len(files)} files to {repository}")
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            _copy(adapter, files, Path(folder), facts)
            done = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message or "Adapter from Trimtab"
            )
    except OfflineModeIsEnabled as error:
        raise SourceError("HF_HUB_OFFLINE is set, so nothing can be sent; unset it, or try --dry-run") from error
    except HfHubHTTPError as error:
        raise SourceError(
            f"{repository} cannot be written on the Hub: {say_refusal(error, 'adapter', repository)}"
        ) from error
    except ValueError as error:
        raise AdapterError(f"the Hub refuses the model card: {' '.join(str(error).split())}; mend it") from error
    except Exception as error:  # by the client's version, those of one HTTP library or another
        raise SourceError(f"the Hub cannot be reached: {str(error).splitlines()[0]}; nothing was sent") from error
    return Push(repository, files, str(done.commit_url))


def _copy(adapter: Path, files: Iterable[str], target: Path, facts: Mapping[str, Any]) -> None:
    """What is sent names the base as others find it, not where it lay on this machine."""
    for name in files:
        shutil.copyfile(adapter / name, target / name)
    if not facts:
        return
    config, base = target / CONFIG_NAME, facts["base"]
    on_hub = hub_id_of(base)
    elsewhere = on_hub or f"./{Path(base).name}"  # no name that the Hub could take for one of its own
    if config.is_file():
        write_json(config, read_json(config) | {"base_model_name_or_path": elsewhere})
    write_facts(target, {**facts, "base": base if on_hub else elsewhere})


def _check_card(adapter: Path) -> None:
    card = adapter / "README.md"
    if not card.is_file():
        raise AdapterError(
            f"{adapter} has no model card (README.md); trimtab report RUN writes those of a run, "
            "others are yours to write"
        )
    try:
        ModelCard.load(card)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise AdapterError(f"{card}: its metadata cannot be read ({str(error).splitlines()[0]}); mend it") from error
