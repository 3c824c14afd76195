"""Whole transformer layers, forward and backward, from matrix products and the kernels between them.

The plain twins are the layers of transformers themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trimtab.engine.fused.formats import Heads, Rotary, Rows, Want
from trimtab.engine.fused.linears import Kernels, LinearGroup

_VALUES = Want(True, False)


@dataclass(frozen=True)
class Batch:
    """What all layers of a pass share: `starts` are the texts' first tokens, then the number of tokens.

    `rows` are the tokens that are asked for, None for all.
    """

    starts: Tensor
    rotary: Rotary | None = None
    rows: Tensor | None = None


class Attention:
    """What each text attends to, in float32; or, where linears are int8, by products in bfloat16."""

    name = "attention"

    def __init__(self, heads: Heads, kernels: Kernels) -> None:
        self.heads, self.kernels = heads, kernels
        self.is_bfloat16 = False

    @property
    def can_quantise(self) -> bool:
        return bool(self.kernels.has_bfloat16())

    def quantise(self) -> None:
        self.is_bfloat16 = True

    def use_float32(self) -> None:
        self.is_bfloat16 = False

    def forward(self, projected: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, heads x dim], and what the backward needs of each softmax."""
        found: tuple[Tensor, Tensor] = self.kernels.attention_forward(projected, starts, self.heads, self.is_bfloat16)
        return found

    def backward(self, grad: Tensor, projected: Tensor, sums: Tensor, starts: Tensor) -> Tensor:
        """The gradient of `projected`."""
        found: Tensor = self.kernels.attention_backward(grad, projected, sums, starts, self.heads, self.is_bfloat16)
        return found


class AttentionPart:
    """Projections to heads, attention, and the projection back."""

    def __init__(self, heads: Heads, qkv: LinearGroup, output: LinearGroup) -> None:
        self.within_texts = Attention(heads, qkv.kernels)
        self.shape = heads.shape
        self.qkv = qkv
        self.output = output
        self.kernels = qkv.kernels

    def forward(self, rows: Rows, batch: Batch, selected: Tensor | None, residual: Tensor) -> tuple[Tensor, Any]:
        """Attention of `rows`, of the selected tokens only, + residual."""
        projected, kept_qkv = self.qkv.forward(rows)
        projected = self.kernels.rotate_heads(projected, batch.rotary, self.shape)
        attended, sums = self.within_texts.forward(projected, batch.starts)
        merged = self.kernels.rows_of(attended, self.output.wants)
        if selected is not None:
            merged = _select(merged, selected)
            residual = residual.index_select(0, selected)
        middle, kept_output = self.output.forward(merged, residual)
        return middle, (kept_qkv, projected, sums, kept_output)

    def backward(
        self, grad: Rows, saved: Any, batch: Batch, selected: Tensor | None, needs_input: bool,
        residual: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
        """Gradients of the rows, + residual, and of the adapters' parameters."""
        kept_qkv, projected, sums, kept_output = saved
        by_attended, of_output = self.output.backward(grad, kept_output)
        assert by_attended is not None
        if selected is not None:
            by_attended = _spread(by_attended, selected, len(projected))
        grads = self.within_texts.backward(by_attended, projected, sums, batch.starts)
        by_projected = self.kernels.rotate_heads_backward(grads, batch.rotary, self.shape, self.qkv.wants_gradient)
        by_input, of_qkv = self.qkv.backward(by_projected, kept_qkv, needs_input, residual)
        return by_input, of_qkv + of_output


class LlamaLayer:
    """Pre-norm: x + attention(norm(x)), then x + down(silu(gate(norm(x))) up(norm(x)))."""

    def __init__(self, layer: Any, heads: Heads, kernels: Kernels) -> None:
        qkv = LinearGroup(layer.self_attn, ["q_proj", "k_proj", "v_proj"], kernels)
        self.attention = AttentionPart(heads, qkv, LinearGroup(layer.self_attn, ["o_proj"], kernels))
        self.gate_up = LinearGroup(layer.mlp, ["gate_proj", "up_proj"], kernels)
        self.down = LinearGroup(layer.mlp, ["down_proj"], kernels)
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)
        self.kernels = kernels

    @property
    def groups(self) -> list[LinearGroup]:
        return [self.attention.qkv, self.attention.output, self.gate_up, self.down]

    @property
    def wants(self) -> Want:
        """Formats of the states that the forward reads."""
        return _VALUES

    @property
    def wants_gradient(self) -> Want:
        """Formats of the states' gradient that the backward reads."""
        return self.down.wants_gradient._replace(values=True)

    def forward(self, states: Rows, batch: Batch, is_last: bool, want: Want) -> tuple[Rows, Any]:
        """The next states, and what the backward needs."""
        first, second = self.norms
        below = values_of(states)
        inverse, rows = self.kernels.rms_norm(below, first.weight, first.variance_epsilon, self.attention.qkv.wants)
        middle, of_attention = self.attention.forward(rows, batch, batch.rows if is_last else None, below)
        middle_inverse, rows = self.kernels.rms_norm(middle, second.weight, second.variance_epsilon, self.gate_up.wants)
        inner, kept_inner = self.gate_up.forward(rows)
        out, kept_outer = self.down.forward(self.kernels.swiglu(inner, self.down.wants), middle)
        saved = (below, inverse, of_attention, middle, middle_inverse, inner, kept_inner, kept_outer)
        return self.kernels.rows_of(out, want), saved

    def backward(
        self, grad: Rows, saved: Any, batch: Batch, is_last: bool, want: Want | None
    ) -> tuple[Rows | None, list[Tensor]]:
        """Gradients of the states below, unless `want` is None, and of the adapters' parameters."""
        below, inverse, of_attention, middle, middle_inverse, inner, kept_inner, kept_outer = saved
        first, second = self.norms
        selected = batch.rows if is_last else None
        by_outer, of_outer = self.down.backward(grad, kept_outer)
        by_inner, of_inner = self.gate_up.backward(
            self.kernels.swiglu_backward(by_outer, inner, self.gate_up.wants_gradient), kept_inner
        )
        grad = self.kernels.rms_norm_backward(
            values_of(grad), by_inner, middle, middle_inverse, second.weight,
            self.attention.output.wants_gradient._replace(values=True),
        )  # fmt: skip
        by_input, found = self.attention.backward(grad, of_attention, batch, selected, want is not None)
        found += of_inner + of_outer
        if want is None:
            return None, found
        residual = values_of(grad) if selected is None else _spread(values_of(grad), selected, len(below))
        return self.kernels.rms_norm_backward(residual, by_input, below, inverse, first.weight, want), found


