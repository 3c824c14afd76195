"""Whole transformer layers, forward and backward, from matrix products and the kernels between them.

The plain twins are the layers of transformers themselves. What a layer hands on is not summed up
yet: a residual and the product still to be added to it, so that the next kernel does both in one
pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from trimtab.engine.fused.formats import Heads, Product, Rotary, Rows, Want
from trimtab.engine.fused.linears import Kernels, LinearGroup


@dataclass(frozen=True)
class Batch:
    """What all layers of a pass share: `starts` are the texts' first tokens, then the number of tokens.

    `rows` are the tokens that are asked for, None for all.
    """

    kernels: Kernels
    starts: Tensor
    rotary: Rotary | None = None
    rows: Tensor | None = None


class Sum(NamedTuple):
    """residual + addend, not added yet: states on the way up, their gradient on the way down."""

    residual: Tensor
    addend: Product | None = None


def total_of(state: Sum, kernels: Kernels) -> Tensor:
    if state.addend is None:
        return state.residual
    total: Tensor = kernels.add_product(state.residual, state.addend)
    return total


class AttentionPart:
    """Projections to heads, attention, and the projection back."""

    def __init__(self, heads: Heads, qkv: LinearGroup, output: LinearGroup) -> None:
        self.heads = heads
        self.qkv = qkv
        self.output = output

    def forward(self, rows: Rows, batch: Batch, selected: Tensor | None) -> tuple[Product, Any]:
        product, kept_qkv = self.qkv.forward(rows, batch.kernels)
        projected = batch.kernels.rotate_heads(product, batch.rotary, self.heads.shape)
        attended, log_sums = batch.kernels.attention_forward(projected, batch.starts, self.heads)
        merged = batch.kernels.rows_of(attended, self.output.wants)
        if selected is not None:
            merged = _select(merged, selected)
        product, kept_output = self.output.forward(merged, batch.kernels)
        return product, (kept_qkv, projected, attended, log_sums, kept_output)

    def backward(
        self, grad: Rows, saved: Any, batch: Batch, selected: Tensor | None, needs_input: bool
    ) -> tuple[Product | None, list[Tensor]]:
        kept_qkv, projected, attended, log_sums, kept_output = saved
        by_merged, of_output = self.output.backward(grad, kept_output, True, batch.kernels)
        assert by_merged is not None
        by_attended = batch.kernels.add_product(None, by_merged)
        if selected is not None:
            by_attended = _spread(by_attended, selected, len(projected))
        grads = batch.kernels.attention_backward(by_attended, projected, attended, log_sums, batch.starts, self.heads)
        by_projected = batch.kernels.rotate_heads_backward(
            grads, batch.rotary, self.heads.shape, self.qkv.wants_gradient
        )
        by_input, of_qkv = self.qkv.backward(by_projected, kept_qkv, needs_input, batch.kernels)
        return by_input, of_qkv + of_output


class LlamaLayer:
    """Pre-norm: x + attention(norm(x)), then x + down(silu(gate(norm(x))) up(norm(x)))."""

    def __init__(self, layer: Any, heads: Heads) -> None:
        qkv = LinearGroup(layer.self_attn, ["q_proj", "k_proj", "v_proj"])
        self.attention = AttentionPart(heads, qkv, LinearGroup(layer.self_attn, ["o_proj"]))
        self.gate_up = LinearGroup(layer.mlp, ["gate_proj", "up_proj"])
        self.down = LinearGroup(layer.mlp, ["down_proj"])
        self.norms = (layer.input_layernorm, layer.post_attention_layernorm)

    @property
    def groups(self) -> list[LinearGroup]:
        return [self.attention.qkv, self.attention.output, self.gate_up, self.down]

    def forward(self, state: Sum, batch: Batch, is_last: bool) -> tuple[Sum, Any]:
        first, second = self.norms
        selected = batch.rows if is_last else None
        residual, inverse, rows = batch.kernels.add_rms_norm(
            state.residual, state.addend, first.weight, first.variance_epsilon, self.attention.qkv.wants
        )
        attended, of_attention = self.attention.forward(rows, batch, selected)
        middle, middle_inverse, rows = batch.kernels.add_rms_norm(
            residual if selected is None else residual.index_select(0, selected),
            attended, second.weight, second.variance_epsilon, self.gate_up.wants,
        )  # fmt: skip
        inner, kept_inner = self.gate_up.forward(rows, batch.kernels)
        outer, kept_outer = self.down.forward(batch.kernels.swiglu(inner, self.down.wants), batch.kernels)
        saved = (residual, inverse, of_attention, middle, middle_inverse, inner, kept_inner, kept_outer)
        return Sum(middle, outer), saved

    def backward(
        self, state: Sum, saved: Any, batch: Batch, is_last: bool, needs_input: bool
    ) -> tuple[Sum | None, list[Tensor]]:
        residual, inverse, of_attention, middle, middle_inverse, inner, kept_inner, kept_outer = saved
        first, second = self.norms
        selected = batch.rows if is_last else None
        grad = batch.kernels.rows_of(total_of(state, batch.kernels), _with_values(self.down.wants_gradient))
        by_outer, of_outer = self.down.backward(grad, kept_outer, True, batch.kernels)
        assert by_outer is not None
        assert grad.values is not None
        by_inner, of_inner = self.gate_up.backward(
            batch.kernels.swiglu_backward(by_outer, inner, self.gate_up.wants_gradient),
            kept_inner,
            True,
            batch.kernels,
        )
        assert by_inner is not None
        grad = batch.kernels.rms_norm_backward(
            grad.values, by_inner, middle, middle_inverse, second.weight,
            _with_values(self.attention.output.wants_gradient),
        )  # fmt: skip
        by_input, found = self.attention.backward(grad, of_attention, batch, selected, needs_input)
        found += of_inner + of_outer
        if by_input is None:
            return None, found
        assert grad.values is not None
        by_residual = grad.values if selected is None else _spread(grad.values, selected, len(residual))
        summed = batch.kernels.rms_norm_backward(
            by_residual, by_input, residual, inverse, first.weight, Want(True, False)
        )
        assert summed.values is not None
        return Sum(summed.values), found


class BertLayer:
    """Post-norm: h = norm(x + attention(x)), then norm(h + down(gelu(up(h))))."""

    def __init__(self, layer: Any, heads: Heads) -> None:
        qkv = LinearGroup(layer.attention.self, ["query", "key", "value"])
        self.attention = AttentionPart(heads, qkv, LinearGroup(layer.attention.output, ["dense"]))
        self.up = LinearGroup(layer.intermediate, ["dense"])
        self.down = LinearGroup(layer.output, ["dense"])
        self.norms = (layer.attention.output.LayerNorm, layer.output.LayerNorm)

    @property
    def groups(self) -> list[LinearGroup]:
        return [self.attention.qkv, self.attention.output, self.up, self.down]

    def forward(self, state: Sum, batch: Batch, is_last: bool) -> tuple[Sum, Any]:
        first, second = self.norms
        selected = batch.rows if is_last else None
        rows = batch.kernels.rows_of(state.residual, self.attention.qkv.wants)
        attended, of_attention = self.attention.forward(rows, batch, selected)
        middle, mean, inverse, rows = batch.kernels.add_layer_norm(
            state.residual if selected is None else state.residual.index_select(0, selected),
            attended, first.weight, first.bias, first.eps, _with_values(self.up.wants),
        )  # fmt: skip
        inner, kept_inner = self.up.forward(rows, batch.kernels)
        outer, kept_outer = self.down.forward(batch.kernels.gelu(inner, self.down.wants), batch.kernels)
        assert rows.values is not None
        total, total_mean, total_inverse, out = batch.kernels.add_layer_norm(
            rows.values, outer, second.weight, second.bias, second.eps, Want(True, False)
        )
        saved = (
            len(state.residual), of_attention, (middle, mean, inverse), inner, kept_inner, kept_outer,
            (total, total_mean, total_inverse),
        )  # fmt: skip
        assert out.values is not None
        return Sum(out.values), saved

    def backward(
        self, state: Sum, saved: Any, batch: Batch, is_last: bool, needs_input: bool
    ) -> tuple[Sum | None, list[Tensor]]:
        tokens, of_attention, middle, inner, kept_inner, kept_outer, total = saved
        first, second = self.norms
        selected = batch.rows if is_last else None
        grad = batch.kernels.layer_norm_backward(
            state.residual, state.addend, *total, second.weight,
            _with_values(self.down.wants_gradient),
        )  # fmt: skip
        by_outer, of_outer = self.down.backward(grad, kept_outer, True, batch.kernels)
        assert by_outer is not None
        assert grad.values is not None
        by_inner, of_inner = self.up.backward(
            batch.kernels.gelu_backward(by_outer, inner, self.up.wants_gradient),
            kept_inner,
            True,
            batch.kernels,
        )
        assert by_inner is not None
        grad = batch.kernels.layer_norm_backward(
            grad.values, by_inner, *middle, first.weight, _with_values(self.attention.output.wants_gradient)
        )
        by_input, found = self.attention.backward(grad, of_attention, batch, selected, needs_input)
        assert grad.values is not None
        by_residual = grad.values if selected is None else _spread(grad.values, selected, tokens)
        return None if by_input is None else Sum(by_residual, by_input), found + of_inner + of_outer


def _with_values(want: Want) -> Want:
    return want._replace(values=True)


def _select(rows: Rows, selected: Tensor) -> Rows:
    return Rows(*(None if part is None else part.index_select(0, selected) for part in rows))


def _spread(values: Tensor, selected: Tensor, tokens: int) -> Tensor:
    return values.new_zeros(tokens, values.shape[1]).index_add_(0, selected, values)
