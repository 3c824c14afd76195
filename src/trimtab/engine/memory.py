"""Pages of memory: which the allocator keeps while batches run, and which the system may have back."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_mmap_threshold = 128 << 10  # bytes from which an allocation has pages of its own; glibc's, until they are to be kept
_OWN_PAGES_FROM = 64 << 10
_DONT_NEED = 4  # madvise(2)
_PAGE = mmap.PAGESIZE


def keep_freed_memory() -> None:
    """Ask glibc to keep freed pages for the next tensors (Linux on CPU; elsewhere nothing happens)."""
    global _mmap_threshold
    glibc = _glibc()
    if glibc is not None:
        _mmap_threshold = 1 << 30
        glibc.mallopt(_MMAP_THRESHOLD, _mmap_threshold)
        glibc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


@contextmanager
def own_pages() -> Iterator[None]:
    """While this lasts, give what the heap has no room for pages of its own, which go back to the system when freed.

    For weights that are laid out, which outlive all that is allocated beside them: a heap in which both lie has holes.
    """
    glibc = _glibc()
    if glibc is None:
        yield
        return
    glibc.mallopt(_MMAP_THRESHOLD, _OWN_PAGES_FROM)
    try:
        yield
    finally:
        glibc.mallopt(_MMAP_THRESHOLD, _mmap_threshold)


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
    if glibc is None or not _tells_written_pages():
        return
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        start, pages = _pages_of(tensor)
        if pages > 0 and not _any_was_written(start // _PAGE, pages):
            glibc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(pages * _PAGE), _DONT_NEED)


@contextmanager
def weights_read_in_passing(model: nn.Module) -> Iterator[None]:
    """While this lasts, each of the model's layers gives its mapped pages back as soon as it has computed.

    For a forward that is run to be compared with: at no time are more weights in memory than a layer's.
    """

    def give_back(layer: nn.Module, *_: Any) -> None:
        give_back_mapped_pages(*layer.parameters())

    layers = [layer for part in model.modules() if isinstance(part, nn.ModuleList) for layer in part]
    handles = [layer.register_forward_hook(give_back) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        give_back(model)


@functools.cache
def _tells_written_pages() -> bool:
    """Whether the system says of a fresh page that it was written to; a sandbox may say nothing of any."""
    start, pages = _pages_of(torch.ones(3 * _PAGE, dtype=torch.uint8))
    return _any_was_written(start // _PAGE, pages)


def _pages_of(tensor: Tensor) -> tuple[int, int]:
    """Where the first page starts that the tensor fills, and how many there are."""
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    return start, (tensor.data_ptr() + tensor.nbytes) // _PAGE - start // _PAGE


def _any_was_written(first: int, pages: int) -> bool:
    """Whether one of these pages is in memory or swapped, and not as a file holds it; see proc_pid_pagemap(5)."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(first * 8)
            entries = np.frombuffer(file.read(pages * 8), np.uint64)
    except OSError:
        entries = np.empty(0, np.uint64)
    if len(entries) < pages:  # nothing is known of them
        return True
    is_there, is_swapped, is_of_file = ((entries >> np.uint64(bit)) & np.uint64(1) for bit in (63, 62, 61))
    return bool((is_swapped | is_there & (is_of_file ^ np.uint64(1))).any())


def _glibc() -> Any:
    if sys.platform != "linux" or torch.cuda.is_available():
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
