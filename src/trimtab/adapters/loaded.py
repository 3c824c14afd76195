"""A base with adapters around it, at work: predict, generate, switch, combine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from trimtab.adapters.files import check_folder, is_whole_model, write_facts
from trimtab.adapters.merged import check_mergeable, merge_layer
from trimtab.adapters.origin import guess_facts
from trimtab.adapters.switching import (
    attach,
    check_name,
    combine,
    score_mixed,
    set_active,
    wrapped_heads,
)
from trimtab.data import Row
from trimtab.engine.forward import usable_length
from trimtab.engine.lora import can_mix
from trimtab.engine.mixed import mix_of_rows, mixing
from trimtab.engine.prepare import prepare_adapted
from trimtab.errors import AdapterError, suggest
from trimtab.evaluation.evaluate import Scorer
from trimtab.evaluation.unlabelled import SAY, Record, row_without_label
from trimtab.generation import Sampling, continue_prompts, write_answers
from trimtab.methods import WholeModel
from trimtab.progress import Silent
from trimtab.runs import write_folder
from trimtab.sources import locate_adapter
from trimtab.tasks import Task, get_task
from trimtab.tasks.causal_lm import CausalLM, encode_prompt
from trimtab.tasks.examples import EncodedRows, Example


@dataclass(frozen=True)
class KnownAdapter:
    """A loaded adapter: where it came from, and what was written down when it was saved."""

    path: Path
    facts: Mapping[str, Any]
    task: Task
    max_length_tokens: int

    @property
    def classes(self) -> int:
        """Columns of its head; 0 where the base brings its own."""
        return int(self.task.head_settings(self.facts["label_names"]).get("num_labels", 0))


class LoadedAdapter:
    """A base with one adapter around it, or several of which one is active, in eval mode."""

    def __init__(self, name: str, known: KnownAdapter, scorer: Scorer, peft_model: Any) -> None:
        self.known = {name: known}
        self.active = name
        self.scorer = scorer
        self.peft_model = peft_model
        self._undo: list[Callable[[], None]] = []  # gives each merged layer its weights back

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded."""
        return list(self.known)

    @property
    def path(self) -> Path:
        return self.known[self.active].path

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was written down when the active adapter was saved."""
        return self.known[self.active].facts

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

    def load(self, path: str | Path, name: str) -> None:
        """Load one more adapter of the same base, under a name of its own; the active one stays active.

        Raises:
            AdapterError: damaged files, another base, another method, or a name that is taken.
        """
        folder = locate_adapter(path)
        self._check_unmerged()
        check_name(name, self.names)
        if self.is_whole_model or is_whole_model(folder):
            raise AdapterError(f"{folder}: whole models stand alone, each with weights of its own; load it by itself")
        known = self._know(folder)
        try:
            attach(self.peft_model, folder, name, known.classes)
            self.known[name] = known
        finally:
            self._settle()

    def _know(self, folder: Path) -> KnownAdapter:
        facts, mine = check_folder(folder), self.known[self.active]
        if not facts:
            _, facts = guess_facts(folder, mine.facts["base"], Silent())
        task = get_task(facts["task"], facts.get("beta", 0.1))
        if task.auto_class != mine.task.auto_class:
            raise AdapterError(
                f"{folder} is a {task.name} adapter, which needs another kind of head than {mine.task.name}; "
                "load it by itself"
            )
        if facts.get("base_sha256", self._base_sha256) != self._base_sha256:
            raise AdapterError(
                f"{folder} was trained on {facts['base']} with SHA-256 {facts['base_sha256'][:12]}…, and the base "
                f"that is loaded has {(self._base_sha256 or 'none known')[:12]}…; load it by itself"
            )
        reserved = facts.get("virtual_tokens", 0)
        length = usable_length(self.scorer.base.model, facts["max_length_tokens"] + reserved) - reserved
        return KnownAdapter(folder, facts, task, length)

    @property
    def _base_sha256(self) -> str | None:
        return next((known.facts["base_sha256"] for known in self.known.values() if "base_sha256" in known.facts), None)

    def _settle(self) -> None:
        """Fast layers for what is new, and the active adapter for all."""
        self.scorer.choice = prepare_adapted(self.peft_model, self.scorer.choice)
        self.peft_model.eval()
        self.switch(self.active)

    def switch(self, name: str) -> None:
        """Make another of the loaded adapters the active one.

        Raises:
            AdapterError: none is loaded under that name.
        """
        self._check_unmerged()
        self._check_loaded([name])
        if not self.is_whole_model:
            set_active(self.peft_model, name)
        self.scorer, self.active = self._scorer_of(name), name

    def unload(self, name: str) -> None:
        """Forget an adapter; where it was active, the first of the others is from now on.

        Raises:
            AdapterError: none is loaded under that name, or no other.
        """
        self._check_loaded([name])
        others = [other for other in self.names if other != name]
        if not others:
            raise AdapterError(f"{name!r} is the only adapter here; drop the whole object, or load another first")
        self._check_unmerged()
        if name == self.active:
            self.switch(others[0])
        self.peft_model.delete_adapter(name)
        del self.known[name]

    def save(self, folder: Path, **more: Any) -> None:
        """Write the active adapter as a folder of its own, in peft's format, with what is known of it and `more`."""

        def write(target: Path) -> None:
            self.peft_model.save_pretrained(target, selected_adapters=[self.active])
            inside = target / self.active
            if inside.is_dir():  # where peft puts every adapter but the one called default
                for file in inside.iterdir():
                    file.rename(target / file.name)
                inside.rmdir()
            self.scorer.base.tokenizer.save_pretrained(target)
            write_facts(target, {**self.facts, **more})

        write_folder(folder, write)

    def merge(self) -> None:
        """Take the active adapter into copies of the base's weights: one product a layer, until `unmerge`.

        Raises:
            AdapterError: a method that cannot be merged, or a quantised base.
        """
        self._check_unmerged()
        check_mergeable(self.peft_model, self.path)
        if self.facts.get("quantize", "none") != "none":
            raise AdapterError(f"{self.path}: its base is held in fewer bits; trimtab merge takes it in full precision")
        try:
            for layer in self.peft_model.modules():
                if isinstance(layer, BaseTunerLayer):
                    self._undo.append(merge_layer(layer))
        except AdapterError:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Give the base its very weights back, to the bit."""
        while self._undo:
            self._undo.pop()()

    def _check_unmerged(self) -> None:
        if self._undo:
            raise AdapterError(f"{self.active!r} is merged into the base; unmerge it first")

    def _check_loaded(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.known:
                raise AdapterError(f"no adapter {name!r} is loaded{suggest(name, self.names)}; {', '.join(self.names)}")

    def combine(
        self,
        weights: Mapping[str, float],
        name: str,
        combination_type: str = "linear",
        density: float | None = None,
    ) -> None:
        """Add an adapter that is a weighted combination of loaded ones, which say the same labels.

        Args:
            weights: of each adapter, by name.
            combination_type: by peft's names; its heads become the weighted mean of theirs.
            density: the share of each that is kept, for ties, dare and magnitude pruning (Yadav et al. 2023; Yu et
                al. 2024).

        Raises:
            AdapterError: other labels, a method without combinations, or settings that do not fit.
        """
        self._check_unmerged()
        check_name(name, self.names)
        self._check_loaded(list(weights))
        parts = [self.known[part] for part in weights]
        if not parts:
            raise AdapterError("no adapters to combine; give a weight to each of at least one")
        if len({(part.task.name, tuple(part.facts["label_names"])) for part in parts}) > 1:
            raise AdapterError(f"{', '.join(weights)} say other labels or do other tasks, so they cannot be combined")
        if not hasattr(self.peft_model.base_model, "add_weighted_adapter"):
            raise AdapterError(f"{self.path}: peft combines LoRA adapters; this one is {self.peft_model.peft_type}")
        facts = {key: value for key, value in parts[0].facts.items() if key not in ("files", "seed", "score")}
        facts["combined"] = {"weights": dict(weights), "combination_type": combination_type, "density": density}
        try:
            combine(self.peft_model, weights, name, combination_type, density, parts[0].classes)
            self.known[name] = replace(parts[0], facts=facts)
        finally:
            self._settle()

    def predict(self, texts: Sequence[str], adapters: Sequence[str] | None = None) -> list[Record]:
        """`prediction` of each text, and `probabilities` where the task has some.

        Args:
            adapters: the loaded adapter that each text asks for; the active one, if missing. Plain LoRA adapters
                answer in one pass, those of other methods one after the other.

        Raises:
            DataError: an empty text.
            AdapterError: an adapter that is not loaded.
        """
        if adapters is None:
            return self.predict_rows(_rows_of(self.scorer.task, texts))
        if len(adapters) != len(texts):
            raise AdapterError(f"{len(adapters)} adapters for {len(texts)} texts; give one for each")
        self._check_loaded(sorted(set(adapters)))
        places = {name: [place for place, asked in enumerate(adapters) if asked == name] for name in self.known}
        said = self._predict_mixed(texts, {name: mine for name, mine in places.items() if mine})
        return [said[place] for place in range(len(texts))]

    def _predict_mixed(self, texts: Sequence[str], places: Mapping[str, list[int]]) -> dict[int, Record]:
        """What is said at each place, by the adapters that have texts there."""
        rows = {name: _rows_of(self.known[name].task, [texts[place] for place in mine])
                for name, mine in places.items()}  # fmt: skip
        encoded: dict[str, EncodedRows] = {name: self._scorer_of(name).encode(rows[name]) for name in rows}
        outputs = None
        if all(self.known[name].task.name in SAY for name in rows):
            examples = [example for part in encoded.values() for example in part.examples]
            asked = [name for name, part in encoded.items() for _ in part.examples]
            pad = self.scorer.base.tokenizer.pad_token_id
            outputs = score_mixed(self.peft_model, self.scorer.choice, examples, asked, pad)
        said: dict[int, Record] = {}
        start, active = 0, self.active
        for name, mine in places.items():
            if outputs is None:
                self.switch(name)
                records = self.predict_rows(rows[name])
            else:
                together = torch.cat(outputs[start : start + len(mine)])
                known = self.known[name]
                records = SAY[known.task.name](together, encoded[name], rows[name], known.facts["label_names"])
            start += len(mine)
            said |= dict(zip(mine, records, strict=True))
        if self.active != active:
            self.switch(active)
        return said

    def _scorer_of(self, name: str) -> Scorer:
        known = self.known[name]
        return replace(self.scorer, task=known.task, max_length_tokens=known.max_length_tokens)

    def predict_rows(self, rows: Sequence[Row]) -> list[Record]:
        """The same for rows whose labels are never read, by the active adapter."""
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
        adapters: Sequence[str] | None = None,
        is_chat: bool | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """What it writes after each prompt, in one batch, or answers to each source.

        Args:
            adapters: the loaded adapter that each prompt asks for; the active one, if missing.
            is_chat: put each prompt into the tokenizer's chat template as the user's turn; if None, where the
                adapter was trained on chats.
            on_text: hears the text of a lone prompt while it is written.

        Raises:
            AdapterError: an adapter that says labels, or a tokenizer without a chat template.
        """
        task, tokenizer, chosen = self.scorer.task, self.scorer.base.tokenizer, sampling or Sampling()
        if adapters is not None and set(adapters) != {self.active}:
            return self._generate_mixed(prompts, chosen, adapters, is_chat)
        if task.writes_answers:
            sources = [Example(tokenizer(text)["input_ids"][: self.scorer.max_length_tokens], None, [], [])
                       for text in prompts]  # fmt: skip
            return write_answers(self.peft_model, tokenizer, sources, chosen, Silent(), on_text)
        ids = [self._encode_prompt(text, self.active, is_chat) for text in prompts]
        return continue_prompts(self.peft_model, tokenizer, ids, chosen, on_text)

    def _encode_prompt(self, text: str, name: str, is_chat: bool | None) -> list[int]:
        known, tokenizer = self.known[name], self.scorer.base.tokenizer
        if not isinstance(known.task, CausalLM):
            raise AdapterError(f"{known.path} is a {known.task.name} adapter, which says labels and writes nothing")
        in_chat = bool(known.facts.get("is_chat")) if is_chat is None else is_chat
        if in_chat and not tokenizer.chat_template:
            raise AdapterError(f"{known.path}: its tokenizer has no chat template; give plain prompts")
        return encode_prompt(tokenizer, text, in_chat)

    def _generate_mixed(
        self, prompts: Sequence[str], sampling: Sampling, adapters: Sequence[str], is_chat: bool | None
    ) -> list[str]:
        """One batch for all adapters where their layers can mix, else one for each."""
        self._check_loaded(sorted(set(adapters)))
        if len(adapters) != len(prompts):
            raise AdapterError(f"{len(adapters)} adapters for {len(prompts)} prompts; give one for each")
        heads = bool(wrapped_heads(self.peft_model))
        if not self.scorer.task.writes_answers and not heads and can_mix(self.peft_model, adapters):
            ids = [self._encode_prompt(text, name, is_chat) for text, name in zip(prompts, adapters, strict=True)]
            with mixing(mix_of_rows(adapters, self.scorer.base.device)):
                return continue_prompts(self.peft_model, self.scorer.base.tokenizer, ids, sampling)
        written: dict[int, str] = {}
        active = self.active
        for name in dict.fromkeys(adapters):
            self.switch(name)
            mine = [place for place, asked in enumerate(adapters) if asked == name]
            texts = self.generate([prompts[place] for place in mine], sampling, is_chat=is_chat)
            written |= dict(zip(mine, texts, strict=True))
        self.switch(active)
        return [written[place] for place in range(len(prompts))]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, for as long as this lasts; its head is the one that it came with.

        Raises:
            AdapterError: a fully tuned model, whose base is gone.
        """
        if self.is_whole_model:
            raise AdapterError(f"{self.path} is a whole model, without a base to go back to")
        self._check_unmerged()
        with self.peft_model.disable_adapter():
            yield


def _rows_of(task: Task, texts: Sequence[str]) -> list[Row]:
    return [row_without_label(task.name, {"text": text}, f"text {number}", None, None)
            for number, text in enumerate(texts, 1)]  # fmt: skip
