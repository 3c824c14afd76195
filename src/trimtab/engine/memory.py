"""The allocator while batches run: fresh tensors should not cost page faults."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Ask glibc to keep freed pages for the next tensors (Linux on CPU; elsewhere nothing happens)."""
    glibc = _glibc()
    if glibc is not None:
        glibc.mallopt(_MMAP_THRESHOLD, 1 << 30)
        glibc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Ask glibc to give the pages that are free now to the system."""
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


def _glibc() -> Any:
    if sys.platform != "linux" or torch.cuda.is_available():
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
