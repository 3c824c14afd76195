"""Activation checkpointing (Chen et al. 2016): layers keep their input only, and are computed again for the backward.

Taken where what a step would keep does not fit the memory that is free; the update is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from trimtab.engine.forward import Forward, PackedForward

# Share of the free memory that activations may take before layers are checkpointed.
MEMORY_SHARE = 0.6


def checkpoint_layers(forward: Forward, is_on: bool) -> bool:
    """Let the layers of `forward` keep their inputs only, or all; False where they have no such build.

    transformers' layers do so while they are in training mode, which `set_adapter_training` sees to; the
    last one computes some rows only, in a way that a second run would not know of, and is left out.
    """
    if isinstance(forward, PackedForward) and forward.stack is not None and forward.stack.fits():
        forward.stack.checkpointing = is_on
        return True
    layers = [module for module in forward.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[:-1]:
        layer.gradient_checkpointing = is_on
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return len(layers) > 1


def kept_bytes(compute_loss: Callable[[], Tensor]) -> int:
    """Bytes that one forward keeps for its backward, frozen weights not counted."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def count_computed(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_leaf else count(tensor)  # leaves are parameters, frozen or not

    with saved_tensors_hooks(count_computed, lambda tensor: tensor):
        loss = compute_loss()
    for node in _nodes_of(loss.grad_fn):
        for tensor in _tensors_in(getattr(node, "kept", None)):  # what the fused layers keep
            if not isinstance(tensor, torch.nn.Parameter):
                count(tensor)
    return sum(kept.values())


def should_checkpoint(small_bytes: int, small_tokens: int, largest_tokens: int) -> bool:
    """Whether a step of `largest_tokens` would keep more than its share of the memory that is free.

    Args:
        small_bytes, small_tokens: what a small batch keeps, and its tokens; what is kept grows with the tokens.
    """
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
    else:
        free = psutil.virtual_memory().available
    return small_bytes / small_tokens * largest_tokens > MEMORY_SHARE * free


def _nodes_of(node: Any) -> Iterator[Any]:
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [following for following, _ in node.next_functions]


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)
