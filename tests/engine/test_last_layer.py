"""Only the pooled rows past the last attention, against the full last layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GraniteConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers import GraniteForCausalLM as Granite

from trimtab.engine import attention
from trimtab.engine.attention import Run
from trimtab.engine.last_layer import limit_last_layer, only_rows
from trimtab.tasks.heads import backbone_of

# fmt: off
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "intermediate_size": 48, "vocab_size": 50, "max_position_embeddings": 40}
# fmt: on
BUILDS: list[Any] = [
    (LlamaConfig, LlamaForSequenceClassification, {"num_key_value_heads": 2, "pad_token_id": 0}),
    (BertConfig, BertForSequenceClassification, {}),
    (RobertaConfig, RobertaForSequenceClassification, {}),
]


@pytest.mark.parametrize(("config", "model_class", "more"), BUILDS)
def test_equals_the_full_last_layer(config: Any, model_class: Any, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    attention.register()
    model = model_class(config(**SIZES, **more)).eval()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    ids = torch.randint(2, 50, (1, 13))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    inputs["packed_runs"] = [Run(1, 3), Run(2, 5)]
    rows = torch.tensor([2, 7, 12])
    weights = torch.randn(3, 32)

    def states_and_gradients(limited: bool) -> list[Tensor]:
        model.zero_grad()
        if limited:
            with only_rows(rows):
                states = backbone_of(model)(**inputs).last_hidden_state[0]
        else:
            states = backbone_of(model)(**inputs).last_hidden_state[0].index_select(0, rows)
        (states * weights).sum().backward()
        return [states, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = states_and_gradients(False)
    assert limit_last_layer(model)
    limited = states_and_gradients(True)
    assert limited[0].shape == (3, 32)
    assert len(plain) == len(limited)
    for ours, theirs in zip(limited, plain, strict=True):
        # Key biases have a gradient of zero but for rounding: hence the absolute part.
        largest = max(0.1, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * largest)
    # Outside of only_rows the model is unchanged, and it is not prepared twice.
    assert backbone_of(model)(**inputs).last_hidden_state.shape == (1, 13, 32)
    assert not limit_last_layer(model)


def test_leaves_unknown_builds_alone() -> None:
    config = DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    distil = DistilBertForSequenceClassification(config)
    assert not limit_last_layer(distil)
    # Granite's layer looks like Llama's but scales its residuals: the example tells.
    granite = Granite(GraniteConfig(**SIZES, num_key_value_heads=2, residual_multiplier=0.3))
    before = type(granite.model.layers[-1])
    assert not limit_last_layer(granite)
    assert type(granite.model.layers[-1]) is before
    assert not granite.model.layers[-1].self_attn.o_proj._forward_pre_hooks
