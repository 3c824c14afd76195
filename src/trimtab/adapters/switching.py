"""Several adapters around one base: attached with heads of their own sizes, mixed in a batch, combined into one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType, PromptLearningConfig
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from trimtab.adapters.files import check_tensors, saves_embeddings
from trimtab.engine.batches import Collator
from trimtab.engine.forward import Choice
from trimtab.engine.frozen import thaw_linears
from trimtab.engine.lora import can_mix
from trimtab.engine.mixed import mix_of, mixing
from trimtab.engine.scoring import SCORING_TOKENS_PER_BATCH
from trimtab.errors import AdapterError, suggest
from trimtab.tasks.examples import Example
from trimtab.tasks.heads import backbone_of, logits_from_pooled

# What peft's `add_weighted_adapter` offers.
_WHOLE = ("linear", "svd", "cat")
# These leave parts of each adapter out, and need to be told how much they keep.
_PRUNING = ("ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd", "magnitude_prune",
            "magnitude_prune_svd")  # fmt: skip

# Weights that add up to less have no mean: what is left is rounding.
_SMALLEST_SUM = 1e-6


def wrapped_heads(peft_model: Any) -> list[ModulesToSaveWrapper]:
    """peft's wrappers around what each adapter has a copy of."""
    return [module for module in peft_model.modules() if isinstance(module, ModulesToSaveWrapper)]


def check_name(name: str, taken: Sequence[str]) -> None:
    """Refuse a name that peft cannot use for another adapter.

    Raises:
        AdapterError: with what is wrong with it.
    """
    if name in taken:
        raise AdapterError(f"an adapter named {name!r} is loaded already; unload it first, or choose another name")
    if not name or "." in name or name.startswith("__"):
        raise AdapterError(f"{name!r} cannot name an adapter: no dots, and no two underscores at the beginning")


def attach(peft_model: Any, folder: Path, name: str, classes: int, has_more_tokens: bool = False) -> None:
    """Put one more adapter around the base of `peft_model`, with a head of `classes` columns, and leave it inactive.

    The fast layers are to be prepared again.

    Raises:
        AdapterError: a method that cannot stand beside those that are there.
    """
    kind = PeftConfig.from_pretrained(str(folder)).peft_type
    there = peft_model.peft_type
    if kind != there:
        raise AdapterError(
            f"{folder} is {PeftType(kind).value}, and {PeftType(there).value} is loaded; one base holds adapters of "
            "one method: load it by itself"
        )
    thaw_linears(peft_model)
    try:
        with _heads_of(peft_model, classes), weights_that_fit(folder):
            peft_model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
        check_weights(peft_model, folder, name, has_more_tokens)
    except AdapterError:
        if name in peft_model.peft_config:
            peft_model.delete_adapter(name)
        raise


@contextmanager
def weights_that_fit(folder: Path) -> Iterator[None]:
    """Within, peft reads an adapter; tensors that are missing or of another shape become one clear error."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        first = str(error).strip().splitlines()
        raise AdapterError(
            f"{folder / SAFETENSORS_WEIGHTS_NAME} lacks what {CONFIG_NAME} tells of, or has it in another shape "
            f"({' '.join(line.strip() for line in first[:2])}); copy the folder again"
        ) from error


def copy_heads(model: Any, new_modules: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """The weights of a base's own head, by module."""
    return {name: {key: value.clone() for key, value in model.get_submodule(name).state_dict().items()}
            for name in new_modules}  # fmt: skip


