"""The fast paths of an adapted model, switched on in their one right order.

Used for training and for every reload, so that both compute in the same way.
"""

from __future__ import annotations

from typing import Any

from trimtab.engine.forward import Forward, PackedForward
from trimtab.engine.frozen import freeze_linears
from trimtab.engine.last_layer import limit_last_layer
from trimtab.engine.lora import speed_up_lora


def prepare_adapted(peft_model: Any, forward: Forward) -> None:
    """Freeze the base's linears, then speed up LoRA and the last layer where they have a known build.

    Call it once peft has attached its layers: each path replaces or hooks what the one before left.
    """
    freeze_linears(peft_model)
    speed_up_lora(peft_model)
    if isinstance(forward, PackedForward):
        forward.limited = limit_last_layer(forward.model)
