"""The command, what its parts share, and how it ends."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from trimtab.errors import TrimtabError

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
    except KeyboardInterrupt:
        print(
            "trimtab: interrupted; what was finished is kept: the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(1)
