"""One trial: attach the adapter, start its head at the linear probe, train, save.

The loop itself is in `engine.loop`; here its parts are chosen from the study.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from trimtab.adapters import save_adapter, save_logits, save_start
from trimtab.cache import cache_folder
from trimtab.engine.batches import Batch, TrainingPlan
from trimtab.engine.checkpointing import checkpoint_layers, kept_bytes, should_checkpoint
from trimtab.engine.forward import PackedForward
from trimtab.engine.frozen import NumberFormat, set_adapter_training, trainable_parameters
from trimtab.engine.fused import native
from trimtab.engine.fused.prefix_cache import CacheInUseError, PrefixCache, make_room
from trimtab.engine.loop import Ending, LoopSettings, make_state, train
from trimtab.engine.memory import give_back_freed_memory, give_back_mapped_pages, keep_freed_memory
from trimtab.engine.prepare import prepare_adapted
from trimtab.engine.state import TrainingState
from trimtab.errors import StorageError, TrainingError
from trimtab.evaluation.baselines import LinearProbe
from trimtab.evaluation.evaluate import Scorer, fit_probe, peak_memory_bytes
from trimtab.job import EncodedSplits
from trimtab.machine import package_versions
from trimtab.methods import (
    attach_adapter,
    find_layers,
    get_method,
    learning_rate_of,
    make_schedule,
    start_prefix,
    virtual_tokens_of,
)
from trimtab.precision import describe_precision, use_float32, use_precision
from trimtab.progress import Progress
from trimtab.runs import TrialFolder, write_json, write_jsonl
from trimtab.study_config import StudyConfig
from trimtab.tasks.examples import EncodedRows
from trimtab.tasks.heads import backbone_of, final_linear
from trimtab.tasks.preference import Preference, log_probabilities, refer_to

# Chosen by trying on two models (docs/decisions.md, 96).
_HEAD_TEMPERATURE = 5.0


def tune(
    study: StudyConfig,
    scorer: Scorer,
    data: EncodedSplits,
    probe: LinearProbe | None,
    precision: NumberFormat,
    trial: TrialFolder,
    facts: dict[str, Any],
    progress: Progress,
) -> None:
    """Train one adapter on the scorer's base; its folder then holds all but the reloaded scores.

    Raises:
        TrainingError: the loss was no longer finite; the last good adapter is in the folder.
    """
    method = get_method(study.method)
    progress.stage(f"Tuning with {method.title}, seed {study.seed}")
    torch.manual_seed(study.seed)
    peft_model = start_adapter(study, scorer, data, probe, trial, progress)
    trainable, total = _tell_parameters(peft_model, progress)

    plan = _make_plan(study, scorer, data.train)
    schedule = make_schedule(method, peft_model, len(plan))
    rates = method.rates or (lambda name: 1.0)
    state = make_state(trainable_parameters(peft_model), study.weight_decay, rates, schedule)
    checkpointing = choose_checkpointing(study, scorer, data.train, plan, progress)
    errors = use_precision(
        precision, scorer.task, scorer.choice.forward, scorer.first_batch(data.train), progress, training=True
    )
    if errors and isinstance(scorer.task, Preference):
        set_adapter_training(peft_model, False)
        with peft_model.disable_adapter():  # rounding makes texts less likely, so both models have to round alike
            data = refer_splits(scorer, data, progress)
        plan = _make_plan(study, scorer, data.train)
    free_memory(peft_model)
    ending = run_loop(study, scorer, peft_model, state, plan, data.validation, progress)
    set_adapter_training(peft_model, False)
    use_float32(scorer.choice.forward)
    if schedule is not None:
        schedule.finish()

    adapter_bytes = save_adapter(peft_model, scorer.base, trial, facts)
    write_jsonl(trial.history, state.history)
    write_json(
        trial.training,
        describe_training(study, scorer, peft_model, state, plan, ending, facts)
        | ({"gradient_checkpointing": "on"} if checkpointing else {})
        | describe_precision(precision, errors)
        | {"cost": _training_cost(state, trainable, total, adapter_bytes)},
    )
    if ending == "not_finite":
        raise TrainingError(
            f"the loss was no longer finite at step {state.step + 1} of {len(plan)}; the state of step "
            f"{state.best_step}, the best on validation, is kept in {trial.adapter}; "
            f"lower --learning-rate (it was {learning_rate_of(study, peft_model):g}) "
            "and use another --out, or --overwrite"
        )
    progress.stage("Scoring what was trained, to be held against its reload")
    save_logits(trial.trained_logits, scorer.score(data.test, progress).outputs)


def _make_plan(study: StudyConfig, scorer: Scorer, train: EncodedRows) -> TrainingPlan:
    return TrainingPlan(
        scorer.collator(train), study.tokens_per_batch, study.seed, study.num_train_epochs,
        study.gradient_accumulation_steps,
    )  # fmt: skip


def refer_splits(scorer: Scorer, data: EncodedSplits, progress: Progress) -> EncodedSplits:
    """What is learnt and validated on, with the log-probabilities that the base, without adapter, gives it as it is."""
    progress.stage("Scoring the base: train and validation (the reference of the preferences)")

    def refer(rows: EncodedRows) -> EncodedRows:
        return refer_to(rows, log_probabilities(scorer.score(rows, progress).outputs, rows))

    return replace(data, train=refer(data.train), validation=refer(data.validation))


def free_memory(peft_model: Any) -> None:
    """Give back what scoring and measuring left, and frozen weights that are laid out elsewhere, before the steps."""
    give_back_freed_memory()
    give_back_mapped_pages(*(weight for weight in peft_model.parameters() if not weight.requires_grad))
    keep_freed_memory()


def start_adapter(
    study: StudyConfig,
    scorer: Scorer,
    data: EncodedSplits,
    probe: LinearProbe | None,
    trial: TrialFolder,
    progress: Progress,
) -> Any:
    """The scorer's base with its adapter around it, ready for training, the head at the probe.

    Where the adapter does not start at the base, the probe is fitted anew on what it makes of the texts.
    """
    commonest = Counter(token for example in data.train.examples for token in example.input_ids)
    base = scorer.base
    tokens = [token for token, _ in commonest.most_common()]
    new_ids = base.ids_of(study.added_tokens)
    peft_model = attach_adapter(base.model, study, base.new_modules, tokens, progress, new_ids)
    save_start(peft_model, trial.start)
    scorer.choice = prepare_adapted(peft_model, scorer.choice)
    first_tokens = chain.from_iterable(example.input_ids for example in data.train.examples)
    start_prefix(peft_model, backbone_of(base.model), list(islice(first_tokens, virtual_tokens_of(study))))
    if probe is not None:
        if not get_method(study.method).starts_at_base:
            set_adapter_training(peft_model, False)
            probe = fit_probe(scorer, *data.probed(study.max_probe_positions), study.class_weight, progress)
        start_head_at_probe(base.model, probe)
    return peft_model


def _tell_parameters(peft_model: Any, progress: Progress) -> tuple[int, int]:
    """Trainable parameters, those of a new head included, and all."""
    trainable, total = peft_model.get_nb_trainable_parameters()
    progress.note(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
    return trainable, total


def _training_cost(state: TrainingState, trainable: int, total: int, adapter_bytes: int) -> dict[str, Any]:
    return {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trainable_percent": 100 * trainable / total,
        "adapter_bytes": adapter_bytes,
        "train_seconds": state.seconds,
        "train_tokens": state.tokens,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def choose_checkpointing(
    study: StudyConfig, scorer: Scorer, train: EncodedRows, plan: TrainingPlan, progress: Progress
) -> bool:
    """Checkpoint the layers where the study, or the memory that is free, asks for it; says so."""
    forward = scorer.choice.forward
    if study.gradient_checkpointing == "off":
        return False
    if study.gradient_checkpointing == "auto":
        small = scorer.first_batch(train, tokens=1)
        random_state = torch.get_rng_state()
        size = kept_bytes(lambda: scorer.task.loss(forward, small))
        torch.set_rng_state(random_state)
        if not should_checkpoint(size, small.tokens, plan.largest_tokens):
            return False
    is_on = checkpoint_layers(forward, True)
    progress.note("layers are computed twice to save memory (gradient_checkpointing)" if is_on
                  else "layers keep all that they compute: this model's have no known build to checkpoint")  # fmt: skip
    return is_on


@contextmanager
def cached_prefix(study: StudyConfig, scorer: Scorer, base_sha256: str, progress: Progress) -> Iterator[None]:
    """Keep the states below the lowest adapted layer for as long as this lasts, and on disk for the next run."""
    layers = find_layers(scorer.base.model, study.layers_to_transform)
    stack = scorer.choice.forward.stack if isinstance(scorer.choice.forward, PackedForward) else None
    budget = int(study.cache_budget_gib * (1 << 30))
    if stack is None or not layers or not layers[0] or not budget:
        yield
        return
    root = cache_folder() / "prefix"
    config = {name: value for name, value in scorer.base.model.config.to_dict().items() if "label" not in name}
    needs = [base_sha256, config, layers[0], scorer.choice.position_offset, native.build_key(), package_versions()]
    folder = root / hashlib.sha256(json.dumps(needs, sort_keys=True, default=str).encode()).hexdigest()[:16]
    try:
        room = make_room(root, folder, budget)
        cache = PrefixCache(folder, layers[0], scorer.base.model.config.hidden_size, room)
    except (CacheInUseError, OSError) as error:
        progress.note(f"states below layer {layers[0]} are not kept: {type(error).__name__} ({error})")
        yield
        return
    stack.cache = cache
    try:
        yield
    finally:
        stack.cache = None
        try:
            cache.close()
        except (OSError, StorageError) as error:
            progress.note(f"states below layer {cache.layer} cannot be kept for the next run: {error}")
        progress.note(
            f"states below layer {cache.layer} were taken from disk for {cache.hits:,} texts, computed for "
            f"{cache.misses:,}; {cache.bytes_used / (1 << 20):,.0f} MiB kept"
        )


def start_head_at_probe(model: Any, probe: LinearProbe) -> None:
    """Set the trained copy of the head's final linear to the probe (LP-FT, Kumar et al. 2022)."""
    head = final_linear(model)
    with torch.no_grad():
        head.weight.copy_(probe.weight)
        if head.bias is not None and probe.bias is not None:
            head.bias.copy_(probe.bias)


