"""What an adapter folder may hold: checked before peft sees it. Nothing in it is run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import match_target_against_key
from safetensors import SafetensorError, safe_open

from trimtab.errors import AdapterError, suggest
from trimtab.runs import TrialFolder, write_json

# A folder that holds every weight of a model instead of an adapter.
_WHOLE_WEIGHTS = "model.safetensors"
# The model card is for readers, who may change it.
_FREE = ("README.md",)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MOST_CONFIG_BYTES = 1 << 20
_MOST_RANK = 4096
_RANKS = ("r", "target_r", "init_r", "num_virtual_tokens", "adapter_len", "num_ranks", "subspace_rank")
_MOST_SIZE = 1 << 16
_MOST_ELEMENTS = 1 << 31  # of one tensor that is built before its file is looked at
_SIZES = (
    *("token_dim", "num_transformer_submodules", "num_layers", "num_attention_heads", "encoder_hidden_size"),
    *("encoder_num_layers", "num_tasks", "n_tasks", "n_skills", "n_splits", "num_vectors", "vector_length"),
)
# Fields whose product is the size of one tensor.
_PRODUCTS = (
    ("num_virtual_tokens", "num_transformer_submodules", "token_dim", "num_layers"),
    ("encoder_hidden_size", "token_dim", "num_layers"),
)
# peft's names of tasks, and the tasks that an adapter of each may be for.
TASKS_OF_TYPE = {
    "SEQ_CLS": ("classification", "multilabel", "regression"),
    "TOKEN_CLS": ("token_classification",),
    "CAUSAL_LM": ("causal_lm", "preference"),
    "SEQ_2_SEQ_LM": ("seq2seq",),
}
# What is known of every adapter that was saved here.
_FACT_TYPES = {"files": dict, "base": str, "base_sha256": str, "task": str, "label_names": list,
               "max_length_tokens": int}  # fmt: skip
_MORE_FACT_TYPES = {"columns": dict, "virtual_tokens": int, "new_tokens": list, "seed": int, "beta": float | int,
                    "quantize": str, "max_new_tokens": int, "base_commit": str | None}  # fmt: skip
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
    facts = _read_object(file)
    known = {name: value for name, value in facts.items() if name != "sha256"}
    if facts.get("sha256") != _hash_facts(known):
        raise AdapterError(f"{file} is not what was saved (another SHA-256); copy the folder again")
    for name, kind in (_FACT_TYPES | _MORE_FACT_TYPES).items():
        if (name in facts or name in _FACT_TYPES) and not isinstance(facts.get(name), kind):
            raise AdapterError(f"{file} does not tell {name!r}; copy the folder again")
    needed = (_WHOLE_WEIGHTS,) if is_whole_model(folder) else (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    if left_out := set(needed) - set(facts["files"]):
        raise AdapterError(f"{file} holds no SHA-256 of {sorted(left_out)[0]}; do not use it")
    for name, wanted in facts["files"].items():
        if name != Path(name).name:
            raise AdapterError(f"{file} names {name!r}, outside of the adapter; do not use it")
        if not (folder / name).is_file():
            raise AdapterError(f"{folder / name} is missing; copy the whole folder again")
        if hash_file(folder / name) != wanted:
            raise AdapterError(f"{folder / name} is not what was saved (another SHA-256); copy the folder again")
    return facts


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object of a size that such a file may have."""
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        raise AdapterError(f"{path} has {path.stat().st_size:,} bytes, more than any needs; do not use it")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON ({error}); copy the folder again") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


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
        kind = check_config(folder / CONFIG_NAME).get("task_type")
        if facts and kind is not None and facts["task"] not in TASKS_OF_TYPE.get(kind, ()):
            raise AdapterError(
                f"{folder} was saved for {facts['task']}, and its {CONFIG_NAME} is for {kind}; copy the folder again"
            )
    try:
        with safe_open(weights, "pt") as opened:
            opened.keys()
    except SafetensorError as error:
        raise AdapterError(f"{weights}: damaged or cut off ({error}); copy the folder again") from error
    return facts


