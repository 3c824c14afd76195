"""LoRA linears with fewer passes over memory than peft's, and the same maths.

`speed_up_lora` changes the class of peft's layers; their weights, names and every method but
`forward` stay peft's, so saving, loading, merging and switching work as before. The plain twin is
`peft.tuners.lora.layer.Linear.forward`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.engine.frozen import FrozenLinear
from trimtab.engine.fused.formats import DROPOUT_LEVELS
from trimtab.engine.mixed import Mix, current_mix


def speed_up_lora(model: nn.Module) -> int:
    """Let each plain LoRA linear of `model` compute in one autograd function; returns how many.

    Call it once peft has attached and `freeze_linears` has run. A layer that is not plain when it
    is called (several adapters, DoRA, merged, disabled, not float32) computes as peft does.
    """
    layers = [layer for layer in model.modules() if type(layer) is PeftLinear]
    for layer in layers:
        layer.__class__ = FastLoraLinear
    return len(layers)


def can_mix(model: nn.Module, adapters: Iterable[str]) -> bool:
    """Whether every layer that peft has put into `model` is plain LoRA, so that a batch can mix these adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = set(adapters)
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    return bool(layers) and all(isinstance(layer, FastLoraLinear) and layer.can_mix(names) for layer in layers)


class _Parts(NamedTuple):
    """What one plain LoRA layer computes with; `weight` is [out, in]."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout: float


class FastLoraLinear(PeftLinear):  # type: ignore[misc]
    """peft's LoRA linear; its forward takes the short way where nothing unusual is asked for."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mix = current_mix()
        if mix is not None and not self.disable_adapters:
            return self._mixed(x, mix)
        parts = None if args or kwargs else self._plain_parts(x)
        if parts is None:
            stock: Tensor = super().forward(x, *args, **kwargs)
            return stock
        result: Tensor = _LoraFunction.apply(x, *parts)  # type: ignore[no-untyped-call]
        return result

    def can_mix(self, adapters: set[str]) -> bool:
        mine = adapters & set(self.lora_A)
        plain = not (self.merged or mine & set(self.lora_variant) or mine & set(self.lora_embedding_A))
        return plain and all(
            self.lora_B[name].bias is None and self.lora_B[name].weight.dtype == torch.float32 for name in mine
        )

    def _mixed(self, x: Tensor, mix: Mix) -> Tensor:
        """Each share of a batch with its own adapter."""
        result: Tensor = self.base_layer(x)
        inputs, output = (part.reshape(len(mix.numbers), -1, part.shape[-1]) for part in (x, result))
        for name, places in zip(mix.names, mix.shares, strict=True):
            if name in self.lora_A:
                lora_a, lora_b = self.lora_A[name].weight, self.lora_B[name].weight
                added = inputs.index_select(0, places) @ lora_a.t() @ lora_b.t()
                output.index_add_(0, places, added, alpha=float(self.scaling[name]))
        return output.view_as(result)

    def _plain_parts(self, x: Tensor) -> _Parts | None:
        """The layer's tensors, or None where only peft's own forward is right."""
        if self.disable_adapters or self.merged or self.lora_variant or len(self.active_adapters) != 1:
            return None
        adapter = self.active_adapters[0]
        base = self.base_layer
        if adapter not in self.lora_A or type(base) not in (nn.Linear, FrozenLinear):
            return None
        lora_a, lora_b, dropout = self.lora_A[adapter], self.lora_B[adapter], self.lora_dropout[adapter]
        if type(dropout) not in (nn.Dropout, nn.Identity) or lora_b.bias is not None:
            return None
        tensors = (x, base.weight, lora_a.weight, lora_b.weight)
        if any(tensor.dtype != torch.float32 for tensor in tensors):
            return None
        if getattr(base, "number_format", "float32") != "float32" or base._forward_hooks:  # its own forward is wanted
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        if any(parameter.requires_grad for parameter in base.parameters()):
            return None
        weight = base.weight.t() if getattr(base, "fan_in_fan_out", False) else base.weight
        rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return _Parts(weight, base.bias, lora_a.weight, lora_b.weight, float(self.scaling[adapter]), rate)


def draw_keep_mask(shape: torch.Size, dropout: float, device: torch.device) -> tuple[Tensor, float]:
    """An int8 mask of ones with zeros at rate `dropout`, and the scale that keeps the mean.

    The bits come from torch's global generator, four elements from each 64-bit integer: a seventh
    of the time of `bernoulli_`. The scale is exact for the rate as rounded to 1/65536.
    """
    dropped = min(round(dropout * DROPOUT_LEVELS), DROPOUT_LEVELS - 1)
    elements = shape.numel()
    words = torch.empty((elements + 3) // 4, dtype=torch.int64, device=device).random_(-(1 << 63), None)
    bits = words.view(torch.int16)[:elements].view(shape)
    # As int8, not bool: float * int8 takes less than half the time of float * bool.
    keep = (bits >= dropped - DROPOUT_LEVELS // 2).view(torch.int8)
    return keep, DROPOUT_LEVELS / (DROPOUT_LEVELS - dropped)


class _LoraFunction(torch.autograd.Function):
    """y = x W^T + b + scaling * dropout(x) A^T B^T with W and b frozen (Hu et al. 2021, section 4.1)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        keep, inputs = None, rows
        if dropout > 0.0:
            keep, scale = draw_keep_mask(rows.shape, dropout, rows.device)
            inputs, scaling = rows * keep, scaling * scale
        small = (inputs @ lora_a.t()).mul_(scaling)
        output = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        ctx.save_for_backward(rows, keep, small, weight, lora_a, lora_b)
        ctx.scaling = scaling
        return output.addmm_(small, lora_b.t()).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, keep, small, weight, lora_a, lora_b = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(-1, shape[-1])
        # Transposed, [rank, rows], these thin products take half the time.
        grad_small = (lora_b.t() @ grad.t()).mul_(ctx.scaling)
        grad_a = grad_small @ (rows if keep is None else rows * keep)
        grad_b = (small.t() @ grad).t()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            if keep is None:
                grad_x.addmm_(grad_small.t(), lora_a)
            else:
                grad_x.add_((grad_small.t() @ lora_a).mul_(keep))
            grad_x = grad_x.view(*shape[:-1], -1)
        return grad_x, None, None, grad_a, grad_b, None, None
