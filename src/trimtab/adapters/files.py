"""What an adapter folder may hold: checked before peft sees it. Nothing in it is run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from trimtab.errors import AdapterError, DataError, suggest
from trimtab.runs import TrialFolder, read_json, write_json

# A folder that holds every weight of a model instead of an adapter.
_WHOLE_WEIGHTS = "model.safetensors"
# The model card is for readers, who may change it.
_FREE = ("README.md",)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MOST_CONFIG_BYTES = 1 << 20
_MOST_RANK = 4096
_RANKS = ("r", "target_r", "init_r", "num_virtual_tokens", "adapter_len", "num_ranks", "subspace_rank")
_MOST_SIZE = 1 << 16
_SIZES = (
    *("token_dim", "num_transformer_submodules", "num_layers", "num_attention_heads", "encoder_hidden_size"),
    *("encoder_num_layers", "num_tasks", "n_tasks", "n_skills", "n_splits", "num_vectors", "vector_length"),
)
# Fields by which peft would read other files.
_OUTSIDE = ("prompt_tuning_init_state_dict_path", "adapters")


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in `folder`, by name, but of its model card and of what holds the hashes."""
    free = (*_FREE, TrialFolder.facts_in(folder).name)
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in free)
    return {path.name: hash_file(path) for path in files}


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write down what is known of an adapter, with the hashes of its files and of itself."""
    known = {name: value for name, value in facts.items() if name != "sha256"} | {"files": hash_files(folder)}
    write_json(TrialFolder.facts_in(folder), known | {"sha256": _hash_facts(known)})


def _read_facts(folder: Path) -> dict[str, Any]:
    """What was written down; empty where another program saved the adapter."""
    file = TrialFolder.facts_in(folder)
    if not file.is_file():
        return {}
    try:
        facts: dict[str, Any] = read_json(file)
        known = {name: value for name, value in facts.items() if name != "sha256"}
    except (DataError, ValueError, AttributeError) as error:
        raise AdapterError(f"{file} is not valid JSON ({error}); copy the folder again") from error
    if facts.get("sha256") != _hash_facts(known):
        raise AdapterError(f"{file} is not what was saved (another SHA-256); copy the folder again")
    for name, wanted in facts["files"].items():
        if name != Path(name).name:
            raise AdapterError(f"{file} names {name!r}, outside of the adapter; do not use it")
        if not (folder / name).is_file():
            raise AdapterError(f"{folder / name} is missing; copy the whole folder again")
        if hash_file(folder / name) != wanted:
            raise AdapterError(f"{folder / name} is not what was saved (another SHA-256); copy the folder again")
    return facts


def _hash_facts(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_whole_model(folder: Path) -> bool:
    """Whether it holds a fully tuned model, which needs no base."""
    return (folder / _WHOLE_WEIGHTS).is_file() and not (folder / CONFIG_NAME).is_file()


def check_folder(folder: Path) -> dict[str, Any]:
    """Refuse an adapter folder that is damaged, or holds what an adapter does not need.

    Returns:
        What Trimtab wrote down of it when it was saved; empty where another program saved it.

    Raises:
        AdapterError: with the file, and what is wrong with it.
    """
    if not folder.is_dir():
        raise AdapterError(f"no adapter folder at {folder}; give one such as RUN/trials/lora-s0/adapter")
    _check_places(folder)
    weights = folder / (_WHOLE_WEIGHTS if is_whole_model(folder) else SAFETENSORS_WEIGHTS_NAME)
    if not weights.is_file():
        pickles = [path.name for path in folder.iterdir() if path.suffix in _PICKLES]
        if pickles:
            raise AdapterError(f"{folder / pickles[0]}: pickled weights may run code; save them as safetensors")
        raise AdapterError(f"{folder} holds no {weights.name}, so it is no adapter")
    facts = _read_facts(folder)
    if not is_whole_model(folder):
        check_config(folder / CONFIG_NAME)
    try:
        with safe_open(weights, "pt") as opened:
            opened.keys()
    except SafetensorError as error:
        raise AdapterError(f"{weights}: damaged or cut off ({error}); copy the folder again") from error
    return facts


def _check_places(folder: Path) -> None:
    """Links may not lead out of the folder; the Hub's cache links from snapshots to blobs of the same repository."""
    root = folder.resolve()
    allowed = root.parents[1] if root.parent.name == "snapshots" else root
    for path in folder.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(allowed):
            raise AdapterError(f"{path} links to {path.resolve()}, outside of the adapter; copy the file itself")


