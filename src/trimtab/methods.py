"""PEFT methods: name -> peft config, the defaults that learn, and the layers they go to."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.errors import StudyError, suggest
from trimtab.study_config import StudyConfig
from trimtab.tasks import get_task


@dataclass(frozen=True)
class Method:
    """One row: how peft calls it, and the learning rate that works without being asked on 6 layers of 384."""

    name: str
    title: str
    learning_rate: float
    build: Callable[[StudyConfig, list[str] | str], Any]


def _lora(**fixed: Any) -> Callable[[StudyConfig, list[str] | str], Any]:
    def build(study: StudyConfig, target_modules: list[str] | str) -> Any:
        from peft import LoraConfig

        return LoraConfig(
            task_type=get_task(study.task).peft_type,
            r=study.r,
            lora_alpha=study.lora_alpha,
            lora_dropout=study.lora_dropout,
            target_modules=target_modules,
            **fixed,
        )

    return build


def _ia3(study: StudyConfig, target_modules: list[str] | str) -> Any:
    from peft import IA3Config

    return IA3Config(task_type=get_task(study.task).peft_type, target_modules=target_modules, feedforward_modules=[])


METHODS = {
    method.name: method
    for method in (
        Method("lora", "LoRA (Hu et al. 2021)", 2e-3, _lora()),
        Method("rslora", "rank-stabilised LoRA (Kalajdzievski 2023)", 1e-3, _lora(use_rslora=True)),
        Method("dora", "weight-decomposed LoRA (Liu et al. 2024)", 2e-3, _lora(use_dora=True)),
        Method("ia3", "(IA)3 (Liu et al. 2022)", 5e-3, _ia3),
    )
}

# Query and value projections by the names that the families give them (Hu et al. 2021, table 5:
# adapting both is the best use of a small budget); a fused projection counts as both.
_ATTENTION_NAMES = (
    ("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("query_proj", "value_proj"),
    ("c_attn",), ("query_key_value",), ("qkv_proj",), ("Wqkv",), ("in_proj",), ("q", "v"),
)  # fmt: skip


# The model on which the methods' rates were chosen (MiniLM-L6).
_RATED_WIDTH, _RATED_LAYERS = 384, 6
# Models of billions of parameters learn at 1e-4 (Hu et al. 2021, tables 11 and 12), a twentieth of LoRA's rate here.
_LEAST_SCALE = 0.05

# The first number in a module's name, as peft counts layers.
_IN_LAYER = re.compile(r"\.[^.]*\.(\d+)\.")

# Upper parts of a model: one in so many layers.
_SHARES = {"upper-half": 2, "upper-quarter": 4}


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        StudyError: unknown, with the nearest and all known ones.
    """
    if name not in METHODS:
        raise StudyError(f"unknown method {name!r}{suggest(name, METHODS)}; there are: {', '.join(METHODS)}")
    return METHODS[name]


def learning_rate_of(study: StudyConfig, model: Any) -> float:
    """The study's rate; `auto` is the method's, which was chosen on a small model, less for wide and deep ones.

    Adam's best rate falls as 1 / width (Yang et al. 2022, "Tensor Programs V", table 3); that it falls
    with the depth as well was measured (docs/decisions.md, 31).
    """
    if study.learning_rate != "auto":
        return study.learning_rate
    config = model.config.get_text_config()
    scale: float = _RATED_WIDTH / config.hidden_size * _RATED_LAYERS / config.num_hidden_layers
    return get_method(study.method).learning_rate * min(1.0, max(_LEAST_SCALE, scale))


def find_target_modules(model: Any, wanted: str) -> list[str] | str:
    """Names of the layers to adapt.

    `auto` takes the query and value projections (or the fused one), whatever the family calls them.

    Raises:
        StudyError: names that no layer has, or a family whose attention is not recognised.
    """
    if wanted == "all-linear":
        return wanted
    leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())}
    if wanted != "auto":
        names = [name for name in re.split(r"[,\s]+", wanted) if name]
        for name in names:
            if name not in leaves:
                raise StudyError(
                    f"target_modules: no layer is called {name!r}{suggest(name, leaves)}; "
                    "`auto` finds the attention projections"
                )
        return names
    for names in map(list, _ATTENTION_NAMES):
        if all(name in leaves for name in names):
            return names
    raise StudyError(
        f"target_modules: auto does not recognise the attention of {type(model).__name__}; "
        f"name layers yourself, or use all-linear (layers here: {', '.join(sorted(leaves)[:12])}, …)"
    )


def find_layers(model: Any, wanted: str) -> list[int] | None:
    """Numbers of the layers to adapt; None for all.

    Raises:
        StudyError: not one of the known words, and no range of layers that the model has.
    """
    if wanted == "all":
        return None
    count = int(model.config.get_text_config().num_hidden_layers)
    if wanted in _SHARES:
        return list(range(count - max(1, count // _SHARES[wanted]), count))
    first, _, last = wanted.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal() and int(first) <= int(last or first) < count):
        raise StudyError(
            f"layers_to_transform: {wanted!r} is no choice of the layers 0 to {count - 1}{suggest(wanted, _SHARES)}; "
            f"use all, {', '.join(_SHARES)}, or a range such as {count // 2}-{count - 1}"
        )
    return list(range(int(first), int(last or first) + 1))


def build_config(model: Any, study: StudyConfig) -> Any:
    """The peft config of the study on `model`, of which names and layers are enough.

    Raises:
        StudyError: layers or modules that the model does not have, or a method that cannot be limited to layers.
    """
    method = get_method(study.method)
    targets = find_target_modules(model, study.target_modules)
    layers = find_layers(model, study.layers_to_transform)
    if layers is None:
        return method.build(study, targets)
    if isinstance(targets, str):  # peft does not count layers where it takes all linears itself
        targets = sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                          if _IN_LAYER.search(name) and _is_linear(module)})  # fmt: skip
    config = method.build(study, targets)
    if not hasattr(config, "layers_to_transform"):
        raise StudyError(f"layers_to_transform: {method.title} goes to all layers; leave it at all, or use lora")
    found = {int(match[1]) for name, module in model.named_modules() if (match := _IN_LAYER.search(name))}
    if not set(layers) <= found:
        raise StudyError(f"layers_to_transform: the layers of {type(model).__name__} are not numbered; leave it at all")
    config.layers_to_transform = layers
    return config


def attach_adapter(model: Any, study: StudyConfig, new_modules: list[str]) -> Any:
    """Wrap `model` in the study's adapter; `new_modules` (the head) are trained and saved with it.

    Returns peft's model for the study's task.
    """
    from peft import get_peft_model

    config = build_config(model, study)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = _has_conv1d(model)
    config.modules_to_save = sorted({name.rpartition(".")[2] for name in new_modules}) or None
    return get_peft_model(model, config)


def _has_conv1d(model: Any) -> bool:
    """Whether the layers store [in, out] weights, as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def _is_linear(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))
