"""The command line: parse, one library call, print. The only place that prints or exits."""

from __future__ import annotations

import inspect
import json
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trimtab.errors import InputError, TrimtabError

if TYPE_CHECKING:
    from trimtab.study_config import StudyConfig

app = typer.Typer(
    name="trimtab",
    help="Fit a lightweight adapter to a foundation model, and learn honestly what it bought.\n\n"
    "Start with `trimtab run`: it fetches a small model and film reviews, tunes, and compares.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


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


def _takes_study_flags(command: Callable[..., None]) -> Callable[..., None]:
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


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


@app.command()
@_takes_study_flags
def run(
    settings: Any,
    study: Annotated[
        Path | None, typer.Argument(metavar="[STUDY.yaml]", help="A study file; flags override it.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a run folder that is in use.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Evaluate a base model, tune an adapter, reload it, evaluate again, compare, report.

    Without arguments it runs the starter study: SmolLM2-135M on film reviews, in minutes.
    Every flag is also a line of the study file; the resolved file is kept in the run folder.

    \b
    Examples:
      trimtab run
      trimtab run --model starter:minilm-l6 --max-train-rows 500
      trimtab run --train-data reviews.csv --text-column review --label-column stars
      trimtab run runs/my-run/study.yaml --seed 1 --out runs/my-run-seed-1
    """
    from trimtab.console import make_progress, show_comparison

    resolved = _resolve(study, settings)
    from trimtab.study import run_study

    with make_progress(quiet) as progress:
        comparison = run_study(resolved, progress, overwrite=overwrite, command=["trimtab", *sys.argv[1:]])
    if as_json:
        print(json.dumps(comparison, indent=1))
    else:
        show_comparison(comparison, resolved.run_folder)


def _resolve(study: Path | None, settings: dict[str, Any]) -> StudyConfig:
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
    return name.strip(), yaml.safe_load(value)


def _number(name: str, value: str) -> float:
    from trimtab.errors import StudyError

    try:
        return float(value)
    except ValueError:
        raise StudyError(f"{name}: expected 'auto' or a number; received {value!r}") from None


@app.command()
@_takes_study_flags
def estimate(
    settings: Any,
    study: Annotated[
        Path | None, typer.Argument(metavar="[STUDY.yaml]", help="A study file; flags override it.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a study will take before any weight is read: parameters, memory by part, disk and time.

    Takes the same study and flags as `trimtab run`, and makes all of its checks.
    """
    from dataclasses import asdict

    from trimtab.console import make_progress, show_estimate
    from trimtab.estimate import estimate_job
    from trimtab.machine import set_threads
    from trimtab.models import quiet_libraries
    from trimtab.study import check_study

    resolved = _resolve(study, settings)
    quiet_libraries()
    set_threads()
    with make_progress(quiet) as progress:
        found = estimate_job(check_study(resolved, progress, claim=False))
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        show_estimate(found)


@app.command()
def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with a tuned adapter.")],
    trial: Annotated[str | None, typer.Option(help="Only this trial, such as lora-s0.")] = None,
    quiet: Quiet = False,
) -> None:
    """Reload the adapters of a run and score its test rows again."""
    from trimtab.adapters import evaluate_trial
    from trimtab.console import make_progress, show_metrics
    from trimtab.machine import set_threads
    from trimtab.models import quiet_libraries
    from trimtab.runs import RunFolder

    run = RunFolder(run_folder)
    trials = [one for one in run.trials() if trial in (None, one.name)]
    if not trials:
        raise InputError(
            f"{run_folder} holds no {'trial ' + trial if trial else 'tuned adapter'}; "
            "give the folder that `trimtab run` named"
        )
    quiet_libraries()
    set_threads()
    with make_progress(quiet) as progress:
        for one in trials:
            evaluate_trial(run, one, progress)
    if not quiet:
        show_metrics(trials)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder of a run, or the run itself.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged model.")],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format of the merged weights.")
    ] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Write it even if its outputs differ.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write base and adapter as one plain transformers model, after comparing both on the run's test rows.

    An adapter of a quantised base is merged into the base's weights in full precision.

    \b
    Example:
      trimtab merge runs/my-run/trials/lora-s0/adapter --out merged
    """
    from dataclasses import asdict

    from trimtab.console import make_progress, show_merge
    from trimtab.machine import set_threads
    from trimtab.merging import merge_adapter
    from trimtab.models import quiet_libraries

    quiet_libraries()
    set_threads()
    with make_progress(quiet) as progress:
        found = merge_adapter(adapter, out, dtype, force=force, progress=progress)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        show_merge(found, out)


@app.command()
def compare(
    first: Annotated[
        Path,
        typer.Argument(metavar="RUN_OR_PREDICTIONS", help="A run folder (its tuned system) or a predictions.jsonl."),
    ],
    second: Annotated[Path, typer.Argument(metavar="RUN_OR_PREDICTIONS", help="What is held against the first.")],
    metric: Annotated[
        str | None,
        typer.Option(help="accuracy, f1, precision, recall, loss, brier, perplexity… [default: the task's own]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Test whether the second system differs from the first, on the same test rows.

    Accuracy is tested by exact McNemar, everything else by the paired bootstrap.
    """
    from trimtab.console import show_two
    from trimtab.evaluation.comparison import check_metric, compare_two
    from trimtab.evaluation.prediction_files import read_predictions

    if metric is not None:
        check_metric(metric)
    names = _two_names(first, second)
    predictions = [read_predictions(_predictions_file(path)) for path in (first, second)]
    found = compare_two(predictions[0], predictions[1], names, metric)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show_two(found)


def _predictions_file(path: Path) -> Path:
    """The predictions that `path` means.

    Raises:
        InputError: a folder without any, or with several tuned systems.
    """
    from trimtab.runs import RunFolder, SystemFolder

    if not path.is_dir():
        return path
    own = SystemFolder(path)
    if own.predictions.is_file():
        return own.predictions
    trials = [trial for trial in RunFolder(path).trials() if trial.predictions.is_file()]
    if len(trials) != 1:
        found = ", ".join(str(trial.predictions) for trial in trials) or "none"
        raise InputError(f"{path} has not one tuned system but {len(trials)} ({found}); name one predictions.jsonl")
    return trials[0].predictions


def _two_names(first: Path, second: Path) -> tuple[str, str]:
    """Short, distinct names of two files or folders."""
    names = [path.parent.name if path.suffix == ".jsonl" else path.name for path in (first, second)]
    return (str(first), str(second)) if names[0] == names[1] else (names[0], names[1])


@app.command()
def report(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A finished run folder.")]) -> None:
    """Write report.html and report.md again, from the files of a run."""
    from trimtab.report import write_report
    from trimtab.runs import RunFolder

    found = RunFolder(run_folder)
    if not found.comparison.is_file():
        raise InputError(f"{run_folder} holds no finished comparison; give the folder that `trimtab run` named")
    write_report(found)
    print(found.report_html)


@app.command()
def methods(
    task: Annotated[str | None, typer.Option(help="Only this task, such as classification.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Try everything again.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show which PEFT methods work on which tasks and model families, tried on tiny models of the installed versions.

    The first time takes about a minute; the answer is kept until a library changes.
    """
    from dataclasses import asdict

    from trimtab.console import make_progress, show_support
    from trimtab.errors import suggest
    from trimtab.machine import set_threads
    from trimtab.models import quiet_libraries
    from trimtab.support import probe_all
    from trimtab.tasks import TASKS

    if task is not None and task not in TASKS:
        raise InputError(f"no task is called {task!r}{suggest(task, TASKS)}; there are: {', '.join(TASKS)}")
    quiet_libraries()
    set_threads()
    with make_progress(quiet) as progress:
        found = [row for row in probe_all(progress, refresh=refresh) if task in (None, row.task)]
    if as_json:
        print(json.dumps([asdict(row) for row in found], indent=1))
    else:
        show_support(found)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Print versions, cores, memory, measured GEMM rates, and the paths that will be taken."""
    from trimtab.console import show_doctor
    from trimtab.engine.fused import native
    from trimtab.machine import describe_machine, measure_gemm_rates, package_versions, set_threads

    set_threads()
    found = {
        "versions": package_versions(),
        "machine": describe_machine(),
        "gemm_gflops": measure_gemm_rates(),
        "fused_kernels": native.is_available(),
        "int8_instructions": native.has_int8(),
    }
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show_doctor(found)


def main() -> None:
    """Run the command; a TrimtabError becomes one line and its exit code."""
    try:
        app(prog_name="trimtab")
    except TrimtabError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(
            "trimtab: interrupted; what was finished is kept: the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(1)
