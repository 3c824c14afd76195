"""Prompts to texts with a causal language model: greedy, in one padded batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from trimtab.engine.forward import use_stock_attention


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
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
        )
    return [tokenizer.decode(row[longest:], skip_special_tokens=True) for row in written.tolist()]


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
