"""What a study will take, before any weight is read: parameters, adapter size, memory by part, disk and time.

Parameters are exact: the adapter is put around the model on the meta device. Memory is a sum of what is
known to be held; time follows from this machine's GEMM rates and from constants measured on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import psutil
from peft.utils import get_peft_model_state_dict

from trimtab.adapters.files import saves_embeddings
from trimtab.adapters.merged import is_narrow
from trimtab.engine.batches import Collator
from trimtab.engine.fused import native
from trimtab.engine.fused.stack import build_stack
from trimtab.engine.memory import give_back_freed_memory
from trimtab.engine.rates import Product, measure_elementwise_seconds, measure_rate
from trimtab.errors import MethodError
from trimtab.job import Job
from trimtab.methods import WholeModel, check_method, get_method, learning_rate_of, virtual_tokens_of
from trimtab.methods.targets import find_layers, is_linear
from trimtab.models import build_without_weights, find_new_modules
from trimtab.sources import ModelSource, weight_files
from trimtab.study_config import StudyConfig
from trimtab.tasks.examples import EncodedRows
from trimtab.tasks.heads import backbone_of
from trimtab.tasks.token_loss import chunk_positions

# What a token takes in a layer beside the products, in sigmoids a hidden unit (fitted to benchmarks/studies.py).
_TRAIN_OVERHEAD, _SCORE_OVERHEAD = 53.0, 16.0
# How much slower other paths are than fused layers, in what is not products: peft's own layers; padding.
_SLOWER = {"fused": 1.0, "packed": 2.2, "padded": 7.0}
# How much more transformers' and peft's own layers keep of a token than fused ones.
_KEPT = {"fused": 1.0, "packed": 2.7, "padded": 1.4}
# Passes over logits that a loss takes, in sigmoids.
_LOSS_PASSES = 3.0
# Starting a process and loading the libraries; loading and probing a base, a byte; fitting a probe.
_START_SECONDS, _LOAD_SECONDS_PER_BYTE, _FIT_SECONDS = 9.0, 6e-9, 4.0
# Tokens of the batch on which int8 is measured.
_MEASURED_TOKENS = 256
# Bytes a parameter of the layers' linears; 4 bits with their scales.
_BYTES = {"none": 4.0, "8bit": 1.0, "4bit": 0.55}
# Seconds and bytes of TF-IDF with its regression, a training token and a column: words and pairs, at several strengths.
_TEXT_SECONDS, _TEXT_BYTES = 2e-5, 70
# The interval that time is given with.
_FACTOR = 1.5


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds; `memory_bytes` by part adds up to `peak_memory_bytes`."""

    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    memory_bytes: dict[str, int]
    peak_memory_bytes: int
    disk_bytes: int
    seconds: dict[str, float]
    total_seconds: float
    low_seconds: float
    high_seconds: float
    train_tokens: int
    learning_rate: float
    forward: str


@dataclass(frozen=True)
class _Sizes:
    """Of the model and the method that is to be trained."""

    layers: int
    trained_layers: int
    hidden: int
    inner: int
    linear: int  # parameters in the layers' linears
    vocabulary: int
    readout: int  # parameters of a language model's head; 0 where the task has a head of its own


class _Texts(NamedTuple):
    """Tokens of the training rows: of all, and of the first and the longest that stay in one batch."""

    tokens: int
    first: int
    longest: int


def estimate_job(job: Job) -> Estimate:
    """The estimate of a checked study.

    Raises:
        MethodError: a method whose parameters depend on the values of the base's weights.
    """
    study, task = job.study, job.task
    head = task.head_settings(job.data.label_names)
    build = partial(build_without_weights, job.source, task.auto_class, head)
    model = build()
    first = [model]  # the stack is asked for the adapters that come around this one
    new_modules = find_new_modules(job.source, model)
    stack = build_stack(backbone_of(model), native) if native.is_available() and study.quantize == "none" else None
    head_only = get_method(study.method).trains_head_only
    sizes = _sizes_of(model, [] if head_only else find_layers(model, study.layers_to_transform), task.has_probe)
    peft_model = check_method(lambda: first.pop() if first else build(), study, new_modules)
    if peft_model is None:
        raise MethodError(
            f"{study.method} starts from the base's weights, so its parameters cannot be counted before they are read; "
            "trimtab run works all the same"
        )
    trainable, total = peft_model.get_nb_trainable_parameters()
    forward = "padded" if virtual_tokens_of(study) else "fused" if stack is not None and stack.fits() else "packed"

    encoded = job.encoded
    tokens = {split: getattr(encoded, split).tokens for split in ("train", "validation", "test")}
    adapter_bytes = 4 * (total if isinstance(peft_model, WholeModel) else _saved_parameters(peft_model, new_modules))
    trains_tokens = _trains_tokens(peft_model)
    # Whether a language model's head goes through the kernels in training.
    reads_out = stack is not None and forward != "padded" and not trains_tokens and study.method != "full"
    memory = _memory(job, sizes, trainable, total, reads_out, forward, _measure_texts(encoded.train))
    if trains_tokens:  # peft writes them into a copy of all embeddings, whose gradient is as large
        memory["activations"] += 8 * sizes.vocabulary * sizes.hidden
    seconds = _seconds(job, sizes, tokens, total, stack is not None, forward)
    whole = sum(seconds.values())
    return Estimate(
        trainable_parameters=trainable,
        total_parameters=total,
        adapter_bytes=adapter_bytes,
        memory_bytes=memory,
        peak_memory_bytes=sum(memory.values()),
        disk_bytes=adapter_bytes + 3_000_000 + 400 * len(job.data.test) * 6,  # tokenizer, report; predictions
        seconds=seconds,
        total_seconds=whole,
        low_seconds=whole / _FACTOR,
        high_seconds=whole * _FACTOR,
        train_tokens=round(tokens["train"] * study.num_train_epochs),
        learning_rate=learning_rate_of(study, model),
        forward=forward,
    )


