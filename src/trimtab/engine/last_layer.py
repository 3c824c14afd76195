"""The last layer computed for pooled tokens only: past its attention, no other token is read.

`limit_last_layer` prepares a classification model once; inside `only_rows(pooled)` its backbone
then returns the states of those tokens alone. The plain twin is the same call outside of
`only_rows`, followed by `index_select`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engine import attention
from trimtab.engine.memory import weights_read_in_passing
from trimtab.tasks.heads import backbone_of

# Largest difference from the plain twin, relative to the states' largest value.
_TOLERANCE = 1e-5

_rows: ContextVar[Tensor | None] = ContextVar("pooled rows", default=None)


@contextmanager
def only_rows(rows: Tensor | None) -> Iterator[None]:
    """Within, a model prepared by `limit_last_layer` returns the states of these tokens of its sequence (None: all)."""
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)


def limit_last_layer(model: Any) -> bool:
    """Let `model` honour `only_rows`; False, and nothing changed, where its layers have another build.

    Llama-like layers (input_layernorm, self_attn, post_attention_layernorm, mlp) and BERT-like ones
    (attention, intermediate, output) are known, and checked on an example of four tokens.
    """
    layer = _last_layer(backbone_of(model))
    if layer is None:
        return False
    stock = type(layer)
    if _is_llama_like(layer):
        handle = layer.self_attn.o_proj.register_forward_pre_hook(_select)
        layer.__class__ = type(stock.__name__, (_LastLlamaLayer, stock), {})
    else:
        # Both the attended values and the residual enter here; all that follows works row by row.
        handle = layer.attention.output.register_forward_pre_hook(_select)
    if _honours_rows(model):
        return True
    handle.remove()
    layer.__class__ = stock
    return False


def _is_llama_like(layer: Any) -> bool:
    return hasattr(layer, "self_attn")


def _last_layer(backbone: Any) -> Any:
    """The last layer if it has a known build and has not been changed before, else None."""
    layers = getattr(backbone, "layers", None) or getattr(getattr(backbone, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != backbone.config.num_hidden_layers:
        return None
    layer: Any = layers[-1]
    names = {name for name, _ in layer.named_children()}
    if names == {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        fits = hasattr(layer.self_attn, "o_proj") and not isinstance(layer, _LastLlamaLayer)
        return layer if fits else None
    if names == {"attention", "intermediate", "output"}:
        output = getattr(layer.attention, "output", None)
        return layer if output is not None and not output._forward_pre_hooks else None
    return None


def _select(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    rows = _rows.get()
    return None if rows is None else tuple(value.index_select(1, rows) for value in inputs)


class _LastLlamaLayer(nn.Module):
    """Llama's pre-norm layer, where the hook on `o_proj` has left the pooled rows only."""

    input_layernorm: nn.Module
    self_attn: nn.Module
    post_attention_layernorm: nn.Module
    mlp: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = _rows.get()
        if rows is None or args:
            return super().forward(hidden_states, *args, **kwargs)
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        states = hidden_states.index_select(1, rows) + attended
        return states + self.mlp(self.post_attention_layernorm(states))


def _honours_rows(model: Any) -> bool:
    """Whether the pooled rows' states are those of the plain twin, on an example."""
    backbone = backbone_of(model)
    device = next(model.parameters()).device
    ids = torch.arange(4, device=device).unsqueeze(0)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": ids}
    if model.config._attn_implementation == attention.IMPLEMENTATION:
        inputs["packed_runs"] = [attention.Run(1, 4)]
    if getattr(model.config, "use_cache", False):
        inputs["use_cache"] = False
    rows = torch.tensor([0, 3], device=device)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), weights_read_in_passing(backbone):
            plain = backbone(**inputs).last_hidden_state[0].index_select(0, rows)
            with only_rows(rows):
                limited = backbone(**inputs).last_hidden_state[0]
    except Exception:  # whatever a layer of another build does with fewer rows
        return False
    finally:
        for module, was_training in training.items():
            module.training = was_training
    if limited.shape != plain.shape:
        return False
    return bool((limited - plain).abs().max() <= _TOLERANCE * plain.abs().max())
