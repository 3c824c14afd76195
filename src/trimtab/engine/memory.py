"""Pages of memory: which the allocator keeps while batches run, and which the system may have back."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_DONT_NEED = 4  # madvise(2)
_PAGE = mmap.PAGESIZE


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


def give_back_mapped_pages(*tensors: Tensor) -> None:
    """Let the system have the pages of frozen weights that were laid out elsewhere, where a file holds the same.

    Weights are read by mapping their file: a page that nobody has written to is read from there again when it is
    touched. A tensor with other pages keeps them all (Linux on CPU; elsewhere nothing happens).
    """
    glibc = _glibc()
    if glibc is None:
        return
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        start = -(-tensor.data_ptr() // _PAGE) * _PAGE
        pages = (tensor.data_ptr() + tensor.nbytes) // _PAGE - start // _PAGE
        if pages > 0 and _hold_what_a_file_holds(start // _PAGE, pages):
            glibc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(pages * _PAGE), _DONT_NEED)


def _hold_what_a_file_holds(first: int, pages: int) -> bool:
    """Whether each of these pages lies in a mapped file unchanged, or in no memory at all: see proc_pid_pagemap(5)."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(first * 8)
            entries = np.frombuffer(file.read(pages * 8), np.uint64)
    except OSError:
        return False
    is_there, is_swapped, is_of_file = ((entries >> np.uint64(bit)) & np.uint64(1) for bit in (63, 62, 61))
    return len(entries) == pages and not bool((is_swapped | is_there & ~is_of_file & np.uint64(1)).any())


def _glibc() -> Any:
    if sys.platform != "linux" or torch.cuda.is_available():
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
