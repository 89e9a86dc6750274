"""Memory for packed weights: aligned to cache lines, and in large pages where the system has them."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_LINE = 64
_LARGE_PAGE = 2 << 20
_MIN_SIZE = 2 * _LARGE_PAGE
"""Size in bytes from which large pages are requested."""


def reserve(size: int) -> Tensor:
    """``(size,)`` uint8, not initialised, aligned to 64 bytes.

    Weights are read from end to end once per product. With pages of 4 KB every page is then looked up again, which
    takes a quarter of the time of a product with one row of ``x``. The memory is a separate mapping, because memory
    that an allocator reuses already has small pages.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if size < _MIN_SIZE or advice is None:
        buffer = torch.empty(size + _LINE, dtype=torch.uint8)
        return buffer[-buffer.data_ptr() % _LINE :][:size]
    mapping = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        mapping.madvise(advice)
    buffer = torch.frombuffer(mapping, dtype=torch.uint8)
    return buffer[-buffer.data_ptr() % _LARGE_PAGE :][:size]
