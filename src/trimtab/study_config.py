"""Every setting of a study, once: type, default, limits and help.

The CLI makes its flags from these fields, the YAML file is read through them, and the run folder
keeps them resolved. What a setting does lives where it is used.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from trimtab.errors import StudyError, suggest

Task = Literal["classification", "multilabel", "regression", "token_classification", "causal_lm", "seq2seq",
               "preference"]  # fmt: skip
Quantize = Literal["none", "8bit", "4bit"]
Precision = Literal["float32", "bfloat16", "float16", "int8", "auto"]

# What a run folder's name leaves out of a data file's.
_DATA_SUFFIX = re.compile(
    r"\.(csv|tsv|tab|jsonl|ndjson|json|parquet|conll|iob2?|bio)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE
)


class StudyConfig(BaseModel):
    """One question: this model, these data, this method."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    model: str = Field("starter:smollm2-135m", description="Base model: a folder, a Hub id, or starter:NAME.")
    task: Task = Field(
        "classification",
        description="What is learnt: classification (one label a text), multilabel (any number of labels), regression "
        "(a number), token_classification (a tag a word), causal_lm (texts, prompts with completions, chats), "
        "seq2seq (a text for a text, by an encoder and a decoder), or preference (the better of two answers, by DPO).",
    )
    train_data: str = Field(
        "starter:rotten-tomatoes",
        description="Training rows: CSV, TSV or JSONL (plain or compressed), Parquet, a datasets folder, "
        "a Hub id (name or name:config), or starter:NAME.",
    )
    validation_data: str | None = Field(
        None, description="Validation rows; if missing, a tenth of train (a fifth of few texts)."
    )
    test_data: str | None = Field(None, description="Test rows; if missing, a tenth of train (a fifth of few texts).")
    text_column: str | None = Field(None, description="Column with the text; found by name if missing.")
    text_pair_column: str | None = Field(
        None,
        description="Column with a second text, for pairs; a decoder that marks no "
        "border gets a line break between the two.",
    )
    label_column: str | None = Field(None, description="Column with the label; found by name if missing.")
    completion_column: str | None = Field(
        None, description="causal_lm: column with what follows the prompt in text_column; only this is learnt."
    )
    target_column: str | None = Field(
        None, description="seq2seq: column with the text that is to be written; found by name if missing."
    )
    chosen_column: str | None = Field(
        None, description="preference: column with the better answer; found by name if missing."
    )
    rejected_column: str | None = Field(
        None, description="preference: column with the other answer; found by name if missing."
    )
    messages_column: str | None = Field(
        None, description="causal_lm: column with chats, lists of role and content; the assistant's turns are learnt."
    )
    group_column: str | None = Field(
        None, description="Rows with the same value here stay in one split, and are resampled together."
    )
    max_length_tokens: int = Field(256, ge=4, description="Longer texts are cut to this many tokens.")
    max_train_rows: int | None = Field(None, ge=2, description="Use at most this many training rows (seeded).")
    max_validation_rows: int | None = Field(None, ge=2, description="At most this many validation rows.")
    max_test_rows: int | None = Field(None, ge=2, description="At most this many test rows.")
    max_probe_positions: int = Field(
        20_000,
        ge=2,
        description="The linear probe, where the head starts, is fitted on at most this many labelled texts (words, in "
        "token_classification; more only if classes ask for it), its regularisation chosen on as many of validation; "
        "fewer start training sooner.",
    )
    method: str = Field("lora", description="PEFT method, such as lora, dora or ia3; `trimtab methods` shows them all.")
    r: int | None = Field(
        None, ge=1, le=1024, description="Rank of the adapter; the method's own default if missing (LoRA: 8)."
    )
    lora_alpha: int | None = Field(
        None, ge=1, description="LoRA's scale is lora_alpha / r; the method's own default if missing (LoRA: 16)."
    )
    lora_dropout: float | None = Field(
        None, ge=0.0, lt=1.0, description="Dropout on LoRA's input; the method's own default if missing (LoRA: 0.05)."
    )
    method_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Any other field of the method's peft config, as NAME=VALUE; repeat the flag for several.",
    )
    target_modules: str = Field(
        "auto", description="Layers to adapt: auto, all-linear, or names such as q_proj,v_proj."
    )
    new_tokens: str = Field(
        "",
        description="Tokens to add to the vocabulary, such as <user>,<agent>; their embeddings are trained and saved "
        "with the adapter.",
    )
    layers_to_transform: str = Field(
        "all",
        description="Which layers get an adapter: all, upper-half, upper-quarter, or a range such as 20-29. What lies "
        "below the lowest one is kept for each text, within cache_budget_gib.",
    )
    cache_budget_gib: float = Field(
        2.0, ge=0, description="Disk for states below the lowest adapted layer, over all runs, in GiB; 0 keeps none."
    )
    learning_rate: Literal["auto"] | float = Field(
        "auto", description="Peak learning rate; auto takes the method's default."
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="classification: balanced weighs each class's loss by one over its share of the rows."
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="preference: how strongly DPO holds the tuned model to the base; less lets it go far.",
    )
    num_train_epochs: float = Field(2.0, gt=0, description="Passes over the training rows.")
    tokens_per_batch: int = Field(512, ge=8, description="Tokens in a training batch; texts are packed, not padded.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="Compute each batch in so many parts, one after another: less memory, the same update."
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Keep each layer's input only, and compute the layer again for its backward: less memory, a third "
        "slower, the same update. auto does so where a batch would not fit the memory that is free.",
    )
    warmup_ratio: float = Field(0.06, ge=0.0, lt=1.0, description="Share of the steps in which the rate rises.")
    weight_decay: float = Field(0.0, ge=0.0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    evaluations_per_epoch: int = Field(2, ge=1, description="How often validation is scored in an epoch.")
    early_stopping_patience: int = Field(4, ge=1, description="Stop after this many validations without a better one.")
    seed: int = Field(0, ge=0, description="Seeds the split, the head, the order of rows and dropout.")
    precision: Precision = Field(
        "float32",
        description="Number format of the frozen layers in training: float32, int8, bfloat16, float16 (layers whose "
        "error is within bounds), or auto: int8 or bfloat16 where this machine multiplies it at least twice as fast. "
        "Scores are always float32.",
    )
    quantize: Quantize = Field(
        "none",
        description="Keep the base's linears in 8 or 4 bits (bitsandbytes; nf4 with double quantisation): less memory, "
        "slower. Every system of the run is then scored on that base.",
    )
    out: str | None = Field(None, description="Run folder; runs/<model>-<data>-<method> if missing.")

    @field_validator("learning_rate")
    @classmethod
    def _rate_is_positive(cls, value: float | str) -> float | str:
        if isinstance(value, float) and not 0 < value < float("inf"):
            raise ValueError(f"Input should be 'auto' or a positive number, not {value}")
        return value

    @property
    def added_tokens(self) -> list[str]:
        """`new_tokens`, one by one."""
        return list(dict.fromkeys(filter(None, map(str.strip, self.new_tokens.split(",")))))

    @property
    def class_weight(self) -> str | None:
        """scikit-learn's word for `class_weights`."""
        return None if self.class_weights == "none" else self.class_weights

    @property
    def name(self) -> str:
        return Path(self.out).name if self.out else self.default_name()

    def default_name(self) -> str:
        parts = (self.model, self.train_data, self.method)
        ends = (part.removeprefix("starter:").rstrip("/").split("/")[-1] for part in parts)
        return "-".join(_DATA_SUFFIX.sub("", end).replace(":", "-") for end in ends)

    @property
    def run_folder(self) -> Path:
        return Path(self.out) if self.out else Path("runs") / self.default_name()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def build_study(settings: dict[str, Any]) -> StudyConfig:
    """A checked study from plain settings.

    Raises:
        StudyError: an unknown setting (with the nearest known one) or a value out of range.
    """
    try:
        return StudyConfig(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "study"
        if first["type"] == "extra_forbidden":
            raise StudyError(
                f"unknown setting {name!r}{suggest(name, StudyConfig.model_fields)}; "
                "`trimtab run --help` lists them all"
            ) from None
        raise StudyError(f"{name}: {first['msg']}; received {first['input']!r}") from None


def read_study_file(path: Path) -> dict[str, Any]:
    """The settings in a study file.

    Raises:
        StudyError: no such file, not YAML, or not a mapping.
    """
    if not path.is_file():
        raise StudyError(f"no study file at {path}; give a YAML file, or only flags (see `trimtab run --help`)")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(settings, dict):
        raise StudyError(f"{path}: expected `setting: value` lines, found {type(settings).__name__}")
    return settings


def starter_study() -> dict[str, Any]:
    """The settings of the study that runs when neither a file nor data is given."""
    text = resources.files("trimtab").joinpath("starter_study.yaml").read_text(encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load(text)
    return settings


def resolve_study(file: Path | None, flags: dict[str, Any]) -> StudyConfig:
    """File, then flags over it; without a file and without data, flags over the starter study."""
    if file is not None:
        settings = read_study_file(file)
    elif "train_data" in flags:
        settings = {}
    else:
        settings = starter_study()
    return build_study(settings | flags)
