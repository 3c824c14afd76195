"""All layers of a model as one autograd function, where their build is known.

`build_stack` reads the layers of a Llama-like or BERT-like backbone; any other build, and any adapter
but plain LoRA, keeps the forward of transformers and peft. The stack shares the model's weights, so
peft attaches, saves and loads as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trimtab.engine.attention import Run
from trimtab.engine.fused.formats import Heads, HeadShape, Rotary, Rows, Want, Weight
from trimtab.engine.fused.layers import Attention, Batch, BertLayer, LlamaLayer, values_of
from trimtab.engine.fused.linears import Kernels, LinearGroup, NotPlainError
from trimtab.engine.fused.prefix_cache import Prefix, PrefixCache
from trimtab.engine.fused.vocabulary import VocabularyHead
from trimtab.engine.mixed import current_mix


class Formats(NamedTuple):
    """The number formats of a stack's layers, with what is laid out for them."""

    weights: list[Weight]
    is_bfloat16: list[bool]  # each layer's attention


class LayerStack:
    """The layers of `backbone` in order; `trained` is the lowest one with an adapter, None without one."""

    def __init__(self, backbone: Any, layers: Sequence[LlamaLayer | BertLayer], kernels: Kernels) -> None:
        self.backbone = backbone
        self._places = _places_in(backbone)
        self.layers = layers
        self.kernels = kernels
        self.groups = [group for layer in layers for group in layer.groups]
        self.head: VocabularyHead | None = None  # where these are the layers of a language model
        self.is_on = True  # off while layers compute by themselves, in another number format
        self.trained: int | None = None
        self.cache: PrefixCache | None = None
        self.checkpointing = False  # keep each layer's input only, and compute it again for its backward
        self._is_in_passing = False
        self.parameters: list[Tensor] = []
        self._checked: set[int] = set()  # the parameters with which all others were seen to be frozen

    def fits(self) -> bool:
        """Read the adapters as they stand now; False where one is not plain LoRA in a layer's linears."""
        if not self.is_on or torch.is_autocast_enabled("cpu"):
            return False
        if any(parent._modules.get(name) is not child for parent, name, child in self._places):
            return False  # an adapter stands around a norm, or an attention as a whole
        try:
            for group in self.groups:
                group.find_adapters()
        except NotPlainError:
            return False
        self.parameters = [parameter for group in self.groups for parameter in group.parameters]
        adapted = [number for number, layer in enumerate(self.layers) if any(g.adapters for g in layer.groups)]
        self.trained = min(adapted, default=None)
        known = set(map(id, self.parameters))
        if not known or known != self._checked:
            # The norm and the pooler come after the stack; whatever trains elsewhere must be known to it.
            inside = [part for name, part in self.backbone.named_children() if name not in ("norm", "pooler")]
            if any(p.requires_grad and id(p) not in known for part in inside for p in part.parameters()):
                return False
            self._checked = known
        return True

    @contextmanager
    def in_passing(self) -> Iterator[None]:
        """For a forward that is run once, to be looked at: each layer's weight is laid out only while it computes."""
        self.release()
        self._is_in_passing = True
        try:
            yield
        finally:
            self._is_in_passing = False

    def release(self) -> None:
        """Give back what the weights were laid out in; it is made again where a forward needs it."""
        for group in self.groups:
            group.release()

    def release_head(self) -> None:
        if self.head is not None:
            self.head.release()

    def places(self) -> dict[tuple[int, str], LinearGroup | Attention | VocabularyHead]:
        """All that can compute in a lower precision, by layer and name; the head comes behind the last layer."""
        found: dict[tuple[int, str], LinearGroup | Attention | VocabularyHead] = {}
        for number, layer in enumerate(self.layers):
            found |= {(number, group.name): group for group in layer.groups}
            found[number, Attention.name] = layer.attention.within_texts
        if self.head is not None:
            found[len(self.layers), self.head.name] = self.head
        return found

    def use_float32(self) -> None:
        for part in self.places().values():
            part.use_float32()

    def formats(self) -> Formats:
        """How the layers compute now, for `use`."""
        return Formats(
            [group.weight for group in self.groups], [layer.attention.within_texts.is_bfloat16 for layer in self.layers]
        )

    def use(self, formats: Formats) -> None:
        """Compute as the layers did when these formats were taken."""
        for group, weight in zip(self.groups, formats.weights, strict=True):
            group.weight = weight
        for layer, is_bfloat16 in zip(self.layers, formats.is_bfloat16, strict=True):
            layer.attention.within_texts.is_bfloat16 = is_bfloat16

    def hidden_states(self, inputs: dict[str, Any], runs: Sequence[Run], rows: Tensor | None) -> Tensor:
        """What `backbone(**inputs).last_hidden_state[0]` gives, at the tokens `rows` only where given."""
        mix = current_mix()
        if mix is None:
            return self._hidden_states(inputs, runs, rows)
        try:
            for group in self.groups:
                group.mix(mix)
            states = self._hidden_states(inputs, runs, None)  # a mix is told by the places of all tokens
        finally:
            for group in self.groups:
                group.mix(None)
        return states if rows is None else states.index_select(0, rows)

    def _hidden_states(self, inputs: dict[str, Any], runs: Sequence[Run], rows: Tensor | None) -> Tensor:
        backbone = self.backbone
        prefix = self._look_up(inputs, runs)
        known = None if prefix is None or prefix.states is None else prefix.states.unsqueeze(0)
        if hasattr(backbone, "rotary_emb"):
            states = backbone.embed_tokens(inputs["input_ids"]) if known is None else known
            cos, sin = backbone.rotary_emb(states, position_ids=inputs["position_ids"])
            half = cos.shape[-1] // 2
            rotary = Rotary(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
            normed: Tensor = backbone.norm(self.run(states[0], runs, rotary, rows, prefix))
            return normed
        states = backbone.embeddings(**inputs) if known is None else known
        if hasattr(backbone, "embeddings_project") and known is None:  # ELECTRA's smaller embeddings
            states = backbone.embeddings_project(states)
        return self.run(states[0], runs, None, rows, prefix)

    def _look_up(self, inputs: dict[str, Any], runs: Sequence[Run]) -> Prefix | None:
        """What the cache knows of a pack's texts; None where there is no cache, or an adapter below its layer."""
        if self.cache is None or (self.trained is not None and self.trained < self.cache.layer):
            return None
        return self.cache.look_up(inputs, _lengths_of(runs))

    def run(
        self,
        states: Tensor,
        runs: Sequence[Run],
        rotary: Rotary | None,
        rows: Tensor | None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """States [tokens, hidden] after the last layer, of `rows` only where given.

        `states` enter the first layer; where the prefix knows these texts, they are its states.
        """
        starts = torch.tensor([0, *accumulate(_lengths_of(runs))], device=states.device)
        batch = Batch(starts, rotary, rows)
        if not (torch.is_grad_enabled() and self.parameters):
            with torch.no_grad():
                return self.forward(states, batch, prefix, None)
        result: Tensor = _StackFunction.apply(states.detach(), self, batch, prefix, *self.parameters)  # type: ignore[no-untyped-call]
        return result

    def forward(self, states: Tensor, batch: Batch, prefix: Prefix | None, saved: list[Any] | None) -> Tensor:
        last = len(self.layers) - 1
        first = prefix.cache.layer if prefix is not None and prefix.states is not None else 0
        rows = self.kernels.rows_of(states, self.layers[first].wants)
        for number, layer in enumerate(self.layers[first:], first):
            if prefix is not None and prefix.states is None and number == prefix.cache.layer:
                prefix.keep(values_of(rows))
            want = Want(True, False) if number == last else self.layers[number + 1].wants
            is_saved = saved is not None and self.trained is not None and number >= self.trained
            entered = _Entered(rows, torch.get_rng_state()) if is_saved and self.checkpointing else None
            rows, kept = layer.forward(rows, batch, number == last, want)
            if self._is_in_passing:
                for group in layer.groups:
                    group.release()
            if saved is not None and is_saved:
                saved.append(entered or kept)
            del kept
        return values_of(rows)

    def backward(self, grad: Tensor, batch: Batch, saved: list[Any]) -> list[Tensor]:
        """Gradients of the adapters' parameters; `saved` has an entry for each layer from the lowest adapted one up."""
        last = len(self.layers) - 1
        lowest = len(self.layers) - len(saved)
        rows: Rows | None = self.kernels.rows_of(grad.contiguous(), self.layers[last].wants_gradient)
        found: list[list[Tensor]] = []
        for number in range(last, lowest - 1, -1):
            assert rows is not None
            want = None if number == lowest else self.layers[number - 1].wants_gradient
            kept = saved.pop()
            if isinstance(kept, _Entered):
                kept = self._run_again(number, kept, batch)
            rows, gradients = self.layers[number].backward(rows, kept, batch, number == last, want)
            del kept
            found.append(gradients)
        return [gradient for gradients in reversed(found) for gradient in gradients]

    def _run_again(self, number: int, entered: _Entered, batch: Batch) -> Any:
        """What a layer's forward keeps, with the dropout that it had."""
        random_state = torch.get_rng_state()
        torch.set_rng_state(entered.random_state)
        _, kept = self.layers[number].forward(entered.rows, batch, number == len(self.layers) - 1, Want(True, False))
        torch.set_rng_state(random_state)
        return kept


class _Entered(NamedTuple):
    """What entered a layer whose forward is to be run again."""

    rows: Rows
    random_state: Tensor


def _lengths_of(runs: Sequence[Run]) -> list[int]:
    return [run.length for run in runs for _ in range(run.texts)]


class _StackFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, stack: LayerStack, batch: Batch, prefix: Prefix | None, *parameters: Tensor
    ) -> Tensor:
        ctx.stack, ctx.batch, ctx.kept = stack, batch, []
        return stack.forward(states, batch, prefix, ctx.kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *ctx.stack.backward(grad, ctx.batch, ctx.kept)


def _places_in(backbone: Any) -> list[tuple[nn.Module, str, nn.Module]]:
    """Each part of the layers but their linears: what is around it, its name there, and itself."""
    return [(parent, name, child) for layer in _layers_of(backbone) or () for parent in layer.modules()
            for name, child in parent.named_children() if not isinstance(child, nn.Linear)]  # fmt: skip


def _layers_of(backbone: Any) -> Any:
    return getattr(backbone, "layers", None) or getattr(getattr(backbone, "encoder", None), "layer", None)


def build_stack(backbone: Any, kernels: Kernels) -> LayerStack | None:
    """The stack of `backbone`, or None where its layers have another build.

    What names and types do not show (scaled residuals, other masks) is left to a comparison of outputs.
    """
    layers = _layers_of(backbone)
    if not isinstance(layers, nn.ModuleList):
        return None
    fits, build = (_is_llama, _build_llama) if hasattr(backbone, "layers") else (_is_bert, _build_bert)
    try:
        if not all(fits(layer, backbone.config) for layer in layers):
            return None
        if any(parameter.dtype != torch.float32 for parameter in backbone.parameters()):
            return None
        return LayerStack(backbone, [build(layer, backbone.config, kernels) for layer in layers], kernels)
    except AttributeError:  # a part that the known builds have is not there
        return None


def _is_llama(layer: Any, config: Any) -> bool:
    return bool(
        _children(layer) == {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
        and _children(layer.self_attn) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and _children(layer.mlp) == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and config.hidden_act == "silu"
        and hasattr(layer.input_layernorm, "variance_epsilon")
    )


def _build_llama(layer: Any, config: Any, kernels: Kernels) -> LlamaLayer:
    attention = layer.self_attn
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    shape = HeadShape(config.num_attention_heads, config.num_key_value_heads, attention.head_dim)
    return LlamaLayer(layer, Heads(shape, attention.scaling, True, window), kernels)


def _is_bert(layer: Any, config: Any) -> bool:
    return bool(
        _children(layer) == {"attention", "intermediate", "output"}
        and _children(layer.attention) == {"self", "output"}
        and _children(layer.attention.output) == _children(layer.output) == {"dense", "LayerNorm"}
        and _children(layer.attention.self) == {"query", "key", "value"}
        and config.hidden_act == "gelu"
        and not config.is_decoder
    )


def _build_bert(layer: Any, config: Any, kernels: Kernels) -> BertLayer:
    shape = HeadShape(config.num_attention_heads, config.num_attention_heads, layer.attention.self.attention_head_size)
    return BertLayer(layer, Heads(shape, shape.dim**-0.5, False), kernels)


def _children(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children() if not isinstance(child, nn.Dropout)}
