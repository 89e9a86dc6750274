"""Memory for packed weights: aligned to cache lines, and in large pages where the system has some."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_LINE = 64
_LARGE_PAGE = 2 << 20
_WORTH = 2 * _LARGE_PAGE
"""Bytes from which large pages are asked for."""


def reserve(size: int) -> Tensor:
    """``(size,)`` uint8, not initialised, aligned to 64 bytes.

    Weights are read from end to end once per product, so that with pages of 4 KB every page is looked up anew: a
    quarter of the time of one row of x. A mapping of its own, because memory that an allocator hands out a second
    time already has its small pages.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if size < _WORTH or advice is None:
        room = torch.empty(size + _LINE, dtype=torch.uint8)
        return room[-room.data_ptr() % _LINE :][:size]
    mapping = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        mapping.madvise(advice)
    room = torch.frombuffer(mapping, dtype=torch.uint8)
    return room[-room.data_ptr() % _LARGE_PAGE :][:size]
