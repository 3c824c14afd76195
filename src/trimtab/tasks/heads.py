"""The heads of stock models, applied to the states that they read.

The engine packs many texts into one sequence, where a stock forward would pool one row only.
Here the same modules are called on the pooled rows themselves. `engine.forward` compares the
result with the stock forward at load, so a head that is not known here costs speed, never truth.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from trimtab.tasks.token_loss import Readout


def backbone_of(model: Any) -> Any:
    """The part of a model with a head that turns tokens into hidden states; T5 has no such part, and is it all."""
    return getattr(model, model.base_model_prefix, model)


def pools_last_token(model: Any) -> bool:
    """Whether the head reads the last token (decoders) rather than the first (encoders)."""
    return hasattr(model, "score")


def pools_first_token(model: Any) -> bool:
    """Whether the head reads one token of a text, its first."""
    return type(model).__name__.endswith("ForSequenceClassification") and not pools_last_token(model)


def is_language_model(model: Any) -> bool:
    """Whether the head names the next token."""
    if pools_last_token(model) or hasattr(model, "classifier"):
        return False
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


def readout_of(model: Any) -> Readout:
    """A language model's head, with what its family does to the logits.

    Raises:
        NotImplementedError: the head is no single linear layer.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is None or weight.dim() != 2:
        raise NotImplementedError(f"the head of {type(model).__name__}")
    adapted = head if hasattr(head, "base_layer") else None  # peft's layers have one
    if model.config.is_encoder_decoder:  # what enters its head is scaled already; BART's bias is no part of it
        bias = getattr(model, "final_logits_bias", None)
        return Readout(weight, getattr(head, "bias", None) if bias is None else bias[0], 1.0, None, adapted)
    config = model.config.get_text_config()
    # Granite divides by logits_scaling, Cohere multiplies by logit_scale; Gemma caps.
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Readout(weight, getattr(head, "bias", None), float(scale), softcap, adapted)


def logits_from_pooled(model: Any, pooled: Tensor) -> Tensor:
    """Logits [positions, classes] from the states [positions, hidden] that the head reads.

    Raises:
        NotImplementedError: the model's head has another build.
    """
    logits: Tensor
    backbone = backbone_of(model)
    if is_language_model(model):
        logits = readout_of(model).logits(pooled)
    elif type(model).__name__.endswith("ForTokenClassification"):
        states = model.head(pooled) if hasattr(model, "head") else pooled  # ModernBERT has a layer before it
        logits = (model.score if hasattr(model, "score") else model.classifier)(states)
    elif hasattr(model, "score"):  # Llama, GPT-2 and every other decoder
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
