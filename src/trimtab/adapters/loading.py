"""An adapter folder and its base, ready to score, predict and write: checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel, PromptLearningConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import safe_open

from trimtab.adapters.files import check_folder, check_tensors, is_whole_model
from trimtab.data import Row
from trimtab.engine.prepare import prepare_adapted
from trimtab.errors import AdapterError, SourceError
from trimtab.evaluation.evaluate import Scorer, make_scorer
from trimtab.evaluation.unlabelled import SAY, Record, row_without_label
from trimtab.generation import Sampling, continue_prompts, write_answers
from trimtab.methods import WholeModel
from trimtab.models import load_base, load_config
from trimtab.progress import Progress, Silent
from trimtab.sources import ModelSource, fingerprint_model, locate_model
from trimtab.study_config import Quantize
from trimtab.tasks import get_task
from trimtab.tasks.causal_lm import CausalLM, encode_prompt
from trimtab.tasks.examples import Example

# peft's names of tasks, where another program saved the adapter.
_TASKS = {"SEQ_CLS": "classification", "TOKEN_CLS": "token_classification", "CAUSAL_LM": "causal_lm",
          "SEQ_2_SEQ_LM": "seq2seq"}  # fmt: skip
_HEAD_WEIGHTS = (".score.weight", "classifier.weight", "out_proj.weight")
_DEFAULT_LENGTH_TOKENS = 256


@dataclass
class LoadedAdapter:
    """A base with an adapter around it, in eval mode; `facts` are what was written down when it was saved."""

    path: Path
    facts: dict[str, Any]
    scorer: Scorer
    peft_model: Any

    @property
    def label_names(self) -> list[str]:
        names: list[str] = self.facts["label_names"]
        return names

    @property
    def is_whole_model(self) -> bool:
        return isinstance(self.peft_model, WholeModel)

    @property
    def predicts(self) -> bool:
        """Whether it says something of each row; a causal language model only writes on."""
        return self.scorer.task.name in SAY or self.scorer.task.writes_answers

    def predict(self, texts: Sequence[str]) -> list[Record]:
        """`prediction` of each text, and `probabilities` where the task has some.

        Raises:
            DataError: an empty text.
        """
        name = self.scorer.task.name
        return self.predict_rows([row_without_label(name, {"text": text}, f"text {number}", None, None)
                                  for number, text in enumerate(texts, 1)])  # fmt: skip

    def predict_rows(self, rows: Sequence[Row]) -> list[Record]:
        """The same for rows whose labels are never read."""
        encoded = self.scorer.encode(rows)
        if not self.scorer.task.writes_answers:
            return SAY[self.scorer.task.name](self.scorer.score(encoded).outputs, encoded, rows, self.label_names)
        sampling = Sampling(self.facts.get("max_new_tokens", self.scorer.max_length_tokens))
        tokenizer = self.scorer.base.tokenizer
        written = write_answers(self.peft_model, tokenizer, encoded.examples, sampling, Silent())
        return [{"prediction": text} for text in written]

    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling | None = None,
        *,
        is_chat: bool | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """What it writes after each prompt, in one batch, or answers to each source.

        Args:
            is_chat: put each prompt into the tokenizer's chat template as the user's turn; if None, where the
                adapter was trained on chats.
            on_text: hears the text of a lone prompt while it is written.

        Raises:
            AdapterError: an adapter that says labels, or a tokenizer without a chat template.
        """
        task, tokenizer, chosen = self.scorer.task, self.scorer.base.tokenizer, sampling or Sampling()
        if task.writes_answers:
            sources = [Example(tokenizer(text)["input_ids"][: self.scorer.max_length_tokens], None, [], [])
                       for text in prompts]  # fmt: skip
            return write_answers(self.peft_model, tokenizer, sources, chosen, Silent(), on_text)
        if not isinstance(task, CausalLM):
            raise AdapterError(f"{self.path} is a {task.name} adapter, which says labels and writes nothing")
        in_chat = bool(self.facts.get("is_chat")) if is_chat is None else is_chat
        if in_chat and not tokenizer.chat_template:
            raise AdapterError(f"{self.path}: its tokenizer has no chat template; give plain prompts")
        ids = [encode_prompt(tokenizer, text, in_chat) for text in prompts]
        return continue_prompts(self.peft_model, tokenizer, ids, chosen, on_text)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, for as long as this lasts; its head is the one that it came with.

        Raises:
            AdapterError: a fully tuned model, whose base is gone.
        """
        if self.is_whole_model:
            raise AdapterError(f"{self.path} is a whole model, without a base to go back to")
        with self.peft_model.disable_adapter():
            yield


