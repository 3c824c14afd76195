"""The command, what its parts share, and how it ends."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trimtab.errors import RunError, TrimtabError

# What an interruption leaves, by command; of the others nothing is to be told.
_LEFT = {
    "run": "what was finished is kept: the same command goes on from there",
    **dict.fromkeys(
        ("predict", "generate", "merge", "combine"),
        "a file or folder of --out is written whole or not at all: give the same command again",
    ),
}


class InterruptionError(RunError):
    exit_code = 130  # as shells have it


class _Commands(TyperGroup):
    """Ctrl-C ends a command before Typer sees it, which would say nothing, or `Aborted!`, as its version has it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            left = _LEFT.get(ctx.invoked_subcommand or "")
            raise InterruptionError(f"interrupted; {left}" if left else "interrupted") from None


app = typer.Typer(
    name="trimtab",
    cls=_Commands,
    help="Fit a lightweight adapter to a foundation model, and learn honestly what it bought.\n\n"
    "Start with `trimtab run`: it fetches a small model and film reviews, tunes, and compares.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and the result.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of a table.")]


def main() -> None:
    """Run the command; a TrimtabError becomes one line and its exit code."""
    # Where a processor has bfloat16 products it warns of an optional package while peft is imported.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(prog_name="trimtab")
    except TrimtabError as error:
        print(f"trimtab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # while the command itself was read
        sys.exit(InterruptionError.exit_code)
