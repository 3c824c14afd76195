"""Base models and tokenizers from a located source: always whole, always with a head.

Weights are read here and nowhere else. Where models come from is in `sources`.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from trimtab.errors import SourceError, StudyError
from trimtab.sources import ModelSource
from trimtab.study_config import Quantize

# peft matches `modules_to_save` by the end of a module's name.
_HEADS = ("score", "classifier")


@dataclass
class BaseModel:
    """A stock transformers model with a task's head, in eval mode, its tokenizer, and its origin.

    `new_modules` are those whose weights the source does not hold (the head, sometimes a pooler):
    they start at random, so they must be trained and saved with the adapter. `has_more_tokens` is whether the
    embeddings were made longer than the source's.
    """

    model: Any
    tokenizer: Any
    source: ModelSource
    new_modules: list[str]
    has_more_tokens: bool = False

    def ids_of(self, tokens: Sequence[str]) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(token) for token in tokens]

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device


def quiet_libraries() -> None:
    """Keep transformers' and datasets' own bars and warnings out of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets
    import transformers

    # peft still asks transformers for a name that is about to go; users can do nothing about it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    for said in (".*Failed to load the CUDA extension", ".*boft_n_butterfly_factor", "Unsupported layer type",
                 "Sparse invariant checks"):  # fmt: skip
        warnings.filterwarnings("ignore", message=said, category=UserWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a processor it tells every call of every layer
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def load_config(source: ModelSource) -> Any:
    """The model's configuration; reads no weights.

    Raises:
        SourceError: an architecture transformers does not know.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.location, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise SourceError(f"{source.name}: its config cannot be used: {str(error).splitlines()[0]}") from error


# What transformers calls a model for each of the tasks, in words.
_KINDS = {
    "AutoModelForSequenceClassification": (
        "classification", "choose a text encoder (BERT family) or decoder (Llama, GPT-2 families)"),
    "AutoModelForTokenClassification": (
        "token classification", "choose a text encoder (BERT family) or decoder (Llama, GPT-2 families)"),
    "AutoModelForCausalLM": ("causal language modelling", "choose a decoder (Llama, GPT-2 families)"),
    "AutoModelForSeq2SeqLM": ("seq2seq", "choose an encoder with a decoder (T5, mT5, BART families)"),
}  # fmt: skip


def build_without_weights(source: ModelSource, auto_class: str, head_settings: dict[str, Any] | None = None) -> Any:
    """The model on the meta device: its layers and names, before weights are read.

    Args:
        auto_class: transformers' class for the task, such as AutoModelForSequenceClassification.
        head_settings: of a new head; the config's own, if there are none.

    Raises:
        SourceError: an architecture without a model for the task.
    """
    import transformers

    config = load_config(source)
    auto = getattr(transformers, auto_class)
    kind, advice = _KINDS[auto_class]
    if not has_model_for(config, auto_class):
        raise SourceError(f"{source.name} is a {config.model_type!r} model, which cannot be used for {kind}; {advice}")
    for name, value in (head_settings or {}).items():
        setattr(config, name, value)
    with torch.device("meta"):
        return auto.from_config(config)


def has_model_for(config: Any, auto_class: str) -> bool:
    """Whether a model of this config was made for what `auto_class` does."""
    import transformers

    if type(config) not in getattr(transformers, auto_class)._model_mapping:
        return False
    # BERT and its like count as decoders to transformers, but were not made to name the next token.
    if auto_class == "AutoModelForCausalLM":
        return type(config) not in transformers.AutoModelForMaskedLM._model_mapping and not config.is_encoder_decoder
    return bool(config.is_encoder_decoder) == (auto_class == "AutoModelForSeq2SeqLM")


def find_new_modules(source: ModelSource, model: Any) -> list[str]:
    """Head-level modules of `model` whose weights the source does not hold, by the names in its files.

    Empty where the files are not here, or are none of safetensors.
    """
    files = sorted(Path(source.location).glob("*.safetensors")) if source.is_local else []
    held: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            held |= set(weights.keys())
    if not held:
        return []
    prefix = f"{model.base_model_prefix}."
    held = {name.removeprefix(prefix) for name in held}
    missing = [name for name, _ in model.named_parameters() if name.removeprefix(prefix) not in held]
    known = (*_HEADS, "pooler", "pre_classifier", "head")
    return [name for name in _modules_of(missing) if name.split(".")[-1] in known]


def load_tokenizer(source: ModelSource, new_tokens: Sequence[str] = ()) -> Any:
    """The tokenizer, with a padding token, padding on the right, and with `new_tokens` behind all others.

    Raises:
        SourceError: the source holds none that can be used.
        StudyError: a new token that it has already.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, trust_remote_code=False)
    except Exception as error:  # missing files, bad JSON and unknown classes come as many kinds
        raise SourceError(f"{source.name}: no usable tokenizer: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise SourceError(f"{source.name}: the tokenizer has neither a padding, end nor unknown token")
    tokenizer.padding_side = "right"
    known = [token for token in new_tokens if token in tokenizer.get_vocab()]
    if known:
        raise StudyError(f"new_tokens: {source.name} has {known[0]!r} in its vocabulary already; leave it out")
    tokenizer.add_tokens(list(new_tokens))
    return tokenizer


def give_padding(model: Any, tokenizer: Any) -> None:
    """The tokenizer's padding token, where the model names none: heads that read the last token look for it."""
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def make_room_for_tokens(model: Any, tokens: int) -> bool:
    """At least so many rows of embeddings, and of a language model's head; new ones start at the others' mean.

    Returns:
        Whether there were fewer.
    """
    held = model.get_input_embeddings().weight.shape[0]
    if tokens <= held:
        return False
    model.resize_token_embeddings(tokens, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None and not layer.weight.is_meta:
            with torch.no_grad():
                layer.weight[held:] = layer.weight[:held].mean(0)
    return True


def load_base(
    source: ModelSource, auto_class: str, head_settings: dict[str, Any], seed: int, quantize: Quantize = "none",
    tokenizer: Any = None,
) -> BaseModel:  # fmt: skip
    """Load a base in float32 and eval mode, with a fresh, seeded head where there are settings for one.

    Args:
        quantize: keep the linears of its layers in 8 or 4 bits.
        tokenizer: one with more tokens than its own, for which the embeddings are made longer.

    Raises:
        SourceError: weights that cannot be read, or that are mostly not there.
    """
    import transformers
    from accelerate import PartialState

    is_longer = tokenizer is not None
    tokenizer = tokenizer or load_tokenizer(source)
    torch.manual_seed(seed)
    try:
        model, info = getattr(transformers, auto_class).from_pretrained(
            source.location,
            trust_remote_code=False,  # unsaid, it is asked for on a terminal
            dtype=torch.float32,
            ignore_mismatched_sizes=bool(head_settings),
            output_loading_info=True,
            **head_settings,
            **_quantization_settings(quantize),
        )
    except Exception as error:  # safetensors, torch and transformers each raise their own
        raise SourceError(f"{source.name}: its weights cannot be read: {str(error).splitlines()[0]}") from error
    mismatched = {key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]}
    new_modules = _modules_of(sorted({*info["missing_keys"], *mismatched}))
    strange = [name for name in new_modules if name.split(".")[-1] not in (*_HEADS, "pooler", "pre_classifier", "head")]
    if strange:
        raise SourceError(
            f"{source.name}: its weights lack {len(strange)} parts of the model ({strange[0]}, …); "
            "they do not belong to this config.json"
        )
    give_padding(model, tokenizer)
    has_more_tokens = is_longer and make_room_for_tokens(model, len(tokenizer))
    model.requires_grad_(False)
    model.eval()
    if quantize == "none":  # bitsandbytes has put the others in their place
        model.to(PartialState().device)
    keep_float32_products(model)
    return BaseModel(model, tokenizer, source, new_modules, has_more_tokens)


def _quantization_settings(quantize: Quantize) -> dict[str, Any]:
    """Heads stay as they are: they are what is trained."""
    if quantize == "none":
        return {}
    import transformers

    kept = [*_HEADS, "lm_head", "pre_classifier"]
    config = transformers.BitsAndBytesConfig(
        load_in_8bit=quantize == "8bit",
        load_in_4bit=quantize == "4bit",
        llm_int8_skip_modules=kept,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return {"quantization_config": config}


def keep_float32_products(model: Any) -> None:
    """Keep bitsandbytes from multiplying in bfloat16 where a processor can.

    In eval mode its 4-bit layers would lay their weights out anew for that, which fails where a row is no multiple of
    the quantisation's blocks, and scores would depend on the processor.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def count_parameters(model: Any) -> int:
    """Parameters of the model, of which 4-bit ones are packed."""
    counts = ((type(parameter).__name__ == "Params4bit", parameter) for parameter in model.parameters())
    return sum(p.numel() * 2 * p.element_size() if is_packed else p.numel() for is_packed, p in counts)


def check_quantize(quantize: Quantize) -> None:
    """Refuse a quantised base where the package for it is missing.

    Raises:
        StudyError: with what to install.
    """
    if quantize != "none" and find_spec("bitsandbytes") is None:
        raise StudyError(f"quantize: {quantize} needs bitsandbytes, which is missing; pip install 'trimtab[quant]'")


def _modules_of(missing_keys: Sequence[str]) -> list[str]:
    """Names of the head-level modules that hold the missing weights, such as `score`, `bert.pooler`."""
    names: list[str] = []
    for key in missing_keys:
        parts = key.split(".")
        for known in (*_HEADS, "pooler", "pre_classifier", "head"):
            if known in parts:
                name = ".".join(parts[: parts.index(known) + 1])
                break
        else:
            name = ".".join(parts[:-1])
        if name not in names:
            names.append(name)
    return names