def soften_head(model: Any, temperature: float) -> None:
    """Divide the head's logits by `temperature` (Guo et al. 2017): the same labels, less sure.

    A probe is sure of the rows that it was fitted on, which leaves little to learn, and its large weights let small
    changes of the features fit what is left. Of a small output, features have to move (Chizat et al. 2019, "On Lazy
    Training in Differentiable Programming", section 1).
    """
    head = final_linear(model)
    with torch.no_grad():
        head.weight.div_(temperature)
        if head.bias is not None:
            head.bias.div_(temperature)


def run_loop(
    study: StudyConfig,
    scorer: Scorer,
    peft_model: Any,
    state: TrainingState,
    plan: TrainingPlan,
    validation: EncodedRows,
    progress: Progress,
) -> Ending:
    """Hand the study's parts to the loop."""
    device = scorer.base.device
    forward = scorer.choice.forward

    def compute_loss(batch: Batch) -> Tensor:
        return scorer.task.loss(forward, batch.to(device))

    def validate() -> dict[str, float]:
        set_adapter_training(peft_model, False)
        outputs = scorer.score(validation).outputs
        set_adapter_training(peft_model, True)
        figures = scorer.task.summarise(outputs, validation)
        start = " (the linear probe)" if state.step == 0 and scorer.task.has_probe else ""
        told = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if name != "score")
        progress.note(f"step {state.step}/{len(plan)}{start}: validation {told}")
        return figures

    def on_step(state: TrainingState, figures: dict[str, float]) -> None:
        shown = {name: figures[name] for name in ("loss", "tokens_per_second")}
        progress.advance(state.step, len(plan), "steps", **shown)

    def before_first_step() -> None:
        if scorer.task.softens_head and get_method(study.method).softens_head:
            soften_head(scorer.base.model, _HEAD_TEMPERATURE)

    settings = LoopSettings(
        learning_rate=learning_rate_of(study, peft_model),
        warmup_ratio=study.warmup_ratio,
        max_grad_norm=study.max_grad_norm,
        steps_between_validations=math.ceil(plan.steps_per_epoch / study.evaluations_per_epoch),
        early_stopping_patience=study.early_stopping_patience,
    )
    set_adapter_training(peft_model, True)
    return train(state, plan, compute_loss, validate, settings, on_step, before_first_step)


def describe_training(
    study: StudyConfig,
    scorer: Scorer,
    peft_model: Any,
    state: TrainingState,
    plan: TrainingPlan,
    ending: Ending,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """What the report says about how this trial was trained."""
    config = getattr(peft_model, "active_peft_config", None)
    return {
        "title": f"{get_method(study.method).short_title}, tuned",
        "label_names": facts["label_names"],
        "ending": ending,
        "steps": state.step,
        "planned_steps": len(plan),
        "best_step": state.best_step,
        "learning_rate": learning_rate_of(study, peft_model),
        "target_modules": sorted(getattr(config, "target_modules", None) or []),
        "modules_to_save": sorted(set(getattr(config, "modules_to_save", None) or [])),
        "forward": scorer.choice.forward.name,
        "forward_reason": scorer.choice.reason,
    }
