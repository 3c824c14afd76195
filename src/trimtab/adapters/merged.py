"""Adapters taken into the base's weights: layer by layer in memory and back, or shard by shard into files.

A layer is merged into a copy, by peft's own `merge`, so that the base's weights stay as they are to the bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from trimtab.errors import AdapterError, MergeError
from trimtab.progress import Progress

# Weights that are merged and held at once, before they are written.
SHARD_BYTES = 1 << 29


def check_mergeable(peft_model: Any, path: Path) -> None:
    """Refuse what stands beside the base's weights and changes none: prompt learning, LLaMA-Adapter.

    Raises:
        AdapterError: with the method.
    """
    if not hasattr(peft_model.base_model, "merge_and_unload"):
        kind = peft_model.peft_type.value.lower()
        raise AdapterError(f"{path}: {kind} stands beside the base's weights and changes none, so it cannot be merged")


def merge_layer(layer: BaseTunerLayer) -> Callable[[], None]:
    """Merge the active adapter into a copy of a layer's weights; returns what gives the very weights back.

    Raises:
        AdapterError: the method cannot do that to this layer, or gives numbers that are not finite.
    """
    base = layer.get_base_layer()
    kept = dict(base.named_parameters(recurse=False))
    for name, parameter in kept.items():  # parameters of their own: tied ones stay as they are at their other end
        setattr(base, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))

    def undo() -> None:
        if layer.get_base_layer() is not base:  # LN tuning puts another module in its place
            layer.unmerge()
        for name, parameter in kept.items():
            setattr(base, name, parameter)
        layer.merged_adapters.clear()

    try:
        layer.merge()
    except (NotImplementedError, ValueError, RuntimeError, AttributeError) as error:
        undo()
        raise AdapterError(f"{type(layer).__name__} cannot be merged: {error}") from error
    if not all(torch.isfinite(parameter).all() for parameter in layer.get_base_layer().parameters(recurse=False)):
        undo()
        raise AdapterError(f"a merged {type(layer).__name__} holds numbers that are not finite; the adapter is broken")
    return undo


class _Weight(NamedTuple):
    """A tensor of the plain model: by its plain name, and in the layer that an adapter changes, if one does."""

    name: str
    tensor: Tensor
    layer: BaseTunerLayer | None
    attribute: str

    def read(self) -> Tensor:
        """As it is now: merged, within `_merged`."""
        owner = self.tensor if self.layer is None else getattr(self.layer.get_base_layer(), self.attribute)
        return owner.detach()


def plain_weights(module: nn.Module, prefix: str = "", layer: BaseTunerLayer | None = None) -> Iterator[_Weight]:
    """The weights that a model has without peft, by their names there; heads are those of the active adapter."""
    if isinstance(module, BaseTunerLayer):
        yield from plain_weights(module.get_base_layer(), prefix, module)
        return
    if isinstance(module, ModulesToSaveWrapper):
        yield from plain_weights(module.modules_to_save[module.active_adapters[0]], prefix)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):  # trained tokens, around an embedding
        yield from plain_weights(module.token_adapter, prefix)
        return
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name not in module._non_persistent_buffers_set:
            yield _Weight(prefix + name, tensor, layer, name)
    for name, child in module.named_children():
        yield from plain_weights(child, f"{prefix}{name}.")


def write_merged(
    peft_model: Any, folder: Path, dtype: torch.dtype, progress: Progress, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the merged weights and config as transformers reads them, holding one shard of them at a time.

    Raises:
        AdapterError: a method that cannot be merged.
    """
    model = peft_model.get_base_model()
    shared: dict[int, list[_Weight]] = {}
    for weight in plain_weights(model):
        shared.setdefault(weight.tensor.data_ptr(), []).append(weight)
    weights: dict[str, _Weight] = {}
    is_untied = False
    for group in shared.values():  # a head that is tied to the embeddings is written once, if no adapter changed either
        is_changed = len(group) > 1 and any(weight.layer is not None for weight in group)
        is_untied |= is_changed
        weights |= {weight.name: weight for weight in (group if is_changed else group[:1])}
    _write_config(model, folder, dtype, is_untied)
    sizes = {name: weight.tensor.numel() * dtype.itemsize for name, weight in weights.items()}
    plan = _plan_shards(sizes, shard_bytes)
    for number, (file, names) in enumerate(plan.filename_to_tensors.items(), 1):
        progress.advance(number, len(plan.filename_to_tensors), "shards")
        _write_shard([weights[name] for name in names], folder / file, dtype)
    _write_index(plan, folder)


