"""What the command line shows: progress, tables, verdicts. Only `cli` uses it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from trimtab.progress import Silent
from trimtab.report.number_format import PERCENTAGES
from trimtab.runs import SystemFolder, read_json

if TYPE_CHECKING:
    from trimtab.estimate import Estimate
    from trimtab.merging import Merge
    from trimtab.publishing import Push
    from trimtab.support import Support

_SECONDS_BETWEEN_LINES = 15.0
_VERDICT_STYLES = {"better": "bold green", "worse": "bold red", "inconclusive": "yellow"}


def _shorten(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value < 1 else f"{value:.2f}"


class ConsoleProgress:
    """Bars on a terminal; plain lines, every 15 seconds at most, elsewhere."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        self.live: Progress | None = None
        self.task: TaskID | None = None
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.live:
            self.live.stop()
        self.live = self.task = None

    def stage(self, title: str) -> None:
        self._stop()
        self.started = self.last_line = time.monotonic()
        self.console.print(f"[bold]{title}[/bold]")

    def note(self, text: str) -> None:
        self.console.print(f"  {text}", markup=False)

    def advance(self, done: float, total: float, unit: str, **figures: float) -> None:
        told = "  ".join(f"{name.replace('_per_second', '/s')} {_shorten(value)}" for name, value in figures.items())
        if self.console.is_terminal:
            self._draw(done, total, unit, told)
        elif time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) * (total - done) / max(done, 1e-9)
            self.note(f"{done:,.0f}/{total:,.0f} {unit}  {told}  about {left:.0f} s left")

    def _draw(self, done: float, total: float, unit: str, told: str) -> None:
        if self.live is None:
            columns = (BarColumn(30), TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
                       TextColumn("{task.fields[told]}"), TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
            self.live = Progress(*columns, console=self.console, transient=True)
            self.live.start()
            self.task = self.live.add_task("", total=total, unit=unit, told=told)
        assert self.task is not None
        self.live.update(self.task, completed=done, total=total, told=told)


class QuietProgress(Silent):
    def __enter__(self) -> QuietProgress:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def make_progress(quiet: bool) -> ConsoleProgress | QuietProgress:
    return QuietProgress() if quiet else ConsoleProgress()


def _output() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=130)


# The primary metric of a task, then what stands beside it.
_SHOWN_METRICS = {
    "accuracy": ("accuracy", "f1", "loss"),
    "f1": ("f1", "precision", "recall"),
    "rmse": ("rmse", "mae", "pearson"),
    "perplexity": ("perplexity", "loss", "token_accuracy"),
    "rougeL": ("rougeL", "exact_match", "bleu"),
}


