"""Where a prefix starts: at what the model itself makes of a real text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftType, initialize_kv_prefix_from_past_key_values


def start_prefix(peft_model: Any, backbone: Any, token_ids: Sequence[int]) -> None:
    """Set the keys and values of prefix tuning to those of a text (Li & Liang 2021, section 7.4).

    A random prefix drowns what a deep model knows. Left as it is where the method is another one, or the model
    keeps no keys and values (encoders).

    Args:
        backbone: the base, attending as transformers does.
        token_ids: at least as many as there are virtual tokens, or the prefix is left as it is.
    """
    config = getattr(peft_model, "active_peft_config", None)
    if config is None or config.peft_type != PeftType.PREFIX_TUNING or config.prefix_projection:
        return
    ids = torch.tensor([token_ids[: config.num_virtual_tokens]], device=peft_model.device)
    if ids.shape[1] < config.num_virtual_tokens or backbone.config.is_encoder_decoder:
        return
    with torch.no_grad():
        kept = getattr(backbone(input_ids=ids, use_cache=True), "past_key_values", None)
    if kept is not None:
        initialize_kv_prefix_from_past_key_values(peft_model, past_key_values=kept)
