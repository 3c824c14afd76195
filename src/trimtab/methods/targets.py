"""Which modules an adapter goes to: by the names that the families give them, and by layer number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from trimtab.errors import StudyError, suggest
from trimtab.methods.table import METHODS, Method

# Query and value projections by the names that the families give them (Hu et al. 2021, table 5:
# adapting both is the best use of a small budget); a fused projection counts as both.
_ATTENTION_NAMES = (
    ("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("query_proj", "value_proj"),
    ("c_attn",), ("query_key_value",), ("qkv_proj",), ("Wqkv",), ("in_proj",), ("q", "v"),
)  # fmt: skip
# Keys, values and what the feed-forward layer's second linear reads (Liu et al. 2022, section 3.3); the last name is
# the feed-forward one.
_KEYS_VALUES_FEEDFORWARD = (
    ("k_proj", "v_proj", "down_proj"), ("key", "value", "output.dense"), ("k_lin", "v_lin", "lin2"),
    ("c_attn", "mlp.c_proj"), ("query_key_value", "dense_4h_to_h"), ("k", "v", "wo"), ("k_proj", "v_proj", "fc2"),
)  # fmt: skip

# The first number in a module's name, as peft counts layers.
_IN_LAYER = re.compile(r"\.[^.]*\.(\d+)\.")

# Upper parts of a model: one in so many layers.
_SHARES = {"upper-half": 2, "upper-quarter": 4}


def find_target_modules(model: Any, wanted: str, method: Method = METHODS["lora"]) -> list[str] | str | None:
    """Names of the modules to adapt; None for a method that goes into none.

    `auto` takes those that the method's row asks for, whatever the family calls them.

    Raises:
        StudyError: names that no module has, or a family whose layers are not recognised.
    """
    if method.places == "none":
        if wanted != "auto":
            raise StudyError(f"target_modules: {method.short_title} goes into no layer; leave it at auto")
        return None
    if wanted == "all-linear" and method.places != "norms":
        return wanted
    if wanted != "auto":
        return _named(model, [name for name in re.split(r"[,\s]+", wanted) if name])
    if method.places == "norms":
        return _norms(model)
    known = _KEYS_VALUES_FEEDFORWARD if method.places == "keys_values_feedforward" else ()
    for names in map(list, (*known, *_ATTENTION_NAMES)):
        if all(modules_called(model, [name]) for name in names):
            return names
    raise StudyError(
        f"target_modules: auto does not recognise the attention of {type(model).__name__}; "
        f"name layers yourself, or use all-linear (layers here: {', '.join(sorted(_leaves(model))[:12])}, …)"
    )


def feedforward_among(targets: Sequence[str]) -> list[str]:
    """Those of (IA)3's targets whose input is scaled, not their output."""
    return [names[-1] for names in _KEYS_VALUES_FEEDFORWARD if list(names) == list(targets)][:1]


def modules_called(model: Any, names: Sequence[str]) -> dict[str, Any]:
    """Modules whose name is, or ends in, one of `names`, as peft matches them."""
    return {name: module for name, module in model.named_modules()
            if any(name == wanted or name.endswith(f".{wanted}") for wanted in names)}  # fmt: skip


def _named(model: Any, names: list[str]) -> list[str]:
    leaves = _leaves(model)
    for name in names:
        if not modules_called(model, [name]):
            raise StudyError(
                f"target_modules: no layer is called {name!r}{suggest(name, leaves)}; "
                "`auto` finds those that the method is usually given"
            )
    return names


def _norms(model: Any) -> list[str]:
    return sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if "Norm" in type(module).__name__}
    )


def _leaves(model: Any) -> set[str]:
    return {name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())}


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


def linears_in_layers(model: Any) -> list[str]:
    """Names of all linears in numbered layers."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                   if _IN_LAYER.search(name) and is_linear(module)})  # fmt: skip


def check_layers(model: Any, layers: Sequence[int]) -> None:
    """Refuse a model whose layers peft cannot count.

    Raises:
        StudyError: modules' names hold no such numbers.
    """
    found = {int(match[1]) for name, module in model.named_modules() if (match := _IN_LAYER.search(name))}
    if not set(layers) <= found:
        raise StudyError(f"layers_to_transform: the layers of {type(model).__name__} are not numbered; leave it at all")


def is_linear(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def has_conv1d(model: Any) -> bool:
    """Whether the layers store [in, out] weights, as GPT-2's do."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())
