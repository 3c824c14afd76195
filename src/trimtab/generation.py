"""Texts from language models, greedy, in padded batches: prompts that go on, and answers to sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.engine.batches import pad_right, plan_batches
from trimtab.engine.forward import use_stock_attention
from trimtab.progress import Progress
from trimtab.tasks.examples import Example

# The likeliest token each time, whatever the model's own generation settings ask for (BART's ask for length).
_GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None, "min_length": 0,
           "no_repeat_ngram_size": 0}  # fmt: skip
# Tokens of sources and answers that are held at once.
_ANSWER_TOKENS_PER_BATCH = 4096


def continue_prompts(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """What `model` writes after each prompt, up to its end of text; the likeliest token each time.

    Args:
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
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            **_GREEDY,
        )
    return [tokenizer.decode(row[longest:], skip_special_tokens=True) for row in written.tolist()]


def write_answers(
    model: Any, tokenizer: Any, examples: Sequence[Example], max_new_tokens: int, progress: Progress
) -> list[str]:
    """What an encoder with a decoder, stock or wrapped by peft, writes for each source, up to its end of text."""
    sources = [example.input_ids for example in examples]
    lengths = [len(source) + max_new_tokens for source in sources]
    batches = plan_batches(lengths, _ANSWER_TOKENS_PER_BATCH, shuffle_seed=None, padded=True)
    device = next(model.parameters()).device
    answers: dict[int, str] = {}
    for rows in batches:
        ids = pad_right([sources[row] for row in rows], tokenizer.pad_token_id)
        mask = pad_right([[1] * len(sources[row]) for row in rows], 0)
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens, **_GREEDY
            )
        texts = tokenizer.batch_decode(written.tolist(), skip_special_tokens=True)
        answers |= dict(zip(rows, map(str.strip, texts), strict=True))
        progress.advance(len(answers), len(sources), "answers")
    return [answers[row] for row in range(len(sources))]


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
