"""Which method works on which task and family: tried on tiny models of the installed versions, and remembered."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.cache import cache_folder
from trimtab.engine.batches import Collator
from trimtab.engine.forward import choose_forward
from trimtab.engine.frozen import set_adapter_training, trainable_parameters
from trimtab.engine.prepare import prepare_adapted
from trimtab.errors import DataError, MethodError, StudyError
from trimtab.machine import package_versions
from trimtab.methods import METHODS, attach_adapter, get_method
from trimtab.models import has_model_for
from trimtab.progress import Progress
from trimtab.runs import read_json, write_json
from trimtab.study_config import StudyConfig, build_study
from trimtab.tasks import TASKS, Task, get_task
from trimtab.tasks.examples import EncodedRows, Example
from trimtab.tasks.heads import pools_last_token

_VOCABULARY = 96
_SIZES = {"vocab_size": _VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
          "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
_DECODER = _SIZES | {"num_key_value_heads": 2}

# A tiny config of each family: transformers' class, and its own names for the sizes.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("BertConfig", _SIZES),
    "RoBERTa": ("RobertaConfig", _SIZES),
    "DistilBERT": ("DistilBertConfig", {"vocab_size": _VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2,
                                        "n_heads": 4, "max_position_embeddings": 64}),
    "GPT-2": ("GPT2Config", {"vocab_size": _VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "Llama": ("LlamaConfig", _DECODER),
    "Qwen2": ("Qwen2Config", _DECODER),
    "Mistral": ("MistralConfig", _DECODER),
    "T5": ("T5Config", {"vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
                        "num_heads": 4, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}),
}  # fmt: skip

# Sizes that fit layers of 32.
_SMALL = {"num_virtual_tokens": 4, "token_indices": [5, 6, 7], "adapter_len": 4}


@dataclass(frozen=True)
class Support:
    """Whether a method can be trained on a task with a family, and why where not."""

    method: str
    task: str
    family: str
    works: bool
    reason: str = ""


def probe_all(progress: Progress, tasks: Sequence[str] = tuple(TASKS), *, refresh: bool = False) -> list[Support]:
    """Every method of the table on `tasks` and every family; what the installed versions were found to do is kept."""
    versions, file = package_versions(), cache_folder() / "methods.json"
    kept = {} if refresh else _read_kept(file, versions)
    wanted = [(method, task, family) for task in tasks for method in METHODS for family in FAMILIES]
    missing = [combination for combination in wanted if combination not in kept]
    if missing:
        progress.stage("Trying every method on tiny models")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number, combination in enumerate(missing, 1):
                kept[combination] = probe(*combination)
                progress.advance(number, len(missing), "combinations")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"versions": versions, "rows": [list(asdict(row).values()) for row in kept.values()]})
    return [kept[combination] for combination in wanted]


def _read_kept(file: Path, versions: dict[str, str]) -> dict[tuple[str, str, str], Support]:
    """What was found before, if by these versions; nothing where the file is cut off."""
    try:
        kept = read_json(file) if file.is_file() else {}
    except DataError:
        return {}
    rows = [Support(*row) for row in kept["rows"]] if kept.get("versions") == versions else []
    return {(row.method, row.task, row.family): row for row in rows}


def probe(method: str, task_name: str, family: str) -> Support:
    """Attach, and train two steps: the loss has to be finite and every trained parameter has to get a gradient."""
    task = get_task(task_name)
    try:
        model = build_tiny_model(task, family)
    except ValueError as error:
        return Support(method, task_name, family, False, str(error))
    try:
        train_two_steps(model, task, small_study(method, task_name))
    except MethodError as error:
        return Support(method, task_name, family, False, str(error).partition(": ")[2])
    except (StudyError, RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        return Support(method, task_name, family, False, f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
    return Support(method, task_name, family, True)


def small_study(method: str, task_name: str) -> StudyConfig:
    """A study of the method whose options suit layers of 32."""
    import dataclasses

    from trimtab.methods.attach import config_class_of

    row = get_method(method)
    fields = {part.name for part in dataclasses.fields(config_class_of(row))} if row.is_adapter else set()
    options = {name: value for name, value in _SMALL.items() if name in fields}
    return build_study({"method": method, "task": task_name, "method_options": options})


def build_tiny_model(task: Task, family: str, seed: int = 0) -> Any:
    """A seeded model of two layers, in eval mode.

    Raises:
        ValueError: transformers has no such model for the task.
    """
    import transformers

    name, sizes = FAMILIES[family]
    config = getattr(transformers, name)(**sizes)
    if not has_model_for(config, task.auto_class):
        only = " (an encoder with decoder: seq2seq only)" if config.is_encoder_decoder else ""
        raise ValueError(f"{family} has no model for {task.name} here{only}")
    torch.manual_seed(seed)
    config.num_labels = 1 if task.name == "regression" else 3
    return getattr(transformers, task.auto_class).from_config(config).requires_grad_(False).eval()


def head_names(model: Any) -> list[str]:
    """Modules of a fresh head."""
    return [name for name, _ in model.named_children() if name in ("score", "classifier", "pre_classifier")]


def make_rows(task: Task, model: Any, lengths: Iterable[int] = (9, 5, 9, 12)) -> EncodedRows:
    """Random texts with something to learn at each position that the task reads."""
    generator = torch.Generator().manual_seed(1)
    make = _EXAMPLES[task.name]
    examples = [make(torch.randint(3, _VOCABULARY, (length,), generator=generator).tolist(), number, model)
                for number, length in enumerate(lengths)]  # fmt: skip
    together = 2 if task.name == "preference" else 1
    return EncodedRows(examples, [number // together for number in range(len(examples))], 0, together)


_EXAMPLES: dict[str, Callable[[list[int], int, Any], Example]] = {
    "classification": lambda ids, number, model: Example(
        ids, None, [len(ids) - 1 if pools_last_token(model) else 0], [number % 3]
    ),
    "multilabel": lambda ids, number, model: Example(
        ids, None, [len(ids) - 1 if pools_last_token(model) else 0], [[1.0, float(number % 2), 0.0]]
    ),
    "regression": lambda ids, number, model: Example(
        ids, None, [len(ids) - 1 if pools_last_token(model) else 0], [number * 1.5]
    ),
    "token_classification": lambda ids, number, model: Example(
        ids, None, list(range(0, len(ids), 2)), [token % 3 for token in ids[::2]]
    ),
    "causal_lm": lambda ids, number, model: Example(ids, None, list(range(len(ids) - 1)), ids[1:]),
    "preference": lambda ids, number, model: Example(ids, None, list(range(2, len(ids) - 1)), ids[3:], reference=-20.0),
    "seq2seq": lambda ids, number, model: Example(ids, None, list(range(len(ids) - 2)), ids[2:], [0, *ids[2:-1]]),
}


def train_two_steps(model: Any, task: Task, study: StudyConfig) -> None:
    """Attach the study's method to `model` and train it on four texts.

    Raises:
        MethodError, or what peft and torch raise; ValueError where the loss is not finite or a gradient missing.
    """
    choice = choose_forward(model, 0, 16, False)
    peft_model = attach_adapter(model, study, head_names(model) if task.has_probe else [])
    choice = prepare_adapted(peft_model, choice)
    set_adapter_training(peft_model, True)
    parameters = trainable_parameters(peft_model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    rows = make_rows(task, model)
    collator = Collator(rows.examples, choice.forward.packed, choice.position_offset, 0, rows.together)
    for _ in range(2):  # in the first some gradients are zero where the other factor is
        optimizer.zero_grad()
        loss = task.loss(choice.forward, collator.collate(range(len(collator.lengths))))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    if not torch.isfinite(loss):
        raise ValueError("the loss is not finite")
    without = [name for name, parameter in parameters.items() if parameter.grad is None]
    if without:
        raise ValueError(f"no gradient reaches {without[0]}")
