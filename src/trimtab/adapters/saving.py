"""An adapter folder: weights and head in peft's format, the tokenizer, and what Trimtab knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.adapters.files import saves_embeddings, write_facts
from trimtab.machine import package_versions
from trimtab.methods import WholeModel
from trimtab.models import BaseModel
from trimtab.runs import TrialFolder, write_file, write_folder


def save_start(peft_model: Any, target: Path) -> None:
    """Keep the adapter as it starts, where its start changed the base's weights (PiSSA), for `write_weights`."""
    config: Any = getattr(peft_model, "active_peft_config", None)
    start = getattr(config, "init_lora_weights", True)
    if not str(start).startswith("pissa"):
        return

    def write(folder: Path) -> None:
        config.init_lora_weights = True  # or reading it back would take the base apart again
        peft_model.save_pretrained(folder, safe_serialization=True)
        config.init_lora_weights = start

    write_folder(target, write)


def save_adapter(peft_model: Any, base: BaseModel, trial: TrialFolder, facts: dict[str, Any]) -> int:
    """Write adapter, head, tokenizer and facts as one folder; returns the weights' bytes.

    An adapter that changed the base's weights at its start is saved as LoRA of twice its rank, on the base as it was.
    """

    def write(folder: Path) -> None:
        name_base(peft_model, base, "default", facts.get("base_commit"))
        start = trial.start if trial.start.is_dir() else None
        write_weights(peft_model, base.new_modules, folder, start, has_more_tokens=base.has_more_tokens)
        base.tokenizer.save_pretrained(folder)
        write_facts(folder, facts | {"versions": package_versions()})

    write_folder(trial.adapter, write)
    return sum(path.stat().st_size for path in trial.adapter.glob("*.safetensors"))


def name_base(peft_model: Any, base: BaseModel, name: str, commit: str | None) -> None:
    """Where stock peft will look for the base: on the Hub, at the commit that was tuned, or where its folder lies.

    Not where the Hub's client keeps it on this machine.
    """
    if not isinstance(peft_model, WholeModel):
        config = peft_model.peft_config[name]
        config.base_model_name_or_path = base.source.hub_id or base.source.location
        config.revision = commit


def write_weights(
    peft_model: Any,
    new_modules: Sequence[str],
    folder: Path,
    start: Path | None = None,
    *,
    name: str = "default",
    has_more_tokens: bool = False,
) -> None:
    """Adapter and head in peft's format, and the base's embeddings where they were made longer for it.

    Args:
        start: where `save_start` kept the adapter, if it did.
        name: of the adapter, where there are several.
        has_more_tokens: the base has embeddings of tokens that its files do not hold.
    """
    if isinstance(peft_model, WholeModel):
        peft_model.save_pretrained(folder)
        return
    conversion = {} if start is None else {"path_initial_model_for_weight_conversion": str(start)}
    embeddings = saves_embeddings(peft_model, peft_model.peft_config[name], has_more_tokens)
    peft_model.save_pretrained(
        folder, safe_serialization=True, selected_adapters=[name], save_embedding_layers=embeddings, **conversion
    )
    inside = folder / name
    if inside.is_dir():  # where peft puts every adapter but the one called default
        for file in inside.iterdir():
            file.rename(folder / file.name)
        inside.rmdir()
    _add_head(peft_model, new_modules, folder / SAFETENSORS_WEIGHTS_NAME, name, embeddings)


def _add_head(peft_model: Any, new_modules: Sequence[str], file: Path, name: str, embeddings: bool) -> None:
    """Write what was trained and peft left out: the head, with methods without `modules_to_save`, and with PiSSA.

    Stock peft reads these weights, too, by their names.
    """
    config = peft_model.peft_config[name]
    if hasattr(config, "modules_to_save"):
        saved = load_file(file)
        weights = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=embeddings)
        left_out = {key: value for key, value in weights.items() if key not in saved}
        if left_out:
            save_file(saved | left_out, file, metadata={"format": "pt"})
        return
    head = {
        key: parameter.detach().clone()
        for key, parameter in peft_model.named_parameters()
        if any(f".{module}." in key for module in new_modules)
    }
    if head:
        save_file(load_file(file) | head, file, metadata={"format": "pt"})


def save_logits(path: Path, logits: Tensor) -> None:
    write_file(path, lambda temporary: save_file({"logits": logits.contiguous()}, temporary))