def describe(estimate: Estimate) -> dict[str, Any]:
    """As it is kept in the run folder."""
    return asdict(estimate)


def _sizes_of(model: Any, layers: list[int] | None, has_probe: bool) -> _Sizes:
    config = model.config.get_text_config()
    linears = [module for module in backbone_of(model).modules() if is_linear(module)]
    inner = max(max(module.weight.shape) for module in linears)
    count = config.num_hidden_layers
    trained = count if layers is None else count - layers[0] if layers else 0
    linear = sum(module.weight.numel() for module in linears)
    readout = 0 if has_probe else config.vocab_size * config.hidden_size
    return _Sizes(count, trained, config.hidden_size, inner, linear, config.vocab_size, readout)


def _saved_parameters(peft_model: Any, new_modules: Sequence[str]) -> int:
    """Numbers of four bytes that `save_adapter` will write."""
    config = peft_model.active_peft_config
    # Methods without `modules_to_save` get the head added to their file.
    marks = ["modules_to_save"] if hasattr(config, "modules_to_save") else [f".{name}." for name in new_modules]
    heads = sum(value.numel() for name, value in peft_model.named_parameters() if any(mark in name for mark in marks))
    if config.is_prompt_learning:
        a_token: int = config.token_dim * (2 * config.num_layers if config.peft_type == "PREFIX_TUNING" else 1)
        return int(heads + config.num_virtual_tokens * a_token)
    embeddings = saves_embeddings(peft_model, config, has_more_tokens=False)
    saved = get_peft_model_state_dict(peft_model, save_embedding_layers=embeddings).items()
    held = sum(value.numel() for name, value in saved if not any(f".{module}." in name for module in new_modules))
    if config.peft_type == "SHIRA":  # with each number its row and its column
        held *= 3
    if str(getattr(config, "init_lora_weights", "")).startswith("pissa"):  # saved as LoRA of twice its rank
        held *= 2
    return int(heads + held)


def _trains_tokens(peft_model: Any) -> bool:
    config = getattr(peft_model, "active_peft_config", None)
    return (
        bool(getattr(config, "trainable_token_indices", None)) or getattr(config, "peft_type", "") == "TRAINABLE_TOKENS"
    )


def _measure_texts(encoded: EncodedRows) -> _Texts:
    lengths = Collator(encoded.examples, True, 0, 0, encoded.together).lengths
    return _Texts(encoded.tokens, lengths[0], max(lengths))