class BertLayer:
    """Post-norm: h = norm(x + attention(x)), then norm(h + down(gelu(up(h))))."""

    def __init__(self, layer: Any, heads: Heads, kernels: Kernels) -> None:
        qkv = LinearGroup(layer.attention.self, ["query", "key", "value"], kernels)
        self.attention = AttentionPart(
            heads, qkv, LinearGroup(layer.attention.output, ["dense"], kernels, "attention.output")
        )
        self.up = LinearGroup(layer.intermediate, ["dense"], kernels, "intermediate")
        self.down = LinearGroup(layer.output, ["dense"], kernels, "output")
        self.norms = (layer.attention.output.LayerNorm, layer.output.LayerNorm)
        self.kernels = kernels

    @property
    def groups(self) -> list[LinearGroup]:
        return [self.attention.qkv, self.attention.output, self.up, self.down]

    @property
    def wants(self) -> Want:
        """Formats of the states that the forward reads."""
        return self.attention.qkv.wants._replace(values=True)

    @property
    def wants_gradient(self) -> Want:
        """Formats of the states' gradient that the backward reads."""
        return _VALUES

    def forward(self, states: Rows, batch: Batch, is_last: bool, want: Want) -> tuple[Rows, Any]:
        """The next states, and what the backward needs."""
        first, second = self.norms
        selected = batch.rows if is_last else None
        middle, of_attention = self.attention.forward(states, batch, selected, values_of(states))
        mean, inverse, rows = self.kernels.layer_norm(
            middle, first.weight, first.bias, first.eps, self.up.wants._replace(values=True)
        )
        inner, kept_inner = self.up.forward(rows)
        total, kept_outer = self.down.forward(self.kernels.gelu(inner, self.down.wants), values_of(rows))
        total_mean, total_inverse, out = self.kernels.layer_norm(total, second.weight, second.bias, second.eps, want)
        saved = (
            len(values_of(states)), of_attention, (middle, mean, inverse), inner, kept_inner, kept_outer,
            (total, total_mean, total_inverse),
        )  # fmt: skip
        return out, saved

    def backward(
        self, grad: Rows, saved: Any, batch: Batch, is_last: bool, want: Want | None
    ) -> tuple[Rows | None, list[Tensor]]:
        """Gradients of the states below, unless `want` is None, and of the adapters' parameters."""
        tokens, of_attention, middle, inner, kept_inner, kept_outer, total = saved
        first, second = self.norms
        selected = batch.rows if is_last else None
        rows = self.kernels.layer_norm_backward(
            values_of(grad), *total, second.weight, self.down.wants_gradient._replace(values=True)
        )
        by_outer, of_outer = self.down.backward(rows, kept_outer)
        by_inner, of_inner = self.up.backward(
            self.kernels.gelu_backward(by_outer, inner, self.up.wants_gradient), kept_inner, True, values_of(rows)
        )
        rows = self.kernels.layer_norm_backward(
            by_inner, *middle, first.weight, self.attention.output.wants_gradient._replace(values=True)
        )
        residual = values_of(rows) if selected is None else _spread(values_of(rows), selected, tokens)
        by_input, found = self.attention.backward(rows, of_attention, batch, selected, want is not None, residual)
        below = None if want is None else self.kernels.rows_of(by_input, want)
        return below, found + of_inner + of_outer


def values_of(rows: Rows) -> Tensor:
    assert rows.values is not None
    return rows.values


def _select(rows: Rows, selected: Tensor) -> Rows:
    return Rows(*(None if part is None else part.index_select(0, selected) for part in rows))


def _spread(values: Tensor, selected: Tensor, tokens: int) -> Tensor:
    return values.new_zeros(tokens, values.shape[1]).index_add_(0, selected, values)
