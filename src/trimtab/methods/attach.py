"""A study's adapter: its peft config, checked against the model, and put around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from trimtab.errors import MethodError, StudyError, suggest
from trimtab.methods.sizes import fit_size
from trimtab.methods.table import METHODS, UNUSABLE, Method, get_method
from trimtab.methods.targets import (
    check_layers,
    feedforward_among,
    find_layers,
    find_target_modules,
    has_conv1d,
    linears_in_layers,
)
from trimtab.methods.whole_model import WholeModel
from trimtab.progress import Progress, Silent
from trimtab.study_config import StudyConfig
from trimtab.tasks import get_task
from trimtab.tasks.heads import final_linear

# The model on which the methods' rates were chosen (MiniLM-L6).
_RATED_WIDTH, _RATED_LAYERS = 384, 6
# Models of billions of parameters learn at 1e-4 (Hu et al. 2021, tables 11 and 12), a twentieth of LoRA's rate here.
_LEAST_SCALE = 0.05
# Embeddings that `trainable_tokens` trains where none are named.
_TRAINED_TOKENS = 200


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


def build_config(
    model: Any, study: StudyConfig, token_ids: Sequence[int] = (), progress: Progress | None = None
) -> Any:
    """The peft config of the study on `model`, of which names and shapes are enough; None for what is no adapter.

    Args:
        token_ids: the commonest tokens, for `trainable_tokens`; stand-ins if there are none.

    Raises:
        StudyError: settings that the method does not have, modules or layers that the model does not have,
            or sizes that suit none of its layers.
    """
    method = get_method(study.method)
    if method.name in UNUSABLE:
        raise MethodError(f"{method.name} cannot be trained here: {UNUSABLE[method.name]}")
    if study.quantize in method.refused_bits:
        raise MethodError(f"{method.name} cannot be trained on a base in {study.quantize} (quantize)")
    targets = find_target_modules(model, study.target_modules, method)
    layers = find_layers(model, study.layers_to_transform)
    options = _options(method, study)
    if not method.is_adapter:
        _check_no_adapter(method, study)
        return None
    config_class, fields = config_class_of(method), _fields_of(method)
    _check_option_names(method, study, fields)
    if targets is not None:
        options["target_modules"] = targets
    options |= study.method_options
    options = _filled_in(method, model, targets, token_ids, options) | options
    note = None
    if method.size is not None and method.size.instead in study.method_options:
        options.setdefault(method.size.field, 0)
    elif method.size is not None:
        options.setdefault(method.size.field, fields[method.size.field].default)
        note = fit_size(method, options, model, targets)
    if note and progress is not None:
        progress.note(note)
    try:
        config = config_class(task_type=get_task(study.task).peft_type, **options)
    except (TypeError, ValueError) as error:
        raise StudyError(f"{method.name}: peft refuses these settings: {error}") from error
    return config if layers is None else _limit_to_layers(config, model, layers, method)


def _check_no_adapter(method: Method, study: StudyConfig) -> None:
    """Refuse what only adapters have, and a probe where no head is new."""
    if study.layers_to_transform != "all":
        trains = "trains no layer" if method.trains_head_only else "trains every layer"
        raise StudyError(f"layers_to_transform: {method.title} {trains}; leave it at all")
    if study.method_options:
        named = ", ".join(study.method_options)
        raise StudyError(f"method_options: {method.short_title} is no adapter and has none; leave out {named}")
    if method.trains_head_only and not get_task(study.task).has_probe:
        raise MethodError(
            f"{method.name} cannot do {study.task}: it trains a new head, and this task keeps the model's own"
        )


def _check_option_names(method: Method, study: StudyConfig, fields: Collection[str]) -> None:
    for name in study.method_options:
        if name not in fields:
            raise StudyError(f"method_options: {method.name} has no {name!r}{suggest(name, fields)}; "
                             f"it has: {', '.join(sorted(fields))}")  # fmt: skip
        if name in method.set_by_training:
            raise StudyError(f"method_options: {name} follows from the number of steps; leave it out")


def _options(method: Method, study: StudyConfig) -> dict[str, Any]:
    """The row's options, with the study's settings over them."""
    options = dict(method.options)
    for setting in ("r", "lora_alpha", "lora_dropout"):
        value = getattr(study, setting)
        if value is None:
            continue
        if setting in method.settings:
            options[method.settings[setting]] = value
        elif value:  # no dropout is what a method without dropout does
            having = ", ".join(name for name, row in METHODS.items() if setting in row.settings)
            raise StudyError(f"{setting}: {method.short_title} has none; leave it out, or use one of: {having}")
    return options


def _filled_in(
    method: Method, model: Any, targets: list[str] | str | None, token_ids: Sequence[int], options: dict[str, Any]
) -> dict[str, Any]:
    """What a config needs to know of the model, where peft does not find it by itself."""
    config = model.config.get_text_config()
    if method.name == "ia3":
        return {"feedforward_modules": feedforward_among(targets) if isinstance(targets, list) else []}
    if method.name == "adalora":  # the plan of the training is not known yet: `make_schedule` sets its steps
        start, end = options.get("init_r", options["target_r"] * 3 // 2 + 1), options["target_r"]
        if start <= end:
            raise StudyError(f"adalora: init_r ({start}) falls to target_r ({end}), so it has to be more; raise it")
        return {"total_step": 100, "init_r": start}
    if method.name == "trainable_tokens":
        return {"token_indices": sorted(token_ids or range(min(_TRAINED_TOKENS, config.vocab_size)))}
    if method.name == "adaption_prompt":  # all but the lowest layers (Zhang et al. 2023, section 3.1)
        return {"adapter_layers": max(1, config.num_hidden_layers - 2)}
    if "num_virtual_tokens" in options and "hidden_size" not in config.to_dict() and hasattr(config, "dim"):
        return {"token_dim": config.hidden_size, "num_layers": config.num_hidden_layers,
                "num_attention_heads": config.num_attention_heads}  # fmt: skip
    return {}


def _limit_to_layers(config: Any, model: Any, layers: list[int], method: Method) -> Any:
    if not hasattr(config, "layers_to_transform"):
        raise StudyError(f"layers_to_transform: {method.title} goes to all layers; leave it at all, or use lora")
    if isinstance(config.target_modules, str):  # peft does not count layers where it takes all linears itself
        config.target_modules = set(linears_in_layers(model))
    check_layers(model, layers)
    config.layers_to_transform = layers
    return config


def config_class_of(method: Method) -> Any:
    """peft's config class of a method that is an adapter."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.peft_type)]