def _write_shard(weights: list[_Weight], file: Path, dtype: torch.dtype) -> None:
    tensors = {}
    for weight in weights:
        with _merged(weight.layer):
            tensor = weight.read()
            cast = tensor.to(dtype) if tensor.is_floating_point() else tensor
            tensors[weight.name] = cast.contiguous().clone() if cast.data_ptr() == tensor.data_ptr() else cast
    save_file(tensors, file, metadata={"format": "pt"})


@contextmanager
def _merged(layer: BaseTunerLayer | None) -> Iterator[None]:
    if layer is None:
        yield
        return
    undo = merge_layer(layer)
    try:
        yield
    finally:
        undo()


@contextmanager
def merged_while_computing(peft_model: Any) -> Iterator[None]:
    """Within, each layer computes merged: for its own call alone, so that no two copies are held at once."""
    undo: dict[nn.Module, Callable[[], None]] = {}

    def merge(layer: Any, inputs: Any) -> None:
        undo[layer] = merge_layer(layer)

    layers = [module for module in peft_model.modules() if isinstance(module, BaseTunerLayer)]
    handles = [layer.register_forward_pre_hook(merge) for layer in layers]
    handles += [layer.register_forward_hook(lambda layer, *_: undo.pop(layer)(), always_call=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_written(peft_model: Any, plain: Any, dtype: torch.dtype) -> None:
    """Hold a model that was read back against base and adapter, each weight to the bit, merging one layer at a time.

    Raises:
        MergeError: a weight is another one than the merged one in `dtype`.
    """
    found = plain.state_dict()
    for weight in plain_weights(peft_model.get_base_model()):
        with _merged(weight.layer):
            wanted = weight.read()
            rounded = wanted.to(dtype) if wanted.is_floating_point() else wanted
            is_same = weight.name in found and torch.equal(found[weight.name], rounded.to(found[weight.name]))
        if not is_same:
            raise MergeError(f"{weight.name} was read back as another weight than base and adapter have, once merged")


def _write_config(model: Any, folder: Path, dtype: torch.dtype, is_untied: bool) -> None:
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    if is_untied:
        config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def is_narrow(files: list[Path]) -> bool:
    """Whether safetensors files hold weights in fewer than 32 bits."""
    for file in files:
        with safe_open(file, "pt") as opened:
            if any(opened.get_slice(name).get_dtype() in ("BF16", "F16") for name in opened.keys()):  # noqa: SIM118
                return True
    return False


def widen_weights(files: list[Path], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Copies of safetensors files in float32, shard by shard, for a base that is stored in fewer bits.

    From such files the base is mapped into memory, where it can be larger than that.
    """
    places: dict[str, tuple[Path, int]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            places |= {name: (file, math.prod(opened.get_slice(name).get_shape())) for name in opened.keys()}  # noqa: SIM118
    plan = _plan_shards({name: 4 * count for name, (_, count) in places.items()}, shard_bytes)
    for shard, names in plan.filename_to_tensors.items():
        wide = {}
        for name in names:
            with safe_open(places[name][0], "pt") as opened:
                tensor = opened.get_tensor(name)
            wide[name] = tensor.float() if tensor.is_floating_point() else tensor
        save_file(wide, folder / shard, metadata={"format": "pt"})
    _write_index(plan, folder)


def _plan_shards(sizes: dict[str, int], shard_bytes: int) -> Any:
    """Which tensors (bytes by name) go into which file."""
    return split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda size: size, filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )  # fmt: skip


def _write_index(plan: Any, folder: Path) -> None:
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
