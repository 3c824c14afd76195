"""PEFT methods: the table, the layers they go to, and their way around a model."""

from trimtab.methods.attach import (
    attach_adapter,
    build_config,
    check_method,
    learning_rate_of,
    virtual_tokens_of,
)
from trimtab.methods.prefix import start_prefix
from trimtab.methods.schedules import make_schedule
from trimtab.methods.table import METHODS, Method, get_method
from trimtab.methods.targets import find_layers, find_target_modules
from trimtab.methods.whole_model import WholeModel

__all__ = [
    "METHODS", "Method", "WholeModel", "attach_adapter", "build_config", "check_method", "find_layers",
    "find_target_modules", "get_method", "learning_rate_of", "make_schedule", "start_prefix", "virtual_tokens_of",
]  # fmt: skip
