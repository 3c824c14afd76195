"""What the installed versions and this machine can do."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from trimtab.cli.application import AsJson, Quiet, app
from trimtab.errors import InputError


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
        found = probe_all(progress, [task] if task else list(TASKS), refresh=refresh)
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
        "matrix_unit": native.has_amx(),
    }
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show_doctor(found)