def _fields_of(method: Method) -> dict[str, Any]:
    return {part.name: part for part in dataclasses.fields(config_class_of(method))}


def attach_adapter(
    model: Any,
    study: StudyConfig,
    new_modules: Sequence[str],
    token_ids: Sequence[int] = (),
    progress: Progress | None = None,
    new_token_ids: Sequence[int] = (),
) -> Any:
    """Wrap `model` in the study's adapter; `new_modules` (the head) are trained and saved with it.

    Args:
        token_ids: the commonest tokens, for `trainable_tokens`.
        new_token_ids: those of the study's new tokens; the vocabulary's last stand in, if there are none.

    Returns peft's model for the study's task, or a `WholeModel` where the base's own weights, or its head alone,
    are to be trained.

    Raises:
        StudyError: the method cannot go into this model, with peft's reason and the methods that can.
    """
    from peft import get_peft_model

    config = build_config(model, study, token_ids[:_TRAINED_TOKENS], progress or Silent())
    if study.added_tokens:
        _train_new_tokens(config, model, study, new_token_ids)
    if config is None:
        return WholeModel(model, final_linear(model) if get_method(study.method).trains_head_only else None)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = has_conv1d(model)
    if hasattr(config, "mask_fn") and next(model.parameters()).is_meta:
        config.mask_fn = None  # SHiRA draws which weights it trains from theirs; how many they are needs no draw
    if hasattr(config, "modules_to_save"):
        config.modules_to_save = sorted({name.rpartition(".")[2] for name in new_modules}) or None
        return _wrap(get_peft_model, model, config, study)
    if config.task_type == "TOKEN_CLS":
        config.task_type = None  # peft's class for the task takes no method without modules_to_save
    peft_model = _wrap(get_peft_model, model, config, study)
    for name in new_modules:  # trained all the same; `save_adapter` writes them
        model.get_submodule(name).requires_grad_(True)
    return peft_model


