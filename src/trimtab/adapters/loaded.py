"""A base with its adapters at work: what they say of texts, and what they write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from trimtab.adapters.adapter_set import AdapterSet
from trimtab.adapters.switching import score_mixed, wrapped_heads
from trimtab.data import Row
from trimtab.engine.frozen import NumberFormat
from trimtab.engine.lora import can_mix
from trimtab.engine.mixed import mix_of_rows, mixing
from trimtab.errors import AdapterError
from trimtab.evaluation.unlabelled import SAY, Record, Said, row_without_label
from trimtab.generation import Prompt, check_answers, check_room, continue_prompts, encode_chat, write_answers
from trimtab.precision import use_float32, use_precision
from trimtab.progress import Progress, Silent
from trimtab.sampling import Sampling
from trimtab.tasks import Task
from trimtab.tasks.causal_lm import CausalLM, encode_prompt
from trimtab.tasks.examples import EncodedRows, Example
from trimtab.tasks.seq2seq import cut_ids


class LoadedAdapter(AdapterSet):
    """A base with one adapter around it, or several, ready to predict and to generate."""

    @property
    def predicts(self) -> bool:
        """Whether it says something of each row; a causal language model only writes on."""
        return self.scorer.task.name in SAY or self.scorer.task.writes_answers

    def predict(self, texts: Sequence[str], adapters: Sequence[str] | None = None) -> list[Record]:
        """`prediction` of each text, and `probabilities` where the task has some: of tags, that of each word's.

        Args:
            adapters: the loaded adapter that each text asks for; the active one, if missing. Plain LoRA adapters
                answer in one pass, those of other methods one after the other.

        Raises:
            DataError: an empty text.
            AdapterError: an adapter that is not loaded.
        """
        if adapters is not None:
            self._check_enabled()
        if not texts:
            return []
        if not self.predicts:
            raise AdapterError(f"{self.path} is a {self.scorer.task.name} adapter, which writes and says no label")
        pairs = [name for name in set(adapters or [self.active]) & set(self.names)
                 if self.known[name].facts.get("columns", {}).get("text_pair")]  # fmt: skip
        if pairs:
            raise AdapterError(f"{self.known[pairs[0]].path} reads pairs of texts; give rows with both to predict_rows")
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
        try:
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
        finally:
            if self.active != active:
                self.switch(active)
        return said

    def predict_rows(self, rows: Sequence[Row]) -> list[Record]:
        """The same for rows whose labels are never read, by the active adapter."""
        encoded = self.scorer.encode(rows)
        if not self.scorer.task.writes_answers:
            return SAY[self.scorer.task.name](self.scorer.score(encoded).outputs, encoded, rows, self.label_names)
        sampling = Sampling(self.facts.get("max_new_tokens", self.scorer.max_length_tokens))
        tokenizer = self.scorer.base.tokenizer
        written = write_answers(self.peft_model, tokenizer, encoded.examples, sampling, Silent())
        said = Said({"prediction": text} for text in written)
        said.truncated = encoded.truncated
        return said

    def compute_in(self, precision: NumberFormat, rows: Sequence[Row], progress: Progress | None = None) -> None:
        """Let frozen layers compute in a lower precision, where their error on the first of `rows` is within bounds."""
        self._check_unmerged()
        forward = self.scorer.choice.forward
        use_float32(forward)
        batch = self.scorer.first_batch(self.scorer.encode(rows))
        use_precision(precision, self.scorer.task, forward, batch, progress or Silent(), training=False)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        adapters: Sequence[str] | None = None,
        is_chat: bool | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> list[str]:
        """What it writes after each prompt, in one batch, or answers to each source, which is cut as in training.

        Args:
            prompts: texts; a language model also answers chats, lists of turns with `role` and `content`.
            adapters: the loaded adapter that each prompt asks for; the active one, if missing.
            is_chat: put each text into the tokenizer's chat template as the user's turn; if None, where the
                adapter was trained on chats.
            on_text: hears the text of a lone prompt while it is written.

        Raises:
            AdapterError: an adapter that says labels, or a tokenizer without a chat template.
            DataError: a prompt without tokens, one that leaves too few positions, or a chat that the template refuses;
                more new tokens than a decoder has positions for.
        """
        task, tokenizer, chosen = self.scorer.task, self.scorer.base.tokenizer, sampling or Sampling()
        if adapters is not None:
            self._check_enabled()
        if not prompts:
            return []
        if adapters is not None and set(adapters) != {self.active}:
            return self._generate_mixed(prompts, chosen, adapters, is_chat)
        if task.writes_answers:
            check_answers(self.scorer.base.model, chosen.max_new_tokens)
            most = self.scorer.max_length_tokens
            sources = [Example(cut_ids(ids, most), None, [], []) for ids in self._source_ids(prompts)]
            return write_answers(self.peft_model, tokenizer, sources, chosen, Silent(), on_text)
        ids = self._encode_prompts(prompts, [self.active] * len(prompts), chosen, is_chat)
        return continue_prompts(self.peft_model, tokenizer, ids, chosen, on_text)

    def count_cut(self, sources: Sequence[Prompt]) -> int:
        """How many of these sources are longer than it reads, so that their ends are left out of what it answers."""
        most = self.scorer.max_length_tokens
        return sum(len(ids) > most for ids in self._source_ids(sources))

    def _source_ids(self, sources: Sequence[Prompt]) -> list[list[int]]:
        found: list[list[int]] = self.scorer.base.tokenizer(list(map(str, sources)), verbose=False)["input_ids"]
        return found

    def _encode_prompts(
        self, prompts: Sequence[Prompt], adapters: Sequence[str], sampling: Sampling, is_chat: bool | None
    ) -> list[list[int]]:
        ids = [self._encode_prompt(prompt, name, is_chat) for prompt, name in zip(prompts, adapters, strict=True)]
        check_room(self.scorer.base.model, ids, sampling.max_new_tokens, self.facts.get("virtual_tokens", 0))
        return ids

    def _encode_prompt(self, prompt: Prompt, name: str, is_chat: bool | None) -> list[int]:
        known, tokenizer = self.known[name], self.scorer.base.tokenizer
        if not isinstance(known.task, CausalLM):
            raise AdapterError(f"{known.path} is a {known.task.name} adapter, which says labels and writes nothing")
        is_text = isinstance(prompt, str)
        if not is_text and is_chat is False:
            raise AdapterError("only the chat template reads a list of turns; leave out is_chat=False (--chat off)")
        in_chat = bool(known.facts.get("is_chat") or not is_text) if is_chat is None else is_chat
        if in_chat and not tokenizer.chat_template:
            raise AdapterError(f"{known.path}: its tokenizer has no chat template; give plain prompts")
        if not in_chat:
            return encode_prompt(tokenizer, str(prompt), False)
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)

    def _generate_mixed(
        self, prompts: Sequence[Prompt], sampling: Sampling, adapters: Sequence[str], is_chat: bool | None
    ) -> list[str]:
        """One batch for all adapters where their layers can mix, else one for each."""
        self._check_loaded(sorted(set(adapters)))
        if len(adapters) != len(prompts):
            raise AdapterError(f"{len(adapters)} adapters for {len(prompts)} prompts; give one for each")
        heads = bool(wrapped_heads(self.peft_model))
        if not self.scorer.task.writes_answers and not heads and can_mix(self.peft_model, adapters):
            ids = self._encode_prompts(prompts, adapters, sampling, is_chat)
            with mixing(mix_of_rows(adapters, self.scorer.base.device)):
                return continue_prompts(self.peft_model, self.scorer.base.tokenizer, ids, sampling)
        written: dict[int, str] = {}
        active = self.active
        try:
            for name in dict.fromkeys(adapters):
                self.switch(name)
                mine = [place for place, asked in enumerate(adapters) if asked == name]
                texts = self.generate([prompts[place] for place in mine], sampling, is_chat=is_chat)
                written |= dict(zip(mine, texts, strict=True))
        finally:
            self.switch(active)
        return [written[place] for place in range(len(prompts))]


def _rows_of(task: Task, texts: Sequence[str]) -> list[Row]:
    return [row_without_label(task.name, {"text": text}, f"text {number}", None, None)
            for number, text in enumerate(texts, 1)]  # fmt: skip
