"""What tasks that write texts share: cross-entropy of the next token, over the positions that are to be learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.tasks.examples import Batch, EncodedRows, Forward


class NextToken:
    """The model's own head stays, so there is none to probe."""

    has_probe = False
    softens_head = False

    def head_settings(self, label_names: Sequence[str]) -> dict[str, Any]:
        return {}

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        return forward.head().learnt_losses(forward.states(batch), batch.labels).mean()

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        """[positions, 2]: loss in nats, and 1 where the likeliest token is the true one."""
        losses, hits = forward.head().losses(forward.states(batch), batch.labels)
        return torch.stack([losses, hits.float()], dim=1)

    def summarise(self, outputs: Tensor, encoded: EncodedRows) -> dict[str, float]:
        """Figures to validate by; the highest `score` is best."""
        loss = float(outputs[:, 0].double().mean())
        return {"loss": loss, "perplexity": float(torch.tensor(loss).exp()), "score": -loss}


def end_text(ids: list[int], tokenizer: Any) -> list[int]:
    """With the token that ends a text, which is learnt as well."""
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]
