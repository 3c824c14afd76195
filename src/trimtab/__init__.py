"""Trimtab fits a lightweight adapter to a foundation model and tells honestly what it bought.

The names here are the whole public API. They are loaded on first use, so that importing the
package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "StudyConfig": ("trimtab.study_config", "StudyConfig"),
    "build_study": ("trimtab.study_config", "build_study"),
    "run": ("trimtab.study", "run_study"),
    "merge": ("trimtab.merging", "merge_adapter"),
    "load_adapter": ("trimtab.adapters", "load_adapter"),
    "LoadedAdapter": ("trimtab.adapters", "LoadedAdapter"),
    "compare": ("trimtab.evaluation.comparison", "compare_two"),
    "read_predictions": ("trimtab.evaluation.prediction_files", "read_predictions"),
    "TrimtabError": ("trimtab.errors", "TrimtabError"),
    "InputError": ("trimtab.errors", "InputError"),
    "Merge": ("trimtab.merging", "Merge"),
    "RunError": ("trimtab.errors", "RunError"),
    "Sampling": ("trimtab.sampling", "Sampling"),
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trimtab' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