def _with_interval(name: str, metric: dict[str, float]) -> str:
    form = ".1%" if name in PERCENTAGES else ".3f"
    value, low, high = (format(metric[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _cost(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def show_comparison(comparison: dict[str, Any], folder: Path) -> None:
    """The table of systems, the verdicts, and where the report lies."""
    out = _output()
    table = Table(title=f"{comparison['study']}: {comparison['data']['test_rows']:,} test rows", title_justify="left")
    known = comparison["systems"][0]["metrics"]
    primary, *others = (name for name in _SHOWN_METRICS[comparison["primary_metric"]] if name in known)
    headings = (f"{primary} [95 % interval]", *others, "trainable", "train s", "evaluate s")
    table.add_column("system", no_wrap=True)
    for heading in headings:
        table.add_column(heading.replace("f1", "F1").replace("_", " "), justify="right", no_wrap=True)
    for system in comparison["systems"]:
        metrics, cost = system["metrics"], system["cost"]
        table.add_row(
            system["title"], _with_interval(primary, metrics[primary]),
            *(_cost(metrics[name]["value"], ".3f") for name in others), _cost(cost["trainable_parameters"], ",d"),
            _cost(cost["train_seconds"], ".1f"), _cost(cost["evaluate_seconds"], ".1f"),
            style="bold" if system["kind"] == "tuned" else None,
        )  # fmt: skip
    out.print(table)
    titles = {system["name"]: system["title"] for system in comparison["systems"]}
    for found in comparison["contrasts"]:
        out.print(_contrast_line(found, titles))
    proof = comparison["reload"]
    if proof["passed"]:
        out.print(f"reloaded in a fresh process: logits within {proof['max_abs_logit_difference']:.1e}")
    out.print(f"report: {folder / 'report.html'}", soft_wrap=True)


def _contrast_line(found: dict[str, Any], titles: dict[str, str]) -> str:
    style = _VERDICT_STYLES[found["verdict"]]
    unit, points, form = (100, " points", ".2f") if found["metric"] in PERCENTAGES else (1, "", ".3g")
    detectable = format(found["minimum_detectable_difference"] * unit, ".1f" if points else ".3g")
    return (
        f"{titles.get(found['system'], found['system'])} against {titles.get(found['against'], found['against'])}: "
        f"{found['difference'] * unit:+{form}}{points} "
        f"\\[{found['low'] * unit:+{form}}, {found['high'] * unit:+{form}}], "
        f"p {found['p_adjusted']:.2g}: [{style}]{found['verdict']}[/{style}]"
        + (f" (this test set could have shown {detectable}{points})" if found["verdict"] == "inconclusive" else "")
    )


def show_two(comparison: dict[str, Any]) -> None:
    out = _output()
    table = Table()
    table.add_column("system")
    names = list(comparison["systems"][0]["metrics"])
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for system in comparison["systems"]:
        values = [system["metrics"][name] for name in names]
        table.add_row(system["name"], *(_cost(value["value"], ".4f") for value in values))
    out.print(table)
    for found in comparison["contrasts"]:
        out.print(_contrast_line(found, {}))


def show_merge(merge: Merge, out: Path) -> None:
    told = _output()
    told.print(
        f"on {merge.rows} test rows outputs differ by up to {merge.max_abs_difference:.1e} (at most {merge.bound:.2g} "
        f"in {merge.dtype}); {merge.metric} {merge.before:.4f} with the adapter, {merge.after:.4f} merged"
    )
    if merge.quantize != "none" and merge.trained is not None:
        told.print(
            f"the adapter was trained on the base in {merge.quantize}, with {merge.metric} {merge.trained:.4f} "
            "on all test rows; the merged model stands on the base's weights in full precision"
        )
    if merge.llama_cpp_difference is not None:
        told.print(f"llama.cpp gives log-probabilities within {merge.llama_cpp_difference:.1e} of transformers")
    told.print(f"merged model: {out}")


def show_push(push: Push) -> None:
    told = _output()
    for name, size in push.files.items():
        told.print(f"{size:>12,} bytes  {name}")
    told.print(f"sent: {push.url}" if push.url else f"all is in order for {push.repository}; nothing was sent")


def show_metrics(folders: Sequence[SystemFolder]) -> None:
    out = _output()
    for folder in folders:
        record = read_json(folder.metrics)
        told = "  ".join(f"{name} {_cost(value, '.4f')}" for name, value in record["metrics"].items())
        out.print(f"{folder.name}: {told}")


def show_estimate(found: Estimate) -> None:
    """What a study will take, by part."""
    out = _output()
    share = found.trainable_parameters / max(1, found.total_parameters)
    trainable, total = f"{found.trainable_parameters:,}", f"{found.total_parameters:,}"
    out.print(f"[bold]parameters[/bold]  {trainable} trainable of {total} ({share:.2%}), "
              f"learning rate {found.learning_rate:g}")  # fmt: skip
    out.print(f"[bold]adapter[/bold]     {found.adapter_bytes / 2**20:,.1f} MiB; run folder about "
              f"{found.disk_bytes / 2**20:,.1f} MiB")  # fmt: skip
    out.print(f"[bold]memory[/bold]      about {found.peak_memory_bytes / 2**30:.2f} GiB at its peak")
    out.print(_two_columns("part", "GiB", {part: f"{size / 2**30:.2f}" for part, size in found.memory_bytes.items()}))
    low, middle, high = (seconds / 60 for seconds in (found.low_seconds, found.total_seconds, found.high_seconds))
    out.print(f"[bold]time[/bold]        about {middle:.1f} min here ({low:.1f} to {high:.1f})")
    out.print(_two_columns("stage", "seconds", {stage: f"{value:,.0f}" for stage, value in found.seconds.items()}))
    out.print(f"{found.train_tokens:,} tokens to train on, through the {found.forward} forward")


def _two_columns(name: str, unit: str, rows: dict[str, str]) -> Table:
    table = Table()
    table.add_column(name)
    table.add_column(unit, justify="right")
    for row in rows.items():
        table.add_row(*row)
    return table


# By whether the method works there, and whether any does.
_MARKS = {(True, True): "[green]yes[/green]", (False, True): "[red]no[/red]", (False, False): "[dim]–[/dim]"}


def show_support(found: Sequence[Support]) -> None:
    """A table of methods by families for each task, and each reason once."""
    from trimtab.methods import get_method

    out = _output()
    reasons: dict[str, set[str]] = {}
    for task in dict.fromkeys(row.task for row in found):
        rows = [row for row in found if row.task == task]
        families = list(dict.fromkeys(row.family for row in rows))
        able = {row.family for row in rows if row.works}
        table = Table(title=task.replace("_", " "), title_justify="left")
        table.add_column("--method", no_wrap=True)
        table.add_column("what it is")
        for family in families:
            table.add_column(family, justify="center", no_wrap=True)
        for method in dict.fromkeys(row.method for row in rows):
            works = {row.family: row for row in rows if row.method == method}
            marks = [_MARKS[works[family].works, family in able] for family in families]
            table.add_row(method, get_method(method).title, *marks)
            for family in families:
                if not works[family].works:
                    place = f"{method} on {family}" if family in able else f"every method on {family}"
                    reasons.setdefault(works[family].reason, set()).add(place)
        out.print(table)
    for reason, places in reasons.items():
        out.print(f"[red]no[/red] {', '.join(sorted(places))}: {escape(reason)}", soft_wrap=True)
    out.print("Any other method of the installed peft: --method NAME --method-options FIELD=VALUE. "
              "Every run whose task has a new head scores its linear probe as a baseline, too.")  # fmt: skip


def show_doctor(found: dict[str, Any]) -> None:
    from trimtab.machine import INT8_PAYS

    out = _output()
    machine, rates = found["machine"], found["gemm_gflops"]
    out.print(f"[bold]machine[/bold]  {machine['processor']}, {machine['cores']} cores, {machine['instructions']}, "
              f"{machine['memory_bytes'] / 2**30:.1f} GiB, {machine['accelerator'] or 'no GPU'}")  # fmt: skip
    out.print("[bold]versions[/bold] " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    table = Table(title="GEMM rates, measured now", title_justify="left")
    table.add_column("precision")
    table.add_column("GFLOP/s", justify="right")
    for name, rate in rates.items():
        table.add_row(name, _cost(rate, ",.0f"))
    out.print(table)
    fused = (
        "Llama and BERT builds with LoRA in fused layers, their kernels compiled for this processor"
        if found["fused_kernels"]
        else "no fused layers: they need Linux and a C++ compiler (install g++, or name one in CXX)"
    )
    out.print(
        "[bold]paths[/bold]    packed batches without padding, where a probe at load proves packed texts equal to lone "
        f"ones; else padded batches of like length\n         {fused}"
    )
    whole, real = rates.get("int8") or 0, rates.get("float32") or 1
    if found["fused_kernels"] and not found["int8_instructions"]:
        out.print("         no instructions for int8 products: --precision auto stays in float32")
    elif found["fused_kernels"]:
        out.print(f"         int8 multiplies {whole / real:.1f} times as fast as float32: --precision auto "
                  f"{'takes it' if whole >= INT8_PAYS * real else 'stays in float32'} in fused layers")  # fmt: skip
    if found["matrix_unit"]:
        out.print(
            "         matrix unit (AMX): fused layers multiply int8 there, and float32 in parts of bfloat16, as exactly"
        )
