"""PEFT methods, a row each: what peft calls them, the defaults that learn, the layers they go to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from trimtab.errors import StudyError, suggest

# Where `target_modules: auto` puts a method: query and value projections; keys, values and feed-forward outputs;
# norms; or into no layer at all.
Places = Literal["attention", "keys_values_feedforward", "norms", "none"]


class SizeRule(NamedTuple):
    """A config field whose value has to suit every adapted layer: `allows(value, inputs, outputs)`.

    `instead` is peft's other way to say the same, with which the field has to be 0.
    """

    field: str
    allows: Callable[[int, int, int], bool]
    instead: str | None = None


@dataclass(frozen=True)
class Method:
    """One row.

    `learning_rate` works without being asked on 6 layers of 384 (docs/methods.md shows what each learnt).
    `settings` maps a study's fields to the config's; `options` are the config's fields where peft's own
    defaults do not serve. `rates` gives a parameter's factor of the learning rate, by its name.
    `softens_head`: training goes on from a softer head (docs/decisions.md, 96); not where the features move little.
    """

    name: str
    title: str
    peft_type: str  # a name in peft.PeftType; empty for what is no adapter
    learning_rate: float
    places: Places = "attention"
    settings: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    size: SizeRule | None = None
    starts_at_base: bool = True
    rates: Callable[[str], float] | None = None
    softens_head: bool = True
    refused_bits: tuple[str, ...] = ()  # quantised bases that it cannot train on
    trains_head_only: bool = False
    set_by_training: tuple[str, ...] = ()  # options that follow from the number of steps

    @property
    def short_title(self) -> str:
        return self.title.split(" (")[0]

    @property
    def is_adapter(self) -> bool:
        return bool(self.peft_type)


_RANK = {"r": "r"}
_LORA = {"r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
_LORA_OPTIONS = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
_VIRTUAL_TOKENS = 20
_ALL_BITS = ("8bit", "4bit")


def _lora_plus(name: str) -> float:
    """B learns 16 times as fast as A (Hayou et al. 2024, section 5)."""
    return 16.0 if "lora_B" in name else 1.0


def _vector_bank(name: str) -> float:
    """The choice among the bank's vectors learns ten times as fast as the vectors (Li et al. 2024, table 7)."""
    return 10.0 if "vblora_logits" in name else 1.0


