"""The fast paths of an adapted model, switched on in their one right order.

Used for training and for every reload, so that both compute in the same way.
"""

from __future__ import annotations

from typing import Any

from trimtab.engine.forward import Choice, EncoderDecoderForward, PackedForward, PromptForward, use_stock_attention
from trimtab.engine.frozen import freeze_linears
from trimtab.engine.last_layer import limit_last_layer
from trimtab.engine.lora import speed_up_lora
from trimtab.tasks.heads import is_language_model


def prepare_adapted(peft_model: Any, choice: Choice) -> Choice:
    """Freeze the base's linears, then speed up LoRA and the last layer where they have a known build.

    Call it once peft has attached its layers: each path replaces or hooks what the one before left.

    Returns:
        The forward to go on with: the base's, unless the method puts tokens of its own before each text.
    """
    config = getattr(peft_model, "active_peft_config", None)
    freeze_linears(peft_model)
    stack = choice.forward.stack if isinstance(choice.forward, PackedForward) else None
    if config is not None and config.is_prompt_learning:
        model = peft_model.get_base_model()
        if stack is not None:
            stack.release()
            stack.release_head()
        use_stock_attention(model)
        answers = model.config.is_encoder_decoder
        forward = EncoderDecoderForward(model, peft_model) if answers else PromptForward(peft_model)
        return Choice(forward, 0, "virtual tokens stand before each text")
    speed_up_lora(peft_model)
    if stack is not None and not stack.fits():
        stack.release()
    if isinstance(choice.forward, PackedForward):
        model = choice.forward.model
        if stack is not None and is_language_model(model) and choice.forward.head() is not stack.head:
            stack.release_head()  # a head that is trained, or has an adapter
        choice.forward.limited = limit_last_layer(model)
    return choice