def _memory(
    job: Job, sizes: _Sizes, trainable: int, total: int, reads_out: bool, forward: str, train: _Texts
) -> dict[str, int]:
    study = job.study
    budget = study.tokens_per_batch // study.gradient_accumulation_steps
    tokens = min(max(budget, train.longest), train.tokens) + virtual_tokens_of(study) * 16
    # What a layer keeps of a token for its backward, in floats.
    kept = 9 * sizes.hidden + 3 * sizes.inner
    per_token = 4 * kept * sizes.trained_layers * _KEPT[forward]
    linear = _BYTES[study.quantize] * sizes.linear
    copies, batch = 0.0, per_token * tokens
    if forward == "fused":
        # Pages of mapped weights go back, but those of a language model are read again to write its samples.
        goes_back = _is_mapped(job.source) and job.task.has_probe
        linear, copies = 0.0 if goes_back else linear, 4.0 * (sizes.linear + sizes.readout)
        if _computes_in_int8(study):  # measured beside float32 on a few rows; then trained without that
            several = max(min(_MEASURED_TOKENS, train.tokens), train.first)  # one text or block, at least
            kept_then = 4 * several * (sizes.hidden * sizes.trained_layers + kept)  # with layers checkpointed
            measured = 4.0 * (sizes.linear + sizes.readout), kept_then
            trained = 2.0 * (sizes.linear + sizes.readout), batch
            copies, batch = max(measured, trained, key=sum)
    elif reads_out and forward == "packed":
        copies = 4.0 * sizes.readout
    # Logits of a chunk; beside kernels of ours probabilities, too.
    rooms = (1 if reads_out else 2) if sizes.readout else 0
    vocabulary = 4 * rooms * chunk_positions(sizes.vocabulary) * sizes.vocabulary
    vectors = _TEXT_BYTES * train.tokens * _text_columns(job)
    give_back_freed_memory()  # what reading the data has left
    return {
        "libraries and data": int(psutil.Process().memory_info().rss),
        "text baseline": int(vectors),
        "base weights": int(4 * (total - sizes.linear) + linear),
        "weights laid out for the kernels": int(copies),
        "gradients, moments and best adapter": 16 * trainable,
        "activations": int(batch + vocabulary),
    }


def _computes_in_int8(study: StudyConfig) -> bool:
    is_frozen = study.quantize == "none" and study.method != "full"
    return is_frozen and study.precision in ("int8", "auto") and native.has_int8()


def _scoring_product(study: StudyConfig) -> Product:
    return "float32" if study.quantize == "none" else study.quantize


def _is_mapped(source: ModelSource) -> bool:
    """Whether weights are mapped from their files, so that pages go back once they are laid out elsewhere."""
    files = weight_files(source, fetch=False)
    is_plain = bool(files) and all(file.suffix == ".safetensors" for file in files) and not is_narrow(files)
    return is_plain and sys.platform == "linux"


def _text_columns(job: Job) -> int:
    """Columns that a model of the words is fitted to; none where no such model is a baseline."""
    if job.task.name not in ("classification", "multilabel", "regression"):
        return 0
    labels = len(job.data.label_names)
    return 1 if labels <= 2 and job.task.name != "multilabel" else labels


def _seconds(
    job: Job, sizes: _Sizes, tokens: dict[str, int], total: int, has_stack: bool, forward: str
) -> dict[str, float]:
    study = job.study
    stock = measure_rate("stock")
    real = stock if study.quantize == "none" and not has_stack else measure_rate(_scoring_product(study))
    adapted = stock if study.quantize == "none" and forward != "fused" else real  # with layers of peft's around them
    whole = max(adapted, measure_rate("int8")) if _computes_in_int8(study) else adapted
    value = measure_elementwise_seconds()
    units = sizes.layers * sizes.hidden * value
    scoring_path = "fused" if has_stack else "packed"
    losses = _LOSS_PASSES * value * (sizes.vocabulary if sizes.readout else 0)

    def read_out(rate: float) -> float:
        """Seconds a token of a language model's head, in one direction."""
        return 2e-9 * sizes.readout / (rate if has_stack else stock)

    def score(rate: float, path: str) -> float:
        """Seconds a token."""
        return 2e-9 * sizes.linear / rate + read_out(rate) + losses + _SCORE_OVERHEAD * units * _SLOWER[path]

    backward = sizes.trained_layers / sizes.layers
    # A weight that is trained takes a product more, for its own gradient.
    products_a_step = 1 + backward * (2 if study.method == "full" else 1)
    products = 2e-9 * sizes.linear / whole * products_a_step + 2 * read_out(whole)
    step = products + losses + _TRAIN_OVERHEAD * units * _SLOWER[forward]
    validations = study.num_train_epochs * study.evaluations_per_epoch + 1
    probed = 0
    if job.task.has_probe:
        probed = sum(split.tokens for split in job.encoded.probed(study.max_probe_positions))
    load = _LOAD_SECONDS_PER_BYTE * 4 * total
    fit = _FIT_SECONDS if job.task.has_probe else 0.0
    again = 0.0 if get_method(study.method).starts_at_base else probed * score(whole, forward)
    trained = tokens["train"] * study.num_train_epochs * step + tokens["validation"] * validations * score(
        whole, forward
    )
    scored = 1 if study.precision == "float32" else 2  # after its reload, in the training precision, too
    return {
        "load base": load,
        "text baselines": _TEXT_SECONDS * tokens["train"] * _text_columns(job),
        "base and baselines": tokens["test"] * score(real, scoring_path)
        + probed * score(max(real, whole), scoring_path) + fit,
        "tune": again + trained + tokens["test"] * score(adapted, forward),
        "reload and evaluate": _START_SECONDS + load + tokens["test"] * score(adapted, forward) * scored,
    }  # fmt: skip