def load_adapter(
    path: str | Path, base: str | None = None, *, quantize: Quantize | None = None, progress: Progress | None = None
) -> LoadedAdapter:
    """Load an adapter folder and the base that it was trained on, as a stranger would.

    Args:
        path: a folder that Trimtab saved, or any of peft's.
        base: where the base is, if not where it was: a folder, a Hub id, or starter:NAME.
        quantize: hold the base in 8 or 4 bits; as it was trained, if missing.

    Raises:
        AdapterError: damaged or strange files; nothing was loaded.
        SourceError: the base cannot be had, or is another one.
    """
    folder, listener = Path(path).expanduser(), progress or Silent()
    facts = check_folder(folder)
    if facts:
        source = _locate_base(folder, facts, base, listener)
    else:
        source, facts = _guess_facts(folder, base, listener)
    task = get_task(facts["task"], facts.get("beta", 0.1))
    head = task.head_settings(facts["label_names"])
    bits = "none" if is_whole_model(folder) else quantize or facts.get("quantize", "none")
    model = load_base(source, task.auto_class, head, facts.get("seed", 0), bits)
    scorer = make_scorer(task, model, facts["max_length_tokens"], listener, facts.get("virtual_tokens", 0))
    if is_whole_model(folder):
        return LoadedAdapter(folder, facts, scorer, WholeModel(model.model).eval())
    peft_model = PeftModel.from_pretrained(model.model, str(folder))
    _check_tensors(peft_model, folder)
    scorer.choice = prepare_adapted(peft_model, scorer.choice)
    peft_model.eval()
    return LoadedAdapter(folder, facts, scorer, peft_model)


def _locate_base(folder: Path, facts: Mapping[str, Any], base: str | None, progress: Progress) -> ModelSource:
    if is_whole_model(folder):
        return ModelSource(facts["base"], str(folder), True)
    name = base or facts["base"]
    source = locate_model(name, progress)
    found = fingerprint_model(source)
    if found != facts["base_sha256"]:
        raise SourceError(
            f"{name} is not the base of {folder}: its weights have SHA-256 {found[:12]}…, "
            f"the adapter was trained on {facts['base_sha256'][:12]}…; give the base it was trained on"
        )
    return source


def _guess_facts(folder: Path, base: str | None, progress: Progress) -> tuple[ModelSource, dict[str, Any]]:
    """What peft's own files tell of an adapter that another program saved; says what cannot be checked."""
    if is_whole_model(folder):
        raise AdapterError(f"{folder} holds a whole model and no {CONFIG_NAME}; transformers loads it as it is")
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    name, task = base or config.get("base_model_name_or_path"), _TASKS.get(config.get("task_type") or "")
    if not name:
        raise AdapterError(f"{folder / CONFIG_NAME} names no base model; give it (base)")
    if task is None:
        raise AdapterError(f"{folder}: its task_type {config.get('task_type')!r} is none of: {', '.join(_TASKS)}")
    progress.note(
        f"{folder} was not saved by Trimtab: whether {name} is its base and its files are whole cannot be checked"
    )
    source = locate_model(name, progress)
    names = _label_names(folder, source) if task in ("classification", "token_classification") else []
    facts = {"base": name, "task": task, "label_names": names, "max_length_tokens": _DEFAULT_LENGTH_TOKENS,
             "virtual_tokens": config.get("num_virtual_tokens") or 0}  # fmt: skip
    return source, facts


def _label_names(folder: Path, source: ModelSource) -> list[str]:
    """The base's own names, if the saved head has as many rows; else numbers."""
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as saved:
        names = list(saved.keys())
        heads = [name for name in names if name.endswith(_HEAD_WEIGHTS)]
        if not heads:
            raise AdapterError(f"{folder / SAFETENSORS_WEIGHTS_NAME} holds no head, so its labels are not known")
        rows = saved.get_slice(heads[-1]).get_shape()[0]
    known = load_config(source).id2label or {}
    return (
        [str(known[number]) for number in sorted(known)] if len(known) == rows else [f"LABEL_{n}" for n in range(rows)]
    )


def _check_tensors(peft_model: Any, folder: Path) -> None:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    with safe_open(file, "pt") as saved:
        names = list(saved.keys())
    if isinstance(peft_model.active_peft_config, PromptLearningConfig):
        return  # its one tensor is computed from what is trained
    parameters = (name for name, _ in peft_model.named_parameters())
    check_tensors(names, get_peft_model_state_dict(peft_model), parameters, file)
