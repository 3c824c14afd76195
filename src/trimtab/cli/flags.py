"""The study's fields as flags, and a study from them; and the flags of how texts are written."""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from trimtab.study_config import StudyConfig

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write at most.")]
DoSample = Annotated[bool | None, typer.Option(help="Sample, from all tokens if nothing narrows them.")]
Temperature = Annotated[float | None, typer.Option(min=0.01, help="Sample, the sharper the lower.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from so much probability.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample from so many tokens.")]
MinP = Annotated[
    float | None, typer.Option(min=0.0, max=1.0, help="Sample from tokens with such a share of the likeliest's.")
]
TypicalP = Annotated[
    float | None, typer.Option(min=0.01, max=1.0, help="Sample from so much probability, of the most typical tokens.")
]
RepetitionPenalty = Annotated[float, typer.Option(min=0.1, help="Above 1: repeat less.")]
NoRepeatNgramSize = Annotated[int, typer.Option(min=0, help="Write no run of so many tokens twice; 0: any.")]
StopStrings = Annotated[list[str] | None, typer.Option(help="End a text with this; repeat the flag for several.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the sampling.")]


def _flag_type(annotation: Any) -> Any:
    """The type that a flag parses to: `learning_rate` and the like accept words and numbers as text."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        return members[0] if len(members) == 1 else str
    if typing.get_origin(annotation) is dict:
        return list[str]
    return str if typing.get_origin(annotation) is Literal else annotation


def _study_flags() -> list[inspect.Parameter]:
    """One option for each field of the study: its name, type, help and default come from there."""
    from trimtab.study_config import StudyConfig

    parameters = []
    for name, field in StudyConfig.model_fields.items():
        shown = "none" if field.default is None or field.default_factory else field.default
        option = typer.Option(
            f"--{name.replace('_', '-')}", help=f"{field.description} [default: {shown}]", show_default=False
        )
        annotation: Any = Annotated[_flag_type(field.annotation) | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return parameters


def takes_study_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(**settings)` the study's flags; those not set are left out of `settings`."""
    # Reading the fields takes longer than everything else in `trimtab --help`.
    flags = _study_flags() if {"run", "estimate"} & set(sys.argv[1:]) else []
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
    own_names = {parameter.name for parameter in own}

    def wrapped(**values: Any) -> None:
        settings = {name: value for name, value in values.items() if name not in own_names and value is not None}
        command(**{name: values[name] for name in own_names}, settings=settings)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = inspect.Signature(own + flags)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in (*own, *flags)}
    return wrapped


def resolve(study: Path | None, settings: dict[str, Any]) -> StudyConfig:
    """The study of a file and flags."""
    from trimtab.study_config import resolve_study

    if options := settings.pop("method_options", None):
        settings["method_options"] = dict(_name_and_value(option) for option in options)
    if settings.get("learning_rate", "auto") != "auto":
        settings["learning_rate"] = _number("learning_rate", settings["learning_rate"])
    return resolve_study(study, settings)


def _name_and_value(option: str) -> tuple[str, Any]:
    import yaml

    from trimtab.errors import StudyError

    name, equals, value = option.partition("=")
    if not equals:
        raise StudyError(f"method_options: expected NAME=VALUE; received {option!r}")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError:
        raise StudyError(f"method_options: {name.strip()}={value} is not YAML; check brackets and quotes") from None
    is_number = isinstance(found, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?e[+-]?\d+", found, re.IGNORECASE)
    return name.strip(), float(found) if is_number else found  # YAML reads 1.0e-3, but neither 1e-3 nor 1.0e3


def _number(name: str, value: str) -> float:
    from trimtab.errors import StudyError

    try:
        return float(value)
    except ValueError:
        raise StudyError(f"{name}: expected 'auto' or a number; received {value!r}") from None