def check_config(path: Path) -> None:
    """Refuse a peft config that names code, a method or fields that the installed peft does not know, or huge sizes.

    Raises:
        AdapterError: with the field.
    """
    if not path.is_file():
        raise AdapterError(f"{path.parent} holds no {path.name}, so it is no adapter")
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise AdapterError(f"{path} has {path.stat().st_size:,} bytes, more than any config needs; do not use it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON ({error}); copy the folder again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(config).__name__}")
    kind = config.get("peft_type")
    if kind not in {member.value for member in PeftType} or PeftType(kind) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterError(f"{path}: the installed peft has no method {kind!r}; update peft, or use another adapter")
    defaults = {field.name: field.default for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}
    for name in config:
        if name not in defaults:
            raise AdapterError(f"{path}: {kind} has no field {name!r}{suggest(name, defaults)}; saved by a newer peft?")
    library = (config.get("auto_mapping") or {}).get("parent_library", "transformers.")
    if not str(library).startswith("transformers."):
        raise AdapterError(f"{path}: auto_mapping names code in {library!r}, which is not transformers; do not use it")
    for name in _OUTSIDE:
        if config.get(name):
            raise AdapterError(f"{path}: {name} names files outside of the adapter; do not use it")
    if _asks_for_code(config):
        raise AdapterError(f"{path} asks to run code that comes with a model; do not use it")
    _check_sizes({name: value for name, value in config.items() if repr(value) != repr(defaults[name])}, path)


def _asks_for_code(value: Any) -> bool:
    """Whether `trust_remote_code` is set anywhere in a config."""
    if isinstance(value, dict):
        return bool(value.get("trust_remote_code")) or any(map(_asks_for_code, value.values()))
    return isinstance(value, list) and any(map(_asks_for_code, value))


def _check_sizes(config: dict[str, Any], path: Path) -> None:
    ranks = [(name, config.get(name)) for name in _RANKS]
    pattern = config.get("rank_pattern")
    if isinstance(pattern, dict):
        ranks += [(f"rank_pattern of {name}", value) for name, value in pattern.items()]
    for names, most in ((ranks, _MOST_RANK), ([(name, config.get(name)) for name in _SIZES], _MOST_SIZE)):
        for name, value in names:
            if value is not None and not (type(value) is int and 0 < value <= most):
                raise AdapterError(f"{path}: {name} is {value!r}; a whole number between 1 and {most} is expected")
    if len(config.get("layer_replication") or []) > _MOST_RANK:
        raise AdapterError(f"{path}: layer_replication holds more than {_MOST_RANK} ranges; do not use it")


def saves_embeddings(config: Any) -> bool | str:
    """Whether whole embeddings are saved with an adapter: as peft finds right, but where new rows are by themselves."""
    return False if getattr(config, "trainable_token_indices", None) else "auto"


def check_tensors(saved: Iterable[str], wanted: Iterable[str], known: Iterable[str], file: Path) -> None:
    """Refuse weights with tensors that the adapter lacks, or that it has no place for.

    Args:
        wanted: names that the adapter's state has.
        known: further names that may be there: a head's, under its own name.
    """
    saved, wanted = set(saved), set(wanted)
    missing, strange = sorted(wanted - saved), sorted(saved - wanted - set(known))
    if missing:
        raise AdapterError(f"{file}: {len(missing)} tensors are missing ({missing[0]}, …); copy the folder again")
    if strange:
        raise AdapterError(f"{file}: {len(strange)} tensors have no place here ({strange[0]}, …); is this its base?")