def _train_new_tokens(config: Any, model: Any, study: StudyConfig, ids: Sequence[int]) -> None:
    """Let a method train the study's new tokens beside its own weights: their embeddings, and their rows of a head.

    peft saves such rows as they are, not their difference, so it does not matter how another program starts new rows.
    """
    field = "trainable_token_indices"
    if config is None and not get_method(study.method).trains_head_only:
        return  # all weights train
    if not hasattr(config, field):
        having = [name for name, row in METHODS.items() if row.is_adapter and field in _fields_of(row)]
        raise StudyError(
            f"new_tokens: {study.method} trains no embeddings beside its own weights; use one of: {', '.join(having)}"
        )
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise StudyError(f"new_tokens: peft leaves out the bias that the head of {type(model).__name__} has")
    rows, wanted = embeddings.weight.shape[0], len(study.added_tokens)
    token_ids = list(ids) or list(range(rows - wanted, rows))
    # A head that is tied follows the embeddings, in peft as well.
    layers = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
    names = [next(name for name, module in model.named_modules() if module is layer) for layer in layers]
    config.trainable_token_indices = {name.rpartition(".")[2]: token_ids for name in names}


def _wrap(get_peft_model: Any, model: Any, config: Any, study: StudyConfig) -> Any:
    try:
        return get_peft_model(model, config)
    except (TypeError, ValueError, AttributeError) as error:
        raise MethodError(f"{study.method} cannot go into {type(model).__name__}: {first_sentence(error)}") from error


def check_method(build_model: Callable[[], Any], study: StudyConfig, new_modules: Sequence[str] = ()) -> Any:
    """Refuse a method that cannot go into a model, before the model's weights are read.

    Args:
        build_model: gives the model on the meta device, anew each time.

    Returns:
        The adapted model on the meta device; None where peft needs weights to make it.

    Raises:
        StudyError: settings that the method or the model does not have.
        MethodError: peft cannot put the method into the model; names those that it can.
    """
    try:
        return _attach_without_weights(build_model, study, new_modules)
    except MethodError as error:
        working = []
        for name in METHODS:
            try:
                _attach_without_weights(build_model, study.model_copy(update={"method": name, "method_options": {}}))
            except StudyError:
                continue
            working.append(name)
        raise MethodError(f"{error}; what can: {', '.join(working)}") from error


def _attach_without_weights(build_model: Callable[[], Any], study: StudyConfig, new_modules: Sequence[str] = ()) -> Any:
    peft_model = None
    for device in ("meta", "cpu"):  # of the adapter alone: BOFT counts through its matrices' values
        model = build_model()
        try:
            with torch.device(device):
                peft_model = attach_adapter(model, study, new_modules)
        except (NotImplementedError, RuntimeError):  # an initial value is computed from weights
            continue
        break
    config = getattr(peft_model, "active_peft_config", None)
    if config is not None and (config.is_prompt_learning or study.method not in METHODS):
        _check_forward(peft_model, study)
    return peft_model


def _check_forward(peft_model: Any, study: StudyConfig) -> None:
    """Whether prompt learning, or a method that nobody tried, fits a model shows only when it computes."""
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    # transformers looks into the values of a mask, and there are none here; virtual tokens need one all the same.
    mask = torch.ones_like(ids) if peft_model.active_peft_config.is_prompt_learning else None
    try:
        with torch.device("meta"):
            peft_model(input_ids=ids, attention_mask=mask)
    except ValueError as error:
        kind = type(peft_model.get_base_model()).__name__
        raise MethodError(f"{study.method} cannot go into {kind}: {first_sentence(error)}") from error
    except (NotImplementedError, RuntimeError):  # a value is asked for that only weights have
        return


def virtual_tokens_of(study: StudyConfig) -> int:
    """Tokens that the method puts before each text, which take positions of the model."""
    name = "num_virtual_tokens"
    return int(study.method_options.get(name, get_method(study.method).options.get(name, 0)))


def first_sentence(error: Exception) -> str:
    """What an error of peft says, in one line."""
    lines = str(error).split("\n")
    said = lines[0].split(". ")[0].rstrip(".") if lines[0] else type(error).__name__
    return said if len(said) <= 160 else said[:157] + "…"
