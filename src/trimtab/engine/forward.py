"""A model's forward, packed or padded, chosen by comparing outputs at load.

`PaddedForward` is the plain twin: transformers' own forward on padded rows. `PackedForward` must give
the same logits, or it is not used; where it can, it runs all layers as one function (`fused`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trimtab.engine import attention
from trimtab.engine.batches import Batch, Collator
from trimtab.engine.fused import native
from trimtab.engine.fused.stack import LayerStack, build_stack
from trimtab.engine.fused.vocabulary import VocabularyHead
from trimtab.engine.last_layer import only_rows
from trimtab.engine.memory import weights_read_in_passing
from trimtab.engine.mixed import current_mix
from trimtab.tasks.examples import Example
from trimtab.tasks.heads import (
    backbone_of,
    final_linear,
    is_language_model,
    logits_from_pooled,
    pools_first_token,
    pools_last_token,
    readout_of,
)
from trimtab.tasks.token_loss import LanguageHead, Readout

# Largest difference in logits between a packed and a lone text that counts as equal: of 1, or of the largest logit,
# since language models' are in the tens.
PROBE_TOLERANCE = 1e-5


class Forward(Protocol):
    """States and logits at the positions that a batch asks for, in its order."""

    packed: bool
    model: Any

    @property
    def name(self) -> str:
        """How the layers are computed: fused, packed or padded."""
        ...

    def states(self, batch: Batch) -> Tensor:
        """[positions, hidden] that the head reads."""
        ...

    def logits(self, batch: Batch) -> Tensor:
        """[positions, classes]."""
        ...

    def head(self) -> LanguageHead:
        """What turns states into losses, where the model is one of language."""
        ...


class PaddedForward:
    packed = False
    name = "padded"

    def __init__(self, model: Any) -> None:
        self.model = model

    def states(self, batch: Batch) -> Tensor:
        states: Tensor = backbone_of(self.model)(**self._inputs(batch)).last_hidden_state
        return states.flatten(0, 1).index_select(0, batch.pooled)

    def logits(self, batch: Batch) -> Tensor:
        logits: Tensor = self.model(**self._inputs(batch)).logits
        return logits if logits.dim() == 2 else logits.flatten(0, 1).index_select(0, batch.pooled)

    def head(self) -> LanguageHead:
        return readout_of(self.model)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        if batch.decoder_input_ids is not None:
            inputs["decoder_input_ids"] = batch.decoder_input_ids
        if getattr(self.model.config, "use_cache", False):
            inputs["use_cache"] = False
        return inputs


class EncoderDecoderForward(PaddedForward):
    """Sources and targets padded; the states are those that enter the vocabulary's head, whatever the family scales."""

    def __init__(self, model: Any, called: Any = None) -> None:
        super().__init__(model)
        self.called = called or model  # peft's model, where the method puts tokens of its own before the texts

    def states(self, batch: Batch) -> Tensor:
        caught: list[Tensor] = []

        def take(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            caught.append(inputs[0])
            return (inputs[0][:0],)  # the task's own loss does without the logits of all positions

        handle = self.model.get_output_embeddings().register_forward_pre_hook(take)
        try:
            self.called(**self._inputs(batch))
        finally:
            handle.remove()
        return caught[0].flatten(0, 1).index_select(0, batch.pooled)

    def logits(self, batch: Batch) -> Tensor:
        return logits_from_pooled(self.model, self.states(batch))


class PromptForward(PaddedForward):
    """Prompt, prefix and P-tuning: peft puts virtual tokens before each text, so texts are padded, never packed."""

    name = "padded with virtual tokens"

    def __init__(self, peft_model: Any) -> None:
        super().__init__(peft_model.get_base_model())
        self.peft_model = peft_model
        # A stock encoder's head reads the first position, even where that is a virtual token's.
        self.reads_first = pools_first_token(self.model)

    def states(self, batch: Batch) -> Tensor:
        caught: list[Tensor] = []
        backbone = backbone_of(self.model)
        handle = backbone.register_forward_hook(lambda _, inputs, output: caught.append(output[0]))
        keep = {"logits_to_keep": 1} if is_language_model(self.model) else {}  # the task's own loss does without
        try:
            self.peft_model(**self._inputs(batch), **keep)
        finally:
            handle.remove()
        longest = batch.input_ids.shape[1]
        texts = batch.pooled // longest
        places = batch.pooled % longest
        if not self.reads_first:
            places = places + caught[0].shape[1] - longest  # the virtual tokens are at the beginning
        return caught[0][texts, places]

    def logits(self, batch: Batch) -> Tensor:
        return logits_from_pooled(self.model, self.states(batch))


class PackedForward:
    packed = True

    def __init__(self, model: Any, stack: LayerStack | None = None) -> None:
        self.model = model
        self.stack = stack  # the layers as one function, used where their adapters allow it
        self.limited = False  # whether the last layer can leave out what is not pooled

    @property
    def name(self) -> str:
        return "fused" if self.stack is not None and self.stack.fits() else "packed"

    def states(self, batch: Batch) -> Tensor:
        return self.hidden_states(batch, batch.pooled)

    def logits(self, batch: Batch) -> Tensor:
        return logits_from_pooled(self.model, self.states(batch))

    def head(self) -> LanguageHead:
        readout = readout_of(self.model)
        head = None if self.stack is None else self.stack.head
        return head if head is not None and head.serves(readout) else readout

    def hidden_states(self, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """[tokens, hidden] of the backbone's last layer; of the tokens `rows` only, where they are given."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        assert batch.runs is not None
        if self.stack is not None and self.stack.fits():
            return self.stack.hidden_states(inputs, batch.runs, rows)
        if getattr(self.model.config, "use_cache", False):
            inputs["use_cache"] = False  # a cache would let texts see each other, and costs memory
        limited = self.limited and current_mix() is None  # a mix is told by the places of all tokens
        with only_rows(rows if limited else None):
            states: Tensor = backbone_of(self.model)(**inputs, packed_runs=batch.runs).last_hidden_state[0]
        return states if rows is None or limited else states.index_select(0, rows)


class HeadFeatures:
    """Catches what enters the head's final linear: the features that a linear probe is fitted on.

    Use as a context manager around forward calls on a model without an adapter.
    """

    def __init__(self, model: Any) -> None:
        self.linear = final_linear(model)
        self.caught: list[Tensor] = []

    def __enter__(self) -> HeadFeatures:
        self._handle = self.linear.register_forward_pre_hook(lambda _, inputs: self.caught.append(inputs[0]))
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def take(self, batch: Batch) -> Tensor:
        """[rows, features] of the batch just run."""
        features = self.caught.pop()
        if features.dim() == 3:  # a stock decoder applies its head to every token before it pools
            features = features.flatten(0, 1).index_select(0, batch.pooled)
        return features


class Choice(NamedTuple):
    forward: Forward
    position_offset: int
    reason: str  # why packing is not used; empty where it is


def choose_forward(model: Any, pad_token_id: int, max_length_tokens: int, type_ids: bool) -> Choice:
    """Packed if texts packed together give what each gives alone through the stock forward."""
    if model.config.is_encoder_decoder:
        return Choice(EncoderDecoderForward(model), 0, "a decoder that answers an encoder is not packed")
    stock = model.config._attn_implementation
    offset = _position_offset(model)
    reason = ""
    try:
        attention.register()
        model.set_attn_implementation(attention.IMPLEMENTATION)
        if model.config._attn_implementation != attention.IMPLEMENTATION:  # transformers only logs it
            raise NotImplementedError(f"{type(model).__name__} takes no registered attention")
        probe = _make_probe(model, offset, pad_token_id, max_length_tokens, type_ids, stock)
        fused = _fused_forward(model, probe)
        if fused is not None:
            return Choice(fused, offset, "")
        difference = probe(PackedForward(model))
        if not difference <= PROBE_TOLERANCE:
            reason = f"packed texts differ from lone ones by {difference:.1e}"
    except Exception as error:  # whatever a model does with a pack, the padded path still stands
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not reason:
        return Choice(PackedForward(model), offset, "")
    model.set_attn_implementation(stock)
    return Choice(PaddedForward(model), 0, reason)


def stock_forward(model: Any) -> Choice:
    """The forward of transformers, and of peft's layers if there are any, without a path of ours."""
    use_stock_attention(model)
    forward = EncoderDecoderForward(model) if model.config.is_encoder_decoder else PaddedForward(model)
    return Choice(forward, 0, "as transformers does")


def use_stock_attention(model: Any) -> None:
    """Let the model attend as transformers does: padding and caches are what that is for."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")


def _position_offset(model: Any) -> int:
    """RoBERTa's positions start after its padding index; everyone else's at 0."""
    for name, module in model.named_modules():
        is_position = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if is_position and module.padding_idx is not None:
            return int(module.padding_idx) + 1
    return 0


def usable_length(model: Any, wanted: int, reserved: int = 0) -> int:
    """`wanted` tokens, or as many as the model has positions for beside `reserved` ones."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return wanted if positions is None else min(wanted, positions - _position_offset(model) - reserved)


def _fused_forward(model: Any, probe: Callable[[PackedForward], float]) -> PackedForward | None:
    """The packed forward with its layers as one function; None where that differs, or has no kernels here."""
    if next(model.parameters()).device.type != "cpu" or not native.is_available():
        return None
    stack = build_stack(backbone_of(model), native)
    if stack is None:
        return None
    forward = PackedForward(model, stack)
    try:
        if is_language_model(model):
            stack.head = _vocabulary_head(readout_of(model))
        with stack.in_passing():
            return forward if probe(forward) <= PROBE_TOLERANCE else None
    except (RuntimeError, AttributeError, TypeError):  # a build that looks known and is not
        return None


def _vocabulary_head(readout: Readout) -> VocabularyHead | None:
    """The language model's head by the kernels, if that gives the same losses."""
    head = VocabularyHead(readout.weight, native)
    if not head.serves(readout):
        return None
    states, labels = readout.weight.detach()[:8], torch.arange(8)
    (ours, _), (stock, _) = head.losses(states, labels), readout.losses(states, labels)
    difference = float((ours - stock).abs().max() / stock.abs().max().clamp_min(1.0))
    head.release()  # not every use of a model asks for losses
    return head if difference <= PROBE_TOLERANCE else None


def _make_probe(
    model: Any, offset: int, pad_token_id: int, max_length_tokens: int, type_ids: bool, stock: str
) -> Callable[[PackedForward], float]:
    """A function that tells the largest logit difference between texts packed together and each alone, stock.

    The difference is relative to the largest logit where that is above 1.
    """
    # Two of one length share a run; the longest shows windows that short texts never reach.
    lengths = [3, 7, 7, max(7, max_length_tokens)]
    generator = torch.Generator().manual_seed(0)
    vocabulary = [
        token for token in range(min(1000, model.config.get_text_config().vocab_size)) if token != pad_token_id
    ]
    pools_last = pools_last_token(model) or is_language_model(model)
    examples = []
    for length in lengths:
        picks = torch.randint(len(vocabulary), (length,), generator=generator).tolist()
        ids = [vocabulary[i] for i in picks]
        examples.append(Example(ids, [0] * length if type_ids else None, [length - 1 if pools_last else 0], [0]))
    device = next(model.parameters()).device
    pack = Collator(examples, True, offset, pad_token_id).collate(range(len(examples))).to(device)
    model.set_attn_implementation(stock)
    with torch.no_grad(), weights_read_in_passing(model):
        alone = _logits_alone(model, examples, pad_token_id, device)
    model.set_attn_implementation(attention.IMPLEMENTATION)

    def difference(forward: PackedForward) -> float:
        with torch.no_grad():
            return float((forward.logits(pack) - alone).abs().max() / alone.abs().max().clamp_min(1.0))

    return difference


def _logits_alone(model: Any, examples: Sequence[Example], pad_token_id: int, device: torch.device) -> Tensor:
    collator = Collator(examples, False, 0, pad_token_id)
    return torch.cat([PaddedForward(model).logits(collator.collate([i]).to(device)) for i in range(len(examples))])