_ROWS = (
    Method("lora", "LoRA (Hu et al. 2021)", "LORA", 2e-3, settings=_LORA, options=_LORA_OPTIONS),
    Method("rslora", "rank-stabilised LoRA (Kalajdzievski 2023)", "LORA", 1e-3, settings=_LORA,
           options=_LORA_OPTIONS | {"use_rslora": True}),
    Method("dora", "weight-decomposed LoRA (Liu et al. 2024)", "LORA", 2e-3, settings=_LORA,
           options=_LORA_OPTIONS | {"use_dora": True}, refused_bits=("8bit",)),
    Method("pissa", "PiSSA, LoRA from the principal singular vectors (Meng et al. 2024)", "LORA", 1e-3, settings=_LORA,
           options=_LORA_OPTIONS | {"init_lora_weights": "pissa", "lora_alpha": 8, "lora_dropout": 0.0},
           size=SizeRule("r", lambda r, inputs, outputs: r <= min(inputs, outputs)), refused_bits=_ALL_BITS),
    Method("loraplus", "LoRA+ (Hayou et al. 2024)", "LORA", 5e-4, settings=_LORA, options=_LORA_OPTIONS,
           rates=_lora_plus),
    Method("adalora", "AdaLoRA (Zhang et al. 2023)", "ADALORA", 5e-3,
           settings={"r": "target_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"},
           options={"target_r": 8, "lora_alpha": 16, "lora_dropout": 0.05},
           set_by_training=("total_step", "tinit", "tfinal"), softens_head=False),
    Method("ia3", "(IA)3 (Liu et al. 2022)", "IA3", 1e-2, places="keys_values_feedforward"),
    Method("loha", "LoHa, Hadamard products (Hyeon-Woo et al. 2022)", "LOHA", 2e-3, settings=_RANK,
           refused_bits=("4bit",), softens_head=False),
    Method("lokr", "LoKr, Kronecker products (Yeh et al. 2024)", "LOKR", 2e-3, settings=_RANK, refused_bits=("4bit",),
           softens_head=False),
    Method("vera", "VeRA, scaled random matrices (Kopiczko et al. 2024)", "VERA", 2e-2, settings=_RANK),
    Method("oft", "OFT, orthogonal blocks (Qiu et al. 2023)", "OFT", 2e-3,
           size=SizeRule("oft_block_size", lambda size, inputs, outputs: size > 1 and inputs % size == 0, "r")),
    Method("boft", "BOFT, orthogonal butterflies (Liu et al. 2024)", "BOFT", 5e-3,
           size=SizeRule("boft_block_size",
                         lambda size, inputs, outputs: size > 1 and size % 2 == 0 and inputs % (2 * size) == 0,
                         "boft_block_num")),
    Method("hra", "HRA, Householder reflections (Yuan et al. 2024)", "HRA", 2e-3, settings=_RANK,
           size=SizeRule("r", lambda r, inputs, outputs: r % 2 == 0 and r <= inputs), refused_bits=("4bit",),
           softens_head=False),
    Method("fourierft", "FourierFT (Gao et al. 2024)", "FOURIERFT", 2e-2, options={"init_weights": True},
           size=SizeRule("n_frequency", lambda count, inputs, outputs: count <= inputs * outputs)),
    Method("miss", "MiSS, shared shards (Kang & Yin 2024)", "MISS", 1e-3, settings=_RANK,
           size=SizeRule("r", lambda r, inputs, outputs: r <= inputs)),
    Method("randlora", "RandLoRA, sums of random matrices (Albert et al. 2025)", "RANDLORA", 2e-3, settings=_RANK),
    Method("vblora", "VB-LoRA, a shared vector bank (Li et al. 2024)", "VBLORA", 1e-3, settings=_RANK,
           starts_at_base=False, rates=_vector_bank, softens_head=False,
           size=SizeRule("vector_length", lambda size, inputs, outputs: inputs % size == outputs % size == 0)),
    Method("c3a", "C3A, circular convolutions (Chen et al. 2025)", "C3A", 2e-2, options={"init_weights": True},
           size=SizeRule("block_size", lambda size, inputs, outputs: inputs % size == outputs % size == 0),
           refused_bits=("8bit",), softens_head=False),
    Method("shira", "SHiRA, sparse high rank (Bhardwaj et al. 2024)", "SHIRA", 2e-3, settings=_RANK,
           options={"random_seed": 0},
           size=SizeRule("r", lambda r, inputs, outputs: r * (inputs + outputs) <= inputs * outputs)),
    Method("road", "RoAd, 2-D rotations (Liao & Monz 2024)", "ROAD", 5e-3,
           size=SizeRule("group_size", lambda size, inputs, outputs: size % 2 == 0 and outputs % size == 0),
           softens_head=False),
    Method("ln_tuning", "LayerNorm tuning (Zhao et al. 2024)", "LN_TUNING", 2e-3, places="norms"),
    Method("trainable_tokens", "trainable tokens (embeddings of the commonest)", "TRAINABLE_TOKENS", 5e-3,
           places="none", softens_head=False),
    Method("prompt_tuning", "prompt tuning (Lester et al. 2021)", "PROMPT_TUNING", 2e-2, places="none",
           options={"num_virtual_tokens": _VIRTUAL_TOKENS, "prompt_tuning_init": "SAMPLE_VOCAB"}, starts_at_base=False,
           softens_head=False),
    Method("p_tuning", "P-tuning (Liu et al. 2021)", "P_TUNING", 1e-3, places="none",
           options={"num_virtual_tokens": _VIRTUAL_TOKENS}, starts_at_base=False, softens_head=False),
    Method("prefix_tuning", "prefix tuning (Li & Liang 2021)", "PREFIX_TUNING", 1e-2, places="none",
           options={"num_virtual_tokens": _VIRTUAL_TOKENS}, starts_at_base=False, softens_head=False),
    Method("adaption_prompt", "LLaMA-Adapter (Zhang et al. 2023)", "ADAPTION_PROMPT", 1e-2, places="none",
           options={"adapter_len": 10}, softens_head=False),
    Method("full", "full fine-tuning, no adapter", "", 2e-4, places="none", refused_bits=_ALL_BITS),
    Method("linear_probe", "linear probe, the head alone on a frozen base", "", 3e-3, places="none",
           refused_bits=_ALL_BITS, trains_head_only=True, softens_head=False),
)  # fmt: skip

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})

# Methods of peft that need what a study does not have.
UNUSABLE: Mapping[str, str] = MappingProxyType({
    "multitask_prompt_tuning": "it learns several tasks at once, and asks for a task's number with each text",
    "poly": "it learns several tasks at once, and asks for a task's number with each text",
    "shadow": "it computes beside the base's layers, outside of what they are asked for",
    "xlora": "it mixes adapters that are trained already, and trains none; trimtab combine makes one of several",
})  # fmt: skip


def get_method(name: str) -> Method:
    """The method called `name`: a row of the table, or anything else that the installed peft knows.

    Raises:
        StudyError: unknown, with the nearest and all known ones.
    """
    if name in METHODS:
        return METHODS[name]
    import dataclasses

    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    others = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in others:
        raise StudyError(
            f"unknown method {name!r}{suggest(name, [*METHODS, *others])}; there are: {', '.join(METHODS)}, "
            f"and, with peft's own defaults: {', '.join(sorted(set(others) - set(METHODS)))}"
        )
    fields = {part.name for part in dataclasses.fields(others[name])}
    return Method(
        name, f"{name} (peft's own defaults)", name.upper(), 1e-3,
        places="attention" if "target_modules" in fields else "none",
        settings={setting: setting for setting in _LORA if setting in fields}, starts_at_base=False,
        options={"num_virtual_tokens": _VIRTUAL_TOKENS} if "num_virtual_tokens" in fields else {},
    )  # fmt: skip
