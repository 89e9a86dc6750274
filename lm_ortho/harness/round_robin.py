"""Interleaving of several sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, TypeVar

T = TypeVar("T")


def interleave(*sequences: Iterable[T]) -> Iterator[T]:
    """Yields one item of each sequence in turn, until all sequences are exhausted."""
    missing: Any = object()
    for items in zip_longest(*sequences, fillvalue=missing):
        yield from (item for item in items if item is not missing)
