"""Adapters on disk: saved in peft's format, checked, loaded again, and proved in a fresh process."""

from trimtab.adapters.loaded import LoadedAdapter
from trimtab.adapters.loading import load_adapter
from trimtab.adapters.proof import evaluate_trial, prove_reload
from trimtab.adapters.saving import save_adapter, save_logits, save_start, write_weights

__all__ = [
    "LoadedAdapter",
    "evaluate_trial",
    "load_adapter",
    "prove_reload",
    "save_adapter",
    "save_logits",
    "save_start",
    "write_weights",
]