@contextmanager
def base_alone(peft_model: Any, heads: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    """Within, the base computes without its adapter, and with its own head.

    Args:
        heads: what `copy_heads` took before the adapter was read, for methods that train the base's only head.
    """
    config, model = peft_model.active_peft_config, peft_model.get_base_model()
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    only = {} if wrappers else {name: (model.get_submodule(name), weights) for name, weights in heads.items()}
    trained = copy_heads(model, list(only))
    frozen = [parameter for parameter in peft_model.parameters() if not parameter.requires_grad]
    for module, weights in only.values():
        module.load_state_dict(weights)
    try:
        if config.is_prompt_learning and not hasattr(model, "prepare_inputs_for_generation"):
            # peft's own way asks a classifier how it generates.
            for wrapper in wrappers:
                wrapper.enable_adapters(False)
            peft_model.forward = model.forward
            try:
                yield
            finally:
                del peft_model.forward
                for wrapper in wrappers:
                    wrapper.enable_adapters(True)
        else:
            with peft_model.disable_adapter():
                yield
    finally:
        for name, (module, _) in only.items():
            module.load_state_dict(trained[name])
        for parameter in frozen:  # peft lets train what it switches on
            parameter.requires_grad_(False)


def check_weights(peft_model: Any, folder: Path, name: str, has_more_tokens: bool = False) -> None:
    """Refuse a folder whose tensors are not those of the adapter that peft built from its config.

    Raises:
        AdapterError: with the first that is missing, or has no place.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    with safe_open(file, "pt") as saved:
        names = list(saved.keys())
    if isinstance(peft_model.peft_config[name], PromptLearningConfig):
        return  # its one tensor is computed from what is trained
    parameters = (parameter for parameter, _ in peft_model.named_parameters())
    embeddings = saves_embeddings(peft_model, peft_model.peft_config[name], has_more_tokens)
    wanted = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=embeddings)
    check_tensors(names, wanted, parameters, file)


@contextmanager
def _heads_of(peft_model: Any, classes: int) -> Iterator[None]:
    """Within, heads that peft copies for a new adapter have `classes` columns."""
    wrappers = [wrapper for wrapper in wrapped_heads(peft_model) if classes]
    originals = [wrapper.original_module for wrapper in wrappers]
    for wrapper in wrappers:
        wrapper.original_module = _resized(wrapper.original_module, classes, peft_model.config.num_labels)
    try:
        yield
    finally:
        for wrapper, original in zip(wrappers, originals, strict=True):
            wrapper.original_module = original


def _resized(head: nn.Module, classes: int, had: int) -> nn.Module:
    """A copy of a head with `classes` columns in place of those that it `had`."""
    copy: Any = deepcopy(head)
    found = [(name, layer) for name, layer in copy.named_modules() if getattr(layer, "out_features", None) == had]
    if not found or had == classes:
        return copy  # type: ignore[no-any-return]
    name, layer = found[-1]
    fitting = nn.Linear(layer.in_features, classes, bias=layer.bias is not None, device=layer.weight.device)
    if not name:
        return fitting
    parent, _, last = name.rpartition(".")
    setattr(copy.get_submodule(parent), last, fitting)
    return copy  # type: ignore[no-any-return]


def set_active(peft_model: Any, name: str) -> None:
    """Let layers and head answer as this adapter, with nothing to be trained."""
    peft_model.set_adapter(name)
    peft_model.requires_grad_(False)


def score_mixed(
    peft_model: Any, choice: Choice, examples: Sequence[Example], adapters: Sequence[str], pad_token_id: int
) -> list[Tensor] | None:
    """Each text's outputs [its positions, its head's columns], each batch in one pass; None where layers cannot mix.

    Args:
        adapters: the one that each text asks for.
    """
    model, forward = choice.forward.model, choice.forward
    heads = wrapped_heads(peft_model)
    inside = {id(module) for module in _layers_of(model)}
    if any(id(head) in inside for head in heads) or not can_mix(peft_model, adapters):
        return None
    # Labels of several tasks make no tensor together, and none is read here.
    examples = [replace(example, labels=[0] * len(example.labels)) for example in examples]
    collator = Collator(examples, forward.packed, choice.position_offset, pad_token_id)
    outputs: dict[int, Tensor] = {}
    active = peft_model.active_adapter
    try:
        with torch.inference_mode():
            for rows in collator.plan(SCORING_TOKENS_PER_BATCH, None):
                batch = collator.collate(rows).to(next(model.parameters()).device)
                with mixing(mix_of(batch, adapters)):
                    states = torch.split(forward.states(batch), batch.positions_by_text)
                for name in sorted({adapters[row] for row in rows}):
                    mine = [place for place, row in enumerate(batch.rows) if adapters[row] == name]
                    for head in heads:
                        head.set_adapter(name, inference_mode=True)
                    logits = logits_from_pooled(model, torch.cat([states[place] for place in mine])).float().cpu()
                    parts = torch.split(logits, [len(states[place]) for place in mine])
                    outputs |= dict(zip([batch.rows[place] for place in mine], parts, strict=True))
    except NotImplementedError:  # a head of another build
        return None
    finally:
        for head in heads:
            head.set_adapter(active, inference_mode=True)
    return [outputs[row] for row in range(len(examples))]


def _layers_of(model: Any) -> Iterator[nn.Module]:
    """The modules that a pass runs before the head: a pooler belongs to the head."""
    for name, child in backbone_of(model).named_children():
        if name != "pooler" and child is not model.get_output_embeddings():
            yield from child.modules()


def combine(
    peft_model: Any, weights: Mapping[str, float], name: str, kind: str, density: float | None, classes: int
) -> None:
    """Add an adapter `name` made of others, as peft's `add_weighted_adapter` does; heads become their weighted mean.

    Args:
        weights: by the name of the adapter.
        density: the share of each adapter that is kept, where `kind` prunes.

    Raises:
        AdapterError: adapters that cannot be combined so, with peft's reason.
    """
    known = (*_WHOLE, *_PRUNING)
    if kind not in known:
        raise AdapterError(f"no combination type {kind!r}{suggest(kind, known)}; one of: {', '.join(known)}")
    if kind in _PRUNING and density is None:
        raise AdapterError(f"{kind} keeps a part of each adapter; say how much: density, such as 0.5")
    if density is not None and not 0.0 < density <= 1.0:
        raise AdapterError(f"density is {density}; above 0 and at most 1 is expected")
    if not all(map(math.isfinite, weights.values())):
        raise AdapterError(f"the weights are {', '.join(map(str, weights.values()))}; give finite numbers")
    if wrapped_heads(peft_model) and abs(sum(weights.values())) < _SMALLEST_SUM:
        raise AdapterError("the weights add up to 0, so the heads have no mean; change one of them")
    if any(getattr(peft_model.peft_config[part], "use_dora", False) for part in weights):
        raise AdapterError("DoRA's magnitudes are not combined by peft; combine LoRA adapters")
    thaw_linears(peft_model)
    torch.manual_seed(0)  # DARE drops at random
    try:
        with _without_heads(peft_model):  # peft combines no heads, and refuses adapters that have some
            peft_model.add_weighted_adapter(
                list(weights), list(weights.values()), name, combination_type=kind, density=density
            )
        _finish(peft_model, weights, name, classes)
    except Exception as error:  # peft and torch raise their own; half an adapter may not stay
        if name in peft_model.peft_config:
            peft_model.delete_adapter(name)
        raise AdapterError(f"these adapters cannot be combined by {kind}: {error}") from error


def _finish(peft_model: Any, weights: Mapping[str, float], name: str, classes: int) -> None:
    """What peft leaves open of a combination: its scale, how its weights lie, its heads."""
    peft_model.peft_config[name].use_rslora = False  # the weights of its parts hold their scales
    for module in peft_model.modules():
        if isinstance(module, LoraLayer) and name in module.scaling:
            module.scaling[name] = 1.0
    for key, parameter in peft_model.named_parameters():
        if f".{name}." in key:  # singular vectors lie by columns, where compiled kernels read by rows
            parameter.data = parameter.data.contiguous()
    with _heads_of(peft_model, classes):
        for wrapper in wrapped_heads(peft_model):
            wrapper.update(name)
            _average(wrapper.modules_to_save, weights, name)


@contextmanager
def _without_heads(peft_model: Any) -> Iterator[None]:
    """Within, the base's own modules stand where peft has wrapped them."""
    found = [(name, module) for name, module in peft_model.named_modules() if isinstance(module, ModulesToSaveWrapper)]

    def put(modules: Iterable[tuple[str, nn.Module]]) -> None:
        for name, module in modules:
            parent, _, last = name.rpartition(".")
            setattr(peft_model.get_submodule(parent), last, module)

    put((name, wrapper.original_module) for name, wrapper in found)
    try:
        yield
    finally:
        put(found)


def _average(copies: nn.ModuleDict, weights: Mapping[str, float], name: str) -> None:
    total = sum(weights.values())
    with torch.no_grad():
        for key, target in copies[name].named_parameters():
            parts = [copies[part].get_parameter(key) * (weight / total) for part, weight in weights.items()]
            target.copy_(torch.stack(parts).sum(0))
