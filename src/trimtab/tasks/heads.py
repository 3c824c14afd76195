"""The heads of stock classification models, applied to pooled states.

The engine packs many texts into one sequence, where a stock forward would pool one row only.
Here the same modules are called on the pooled rows themselves. `engine.forward` compares the
result with the stock forward at load, so a head that is not known here costs speed, never truth.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def backbone_of(model: Any) -> Any:
    """The part of a classification model that turns tokens into hidden states."""
    return getattr(model, model.base_model_prefix)


def pools_last_token(model: Any) -> bool:
    """Whether the head reads the last token (decoders) rather than the first (encoders)."""
    return hasattr(model, "score")


def logits_from_pooled(model: Any, pooled: Tensor) -> Tensor:
    """Logits [rows, classes] from the states [rows, hidden] of each text's pooled token.

    Raises:
        NotImplementedError: the model's head has another build.
    """
    logits: Tensor
    backbone = backbone_of(model)
    if hasattr(model, "score"):  # Llama, GPT-2 and every other decoder
        logits = model.score(pooled)
    elif hasattr(model, "pre_classifier"):  # DistilBERT
        logits = model.classifier(model.pre_classifier(pooled).relu())
    elif hasattr(backbone, "pooler_activation"):  # ALBERT
        logits = model.classifier(backbone.pooler_activation(backbone.pooler(pooled)))
    elif getattr(backbone, "pooler", None) is not None:  # BERT
        logits = model.classifier(backbone.pooler(pooled.unsqueeze(1)))
    elif hasattr(model, "head") and getattr(model.config, "classifier_pooling", None) == "cls":  # ModernBERT
        logits = model.classifier(model.head(pooled))
    elif not isinstance(_unwrap(model.classifier), nn.Linear):  # RoBERTa, XLM-R, ELECTRA
        logits = model.classifier(pooled.unsqueeze(1))
    else:
        raise NotImplementedError(f"the head of {type(model).__name__}")
    return logits


def _unwrap(module: Any) -> Any:
    """The trained copy inside peft's wrapper, else the module itself."""
    copies = getattr(module, "modules_to_save", None)
    return copies[module.active_adapter] if copies is not None else module


def final_linear(model: Any) -> nn.Linear:
    """The last linear of the head: [features] -> [classes]; the trained copy where peft made one.

    Raises:
        NotImplementedError: the model ends in something else.
    """
    for name in ("score", "classifier"):
        module = _unwrap(getattr(model, name, None))
        linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)] if module is not None else []
        if linears:
            return linears[-1]
    raise NotImplementedError(f"{type(model).__name__} has no linear head")
