"""Tiny models with an adapter whose parameters are all alive, and rows for them to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from trimtab.engine.batches import Batch, Collator
from trimtab.engine.frozen import set_adapter_training, trainable_parameters
from trimtab.engine.prepare import prepare_adapted
from trimtab.methods import attach_adapter
from trimtab.study_config import build_study
from trimtab.tasks.examples import Example
from trimtab.tasks.heads import pools_last_token

LENGTHS = (4, 9, 9, 1, 17, 4)


def make_examples(model: Any, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Example]:
    """Texts of random tokens, of three classes."""
    generator = torch.Generator().manual_seed(seed)
    last = pools_last_token(model)
    return [
        Example(torch.randint(5, 100, (length,), generator=generator).tolist(), None, [length - 1 if last else 0],
                [i % 3])
        for i, length in enumerate(lengths)
    ]  # fmt: skip


def pack(examples: Sequence[Example], choice: Any) -> Batch:
    return Collator(examples, True, choice.position_offset, 0).collate(range(len(examples)))


def adapt(model: Any, choice: Any, **settings: Any) -> Any:
    """peft's model, prepared as training does, in training mode."""
    peft_model = attach_adapter(model, build_study({"lora_dropout": 0.0} | settings), [])
    prepare_adapted(peft_model, choice)
    enliven(peft_model)
    set_adapter_training(peft_model, True)
    return peft_model


def enliven(peft_model: Any) -> None:
    """LoRA's B starts at zero, where half of the gradients would be zero, too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainable_parameters(peft_model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