def _check_places(folder: Path) -> None:
    """Links may not lead out of the folder; the Hub's cache links from snapshots to blobs of the same repository."""
    root = folder.resolve()
    blobs = root.parents[1] / "blobs" if root.parent.name == "snapshots" else root
    for path in folder.rglob("*"):
        place = path.resolve()
        if path.is_symlink() and not (place.is_relative_to(root) or place.is_relative_to(blobs)):
            raise AdapterError(f"{path} links to {place}, outside of the adapter; copy the file itself")


def check_config(path: Path) -> dict[str, Any]:
    """Refuse a peft config that names code, a method or fields that the installed peft does not know, or huge sizes.

    Raises:
        AdapterError: with the field.
    """
    if not path.is_file():
        raise AdapterError(f"{path.parent} holds no {path.name}, so it is no adapter")
    config = _read_object(path)
    kind = config.get("peft_type")
    kinds = {member.value for member in PeftType if member in PEFT_TYPE_TO_CONFIG_MAPPING}
    if not isinstance(kind, str) or kind not in kinds:
        raise AdapterError(f"{path}: the installed peft has no method {kind!r}; update peft, or use another adapter")
    defaults = {field.name: field.default for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}
    for name in config:
        if name not in defaults:
            raise AdapterError(f"{path}: {kind} has no field {name!r}{suggest(name, defaults)}; saved by a newer peft?")
    for name in ("base_model_name_or_path", "revision", "task_type"):
        if not isinstance(config.get(name), str | None):
            raise AdapterError(f"{path}: {name} is {config[name]!r}; a text is expected")
    mapping = config.get("auto_mapping") or {}
    library = mapping.get("parent_library", "transformers.") if isinstance(mapping, dict) else mapping
    if not isinstance(mapping, dict) or not str(library).startswith("transformers."):
        raise AdapterError(f"{path}: auto_mapping names code in {library!r}, which is not transformers; do not use it")
    for name in _OUTSIDE:
        if config.get(name):
            raise AdapterError(f"{path}: {name} names files outside of the adapter; do not use it")
    if _asks_for_code(config):
        raise AdapterError(f"{path} asks to run code that comes with a model; do not use it")
    _check_sizes({name: value for name, value in config.items() if repr(value) != repr(defaults[name])}, path)
    return config


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
    for factors in _PRODUCTS:
        elements = math.prod(config.get(name) or 1 for name in factors)
        if elements > _MOST_ELEMENTS:
            said = f"{' times '.join(factors)} is {elements:,}, more than {_MOST_ELEMENTS:,}"
            raise AdapterError(f"{path}: {said}; do not use it")
    _check_replication(config.get("layer_replication") or [], path)


def _check_replication(ranges: Any, path: Path) -> None:
    try:
        layers = sum(end - start for start, end in ranges)
    except (TypeError, ValueError):
        raise AdapterError(f"{path}: layer_replication is {ranges!r}; pairs of layers are expected") from None
    if layers > _MOST_RANK or any(end <= start for start, end in ranges):
        raise AdapterError(f"{path}: layer_replication asks for more than {_MOST_RANK} layers; do not use it")


def saves_embeddings(peft_model: Any, config: Any, has_more_tokens: bool) -> bool:
    """Whether whole embeddings belong to an adapter: those that it adapts, or that were made longer for it.

    Not so where new rows are trained by themselves. peft would ask the Hub for the base's config to find out.
    """
    if getattr(config, "trainable_token_indices", None) or config.peft_type == PeftType.TRAINABLE_TOKENS:
        return False
    targets = getattr(config, "target_modules", None) or ()
    if isinstance(targets, str):
        layers = (name for name, _ in peft_model.named_modules() if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
        return has_more_tokens or any(match_target_against_key(targets, name) for name in layers)
    return has_more_tokens or any(name in targets for name in EMBEDDING_LAYER_NAMES)


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
