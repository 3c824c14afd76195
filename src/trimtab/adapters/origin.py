"""Where an adapter's base is, and what is known of an adapter that another program saved."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from trimtab.adapters.files import TASKS_OF_TYPE, is_whole_model
from trimtab.errors import AdapterError, SourceError
from trimtab.fingerprints import fingerprint_model
from trimtab.models import load_config, load_tokenizer
from trimtab.progress import Progress, Silent
from trimtab.sources import ModelSource, locate_model

# What transformers' names of classes end in, where peft was not told the task.
_ENDINGS = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS", "ForCausalLM": "CAUSAL_LM",
            "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}  # fmt: skip
_HEAD_WEIGHTS = (".score.weight", ".classifier.weight", ".out_proj.weight")
_DEFAULT_LENGTH_TOKENS = 256


def locate_base(folder: Path, facts: Mapping[str, Any], base: str | None, progress: Progress) -> ModelSource:
    """Find the base of an adapter where it was, or at `base`, and see that it is the same to the bit.

    Raises:
        SourceError: it cannot be had, or is another one.
    """
    if is_whole_model(folder):
        return ModelSource(facts["base"], str(folder), True)
    name = base or facts["base"]
    source = locate_model(base, progress) if base else _find_again(folder, facts, progress)
    found = fingerprint_model(source)
    if found != facts["base_sha256"]:
        raise SourceError(
            f"{name} is not the base of {folder}: its weights have SHA-256 {found[:12]}…, "
            f"the adapter was trained on {facts['base_sha256'][:12]}…; give the base it was trained on"
        )
    return source


def _find_again(folder: Path, facts: Mapping[str, Any], progress: Progress) -> ModelSource:
    """The base where it was: of a repository the commit that was tuned, else what there is of it now."""
    name, commit = facts["base"], facts.get("base_commit")
    if commit:
        with suppress(SourceError):
            return locate_model(f"{name.partition('@')[0]}@{commit}", progress)
    try:
        return locate_model(name, progress)
    except SourceError as error:
        raise SourceError(f"the base of {folder} is not found: {error} (give it with --base, or base=)") from error


def find_base(
    folder: Path, facts: dict[str, Any], base: str | None, progress: Progress
) -> tuple[ModelSource, dict[str, Any]]:
    """Where an adapter's base is, and what is known of the adapter: guessed where `facts` are empty."""
    if not facts:
        return guess_facts(folder, base, progress)
    return locate_base(folder, facts, base, progress), facts


def load_tokenizer_of(folder: Path, facts: Mapping[str, Any]) -> Any:
    """The adapter's own tokenizer where it has more tokens than the base's; else None."""
    return load_tokenizer(ModelSource(str(folder), str(folder), True)) if facts.get("new_tokens") else None


def _new_tokens(folder: Path, source: ModelSource) -> list[str]:
    """What the tokenizer beside an adapter has over the base's, in the order of their numbers."""
    if not any(folder.glob("tokenizer*")):
        return []
    ours, known = (load_tokenizer(ModelSource(str(place), str(place), True)).get_vocab()
                   for place in (folder, source.location))  # fmt: skip
    return sorted(set(ours) - set(known), key=ours.__getitem__)


def guess_facts(folder: Path, base: str | None, progress: Progress) -> tuple[ModelSource, dict[str, Any]]:
    """What peft's own files tell of an adapter that another program saved; says what cannot be checked."""
    if is_whole_model(folder):
        raise AdapterError(f"{folder} holds a whole model and no {CONFIG_NAME}; transformers loads it as it is")
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    name, task = base or config.get("base_model_name_or_path"), _guess_task(config)
    if not name:
        raise AdapterError(f"{folder / CONFIG_NAME} names no base model; give it with --base, or base=")
    if task is None:
        raise AdapterError(
            f"{folder}: its task_type {config.get('task_type')!r} is none of: {', '.join(TASKS_OF_TYPE)}; "
            "write one of them into its config"
        )
    if base is None and config.get("revision") and "@" not in name and not Path(name).expanduser().is_dir():
        name = f"{name}@{config['revision']}"
    warning = f"{folder} was not saved by Trimtab: whether {name} is its base and its files are whole cannot be checked"
    progress.note(warning)
    if isinstance(progress, Silent):  # who hears no notes hears this
        warnings.warn(warning, stacklevel=2)
    source = locate_model(name, progress)
    names = _label_names(folder, source) if task in ("classification", "token_classification") else []
    if task == "classification" and len(names) == 1:  # transformers' own sign of a regression
        task, names = "regression", []
    return source, {
        "base": source.lasting_name,
        "base_sha256": fingerprint_model(source),
        "task": task,
        "label_names": names,
        "max_length_tokens": _DEFAULT_LENGTH_TOKENS,
        "virtual_tokens": config.get("num_virtual_tokens") or 0,
        "new_tokens": _new_tokens(folder, source),
    }


def _guess_task(config: Mapping[str, Any]) -> str | None:
    """The commonest task of peft's type of task; where it has none, of the base's class."""
    kind = config.get("task_type")
    base_class = str((config.get("auto_mapping") or {}).get("base_model_class"))
    kind = kind or next((kind for ending, kind in _ENDINGS.items() if base_class.endswith(ending)), None)
    return TASKS_OF_TYPE[kind][0] if kind in TASKS_OF_TYPE else None


def _label_names(folder: Path, source: ModelSource) -> list[str]:
    """The base's own names, if the saved head has as many rows; else numbers."""
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as saved:
        names = list(saved.keys())
        heads = [name for name in names if name.endswith(_HEAD_WEIGHTS)]
        if not heads:
            raise AdapterError(f"{folder / SAFETENSORS_WEIGHTS_NAME} holds no head, so its labels are not known")
        rows = saved.get_slice(heads[-1]).get_shape()[0]
    known = load_config(source).id2label or {}
    return (
        [str(known[number]) for number in sorted(known)] if len(known) == rows else [f"LABEL_{n}" for n in range(rows)]
    )
