"""Frozen elementwise parts of decoder layers with fewer passes over memory, and the same maths.

`speed_up_frozen_layers` changes the class of modules that compute RMSNorm, a SwiGLU or Llama's
rotary embedding; their weights and names stay. Each plain twin is the module's own forward, which
is compared on an example before a module is changed, and serves whenever conditions do not hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trimtab.engine.frozen import FrozenLinear

# Largest difference, of values near 1, between a module's forward and the formula it should compute.
_TOLERANCE = 1e-5


def speed_up_frozen_layers(model: nn.Module) -> dict[str, int]:
    """Let frozen parts of `model` compute in one autograd function each; returns how many by kind.

    Call it once peft has attached and `freeze_linears` has run.
    """
    changed = {"rms_norm": 0, "swiglu": 0}
    for module in model.modules():
        if _is_rms_norm(module):
            _mix_in(module, FastRMSNorm)
            changed["rms_norm"] += 1
        elif _is_swiglu(module):
            _mix_in(module, FastSwiGLU)
            changed["swiglu"] += 1
    return changed


def _mix_in(module: nn.Module, mixin: type) -> None:
    """Put the forward of `mixin` before that of the module's own class."""
    stock = type(module)
    module.__class__ = type(stock.__name__, (mixin, stock), {})


def _agree(ours: Tensor, stock: Any) -> bool:
    if not isinstance(stock, Tensor) or ours.shape != stock.shape:
        return False
    return bool((ours - stock).abs().max() <= _TOLERANCE)


def _example(features: int, device: torch.device) -> Tensor:
    """[2, features] of distinct values near 1, drawn from no generator."""
    return torch.linspace(-2.0, 3.0, 2 * features, device=device).sin().view(2, features)


def _is_rms_norm(module: nn.Module) -> bool:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    named = type(module).__name__.endswith("RMSNorm") and not isinstance(module, FastRMSNorm)
    if not named or not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(epsilon, float):
        return False
    if weight.requires_grad or weight.dtype != torch.float32:
        return False
    x = _example(len(weight), weight.device)
    with torch.no_grad():
        ours = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))
        return _agree(ours / weight.abs().max(), module(x) / weight.abs().max())


class FastRMSNorm(nn.Module):
    """w * x / sqrt(mean(x^2) + epsilon) with a frozen w (Zhang & Sennrich 2019)."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype != torch.float32 or self.weight.requires_grad:
            stock: Tensor = super().forward(hidden_states)
            return stock
        weight, epsilon = self.weight, self.variance_epsilon
        result: Tensor = _RMSNormFunction.apply(hidden_states, weight, epsilon)  # type: ignore[no-untyped-call]
        return result


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        mean_square: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = mean_square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        grad = grad * weight
        along_x = torch.linalg.vecdot(grad, x).unsqueeze(-1)
        per_row = inverse.pow(3).mul_(along_x)
        return grad.mul_(inverse).addcmul_(x, per_row, value=-1.0 / x.shape[-1]), None, None


class _TinySwiGLU(nn.Module):
    """Stands in for `self` to see what a class's forward computes."""

    def __init__(self, act_fn: nn.Module) -> None:
        super().__init__()
        self.act_fn = act_fn
        self.gate_proj, self.up_proj, self.down_proj = (_Scale(factor) for factor in (1.0, -2.0, 3.0))


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def _is_swiglu(module: Any) -> bool:
    names = {"gate_proj", "up_proj", "down_proj", "act_fn"}
    if {name for name, _ in module.named_children()} != names or isinstance(module, FastSwiGLU):
        return False
    layers = (module.gate_proj, module.up_proj)
    if any(type(layer) is not FrozenLinear or layer.bias is not None for layer in layers):
        return False
    if any(layer.weight.dtype != torch.float32 or layer.weight.requires_grad for layer in layers):
        return False
    x = _example(8, torch.device("cpu"))
    try:
        stock = type(module).forward(_TinySwiGLU(module.act_fn), x)
    except Exception:  # the class computes something else
        return False
    return _agree(3.0 * (F.silu(x) * (-2.0 * x)), stock)


class FastSwiGLU(nn.Module):
    """down(silu(gate x) * (up x)) with frozen gate and up (Shazeer 2020); `down_proj` may be adapted."""

    gate_proj: FrozenLinear
    up_proj: FrozenLinear
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.gate_proj, self.up_proj)
        if x.dtype != torch.float32 or any(type(layer) is not FrozenLinear for layer in layers):
            stock: Tensor = super().forward(x)
            return stock
        gate, up = (layer.weight.t() if layer.fan_in_fan_out else layer.weight for layer in layers)
        output: Tensor = self.down_proj(_GatedFunction.apply(x, gate, up))  # type: ignore[no-untyped-call]
        return output


class _GatedFunction(torch.autograd.Function):
    """silu(x G^T) * (x U^T); the two products are all that is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        gate, up = rows @ gate_weight.t(), rows @ up_weight.t()
        ctx.save_for_backward(gate, up, gate_weight, up_weight)
        return F.silu(gate).mul_(up).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gate, up, gate_weight, up_weight = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(-1, shape[-1])
        grad_gate = grad * up
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        grad_x = grad_gate @ gate_weight
        grad_up = torch.mul(F.silu(gate), grad, out=grad_gate)
        return grad_x.addmm_(grad_up, up_weight).view(*shape[:-1], -1), None, None
