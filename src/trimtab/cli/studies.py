"""Studies: run, estimated, evaluated, compared, reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from trimtab.cli.application import AsJson, Quiet, app
from trimtab.cli.flags import resolve, takes_study_flags
from trimtab.errors import InputError


@app.command()
@takes_study_flags
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

    resolved = resolve(study, settings)
    from trimtab.study import run_study

    with make_progress(quiet) as progress:
        comparison = run_study(resolved, progress, overwrite=overwrite, command=["trimtab", *sys.argv[1:]])
    if as_json:
        print(json.dumps(comparison, indent=1))
    else:
        show_comparison(comparison, resolved.run_folder)


@app.command()
@takes_study_flags
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

    resolved = resolve(study, settings)
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
    show_metrics(trials)


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

    Accuracy is tested by exact McNemar, everything else by the paired bootstrap; rows of one group are drawn together.
    """
    from trimtab.console import show_two
    from trimtab.evaluation.comparison import check_metric, compare_two
    from trimtab.evaluation.prediction_files import read_groups, read_predictions

    if metric is not None:
        check_metric(metric)
    names = _two_names(first, second)
    files = [_predictions_file(path) for path in (first, second)]
    one, other = map(read_predictions, files)
    groups = read_groups(files[0], one) or read_groups(files[1], other)
    found = compare_two(one, other, names, metric, groups)
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
