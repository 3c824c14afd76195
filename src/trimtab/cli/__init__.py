"""The command line: parse, one library call, print. The only place that prints or exits, beside `console`."""

from trimtab.cli import studies  # isort: skip  (the order of `trimtab --help`)
from trimtab.cli import adapters, machine
from trimtab.cli.application import app, main

__all__ = ["adapters", "app", "machine", "main", "studies"]
