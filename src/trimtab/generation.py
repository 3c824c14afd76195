"""Texts from language models, in padded batches: prompts that go on, and answers to sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.engine.batches import pad_right, plan_batches
from trimtab.engine.forward import usable_length, use_stock_attention
from trimtab.errors import DataError, RowError
from trimtab.progress import Progress
from trimtab.sampling import Sampling
from trimtab.tasks.examples import Example

# A text to go on from, or the turns of a chat to answer, each with `role` and `content`.
Prompt = str | Sequence[Mapping[str, str]]

# Tokens of sources and answers that are held at once.
_ANSWER_TOKENS_PER_BATCH = 4096


def continue_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """What `model` writes after each prompt, up to its end of text.

    Args:
        on_text: hears the text of a lone prompt while it is written.
        model: a stock or peft-wrapped causal language model, whose packed attention is left for as long as it writes.
        prompts: token ids; batches are padded on the left, as generation asks for.
    """
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = next(model.parameters()).device
    with torch.inference_mode(), _stock_attention(model):
        written = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pad_token_id=pad,
            streamer=_streamer(tokenizer, on_text),
            **sampling.settings(prompts, tokenizer),
        )
    return [tokenizer.decode(row[longest:], skip_special_tokens=True) for row in written.tolist()]


def encode_chat(tokenizer: Any, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of a chat in the tokenizer's template, up to where the assistant answers.

    Raises:
        DataError: the template refuses the chat.
    """
    try:
        found = tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=True)
    except Exception as error:  # templates raise what they like
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"the tokenizer's chat template refuses this chat ({reason}); change its turns") from error
    ids: list[int] = found["input_ids"]
    return ids


def check_room(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, reserved: int = 0) -> None:
    """Refuse prompts (token ids) that a model cannot go on from.

    Args:
        reserved: positions that the method's own tokens take.

    Raises:
        RowError: the first prompt, by its number, without a token, or with fewer than `max_new_tokens` positions left.
    """
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise RowError(str(number), "the prompt gives no token to go on from, and this tokenizer starts a text "
                                        "with none; give some text")  # fmt: skip
        wanted = len(prompt) + max_new_tokens
        most = usable_length(model, wanted, reserved)
        if most < wanted:
            raise RowError(
                str(number),
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones are more than the {most} that this "
                "model has positions for; shorten it, or lower max_new_tokens",
            )


def check_answers(model: Any, max_new_tokens: int) -> None:
    """Refuse answers for which a decoder has too few positions.

    Raises:
        DataError: `max_new_tokens` is too many; a decoder with relative positions (T5) takes any.
    """
    most = usable_length(model, max_new_tokens)
    if most < max_new_tokens:
        raise DataError(
            f"{max_new_tokens} new tokens are more than the {most} positions of this model's decoder; "
            "lower max_new_tokens"
        )


def write_answers(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    sampling: Sampling,
    progress: Progress,
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """What an encoder with a decoder, stock or wrapped by peft, writes for each source, up to its end of text."""
    sources = [example.input_ids for example in examples]
    lengths = [len(source) + sampling.max_new_tokens for source in sources]
    batches = plan_batches(lengths, _ANSWER_TOKENS_PER_BATCH, shuffle_seed=None, padded=True)
    device = next(model.parameters()).device
    answers: dict[int, str] = {}
    for rows in batches:
        ids = pad_right([sources[row] for row in rows], tokenizer.pad_token_id)
        mask = pad_right([[1] * len(sources[row]) for row in rows], 0)
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                streamer=_streamer(tokenizer, on_text),
                **sampling.settings([sources[row] for row in rows], tokenizer),
            )
        texts = tokenizer.batch_decode(written.tolist(), skip_special_tokens=True)
        answers |= dict(zip(rows, map(str.strip, texts), strict=True))
        progress.advance(len(answers), len(sources), "answers")
    return [answers[row] for row in range(len(sources))]


def _streamer(tokenizer: Any, on_text: Callable[[str], None] | None) -> Any:
    from transformers import TextStreamer

    if on_text is None:
        return None
    tell = on_text

    class Heard(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            tell(text)

    return Heard(tokenizer, skip_prompt=True, skip_special_tokens=True)


@contextmanager
def _stock_attention(model: Any) -> Iterator[None]:
    """Padding and a cache are what transformers' own attention is for."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    packed = base.config._attn_implementation
    use_stock_attention(base)
    try:
        yield
    finally:
        base.set_attn_implementation(packed)
