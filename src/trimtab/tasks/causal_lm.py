"""Causal language modelling: plain texts, prompts with completions, and chats; only what is to be learnt counts.

Plain texts are cut into blocks that overlap by one token, so that every token but the first is
predicted once. Of a prompt and its completion the completion counts, of a chat the assistant's turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.data import Row
from trimtab.errors import RowError
from trimtab.tasks.examples import EncodedRows, Example
from trimtab.tasks.next_token import NextToken, end_text


class CausalLM(NextToken):
    """The next token, at every position that is to be learnt."""

    name = "causal_lm"
    peft_type = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    writes_answers = False

    learns_last_turn_only = False

    def encode(self, rows: Sequence[Row], tokenizer: Any, model: Any, max_length_tokens: int) -> EncodedRows:
        encoder = _Encoder(tokenizer, max_length_tokens, self.learns_last_turn_only)
        examples: list[Example] = []
        numbers: list[int] = []
        for number, row in enumerate(rows):
            found = encoder.encode(row)
            examples += found
            numbers += [number] * len(found)
        return EncodedRows(examples, numbers, encoder.truncated)


class _Encoder:
    def __init__(self, tokenizer: Any, max_length_tokens: int, last_turn_only: bool) -> None:
        self.tokenizer = tokenizer
        self.last_turn_only = last_turn_only
        self.max_length = max_length_tokens
        self.truncated = 0  # rows that lost tokens
        self.marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}

    def encode(self, row: Row) -> list[Example]:
        """One or more examples of a row.

        Raises:
            RowError: nothing in it can be learnt.
        """
        if row.messages is not None:
            return [self._supervised(row, *self._chat(row))]
        if row.completion is not None:
            return [self._supervised(row, *self._completion(row))]
        ids = end_text(self.tokenizer(row.text, verbose=False)["input_ids"], self.tokenizer)
        if len(ids) < 2:
            raise RowError(row.id, "a text of one token has no next token to learn; remove the row")
        starts = range(0, len(ids) - 1, self.max_length - 1)
        return [_example(ids[start : start + self.max_length], 1) for start in starts]

    def _completion(self, row: Row) -> tuple[list[int], list[bool]]:
        prompt = encode_prompt(self.tokenizer, row.text, False)
        completion = end_text(
            self.tokenizer(row.completion, add_special_tokens=False, verbose=False)["input_ids"], self.tokenizer
        )
        return prompt + completion, [False] * len(prompt) + [True] * len(completion)

    def _chat(self, row: Row) -> tuple[list[int], list[bool]]:
        """All tokens of the chat's template, and which of them are the assistant's."""
        messages = row.messages or []
        if not any(message["role"] == "assistant" for message in messages):
            raise RowError(row.id, "a chat without a turn of the assistant teaches nothing; remove the row")
        ids = self._template(row, messages)
        learnt = [False] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or (self.last_turn_only and number < len(messages) - 1):
                continue
            before = self._template(row, messages[:number], add_generation_prompt=True)
            after = self._template(row, messages[: number + 1])
            if ids[: len(after)] != after or after[: len(before)] != before:
                raise RowError(
                    row.id,
                    f"the tokenizer's chat template writes turn {number + 1} in another way once "
                    "the chat goes on, so its tokens cannot be told; give each chat up to that turn as its own row",
                )
            learnt[len(before) : len(after)] = [True] * (len(after) - len(before))
        if messages[-1]["role"] == "assistant" and not self.marks & set(ids[len(before) :]):
            ids = end_text(ids, self.tokenizer)  # or a template that marks no end would teach none
        return ids, learnt + [True] * (len(ids) - len(learnt))

    def _template(self, row: Row, messages: list[dict[str, str]], **settings: Any) -> list[int]:
        try:
            found = self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **settings)
        except Exception as error:  # templates raise what they like
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RowError(row.id, f"the tokenizer's chat template refuses this chat ({reason})") from error
        ids: list[int] = found["input_ids"]
        return ids

    def _supervised(self, row: Row, ids: list[int], learnt: list[bool]) -> Example:
        """Too long a row loses tokens before what is to be learnt first, and only then of that."""
        if len(ids) > self.max_length:
            self.truncated += 1
            first = learnt.index(True)
            # One token stays before the first that is learnt: it is what that one is predicted from.
            cut = min(len(ids) - self.max_length, max(0, first - 1))
            ids, learnt = ids[cut:][: self.max_length], learnt[cut:][: self.max_length]
        positions = [place - 1 for place, wanted in enumerate(learnt) if wanted and place]
        if not positions:
            raise RowError(row.id, "the completion gives no token to learn; fill or remove the row")
        return Example(ids, None, positions, [ids[place + 1] for place in positions])


def encode_prompt(tokenizer: Any, text: str, is_chat: bool) -> list[int]:
    """The tokens that a model goes on from: of a text without its end, or of a user's turn in the chat template."""
    if is_chat:
        turn = [{"role": "user", "content": text}]
        ids: list[int] = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
        return ids
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def prompt_of(example: Example, most: int) -> list[int]:
    """What stands before the first token to be learnt; of a plain text its beginning, `most` tokens or half of it."""
    first = example.positions[0] + 1
    return example.input_ids[: first if first > 1 else max(1, min(most, len(example) // 2))]


def _example(ids: list[int], first: int) -> Example:
    """Every token from place `first` on is learnt."""
    return Example(ids, None, list(range(first - 1, len(ids) - 1)), ids[first:])
