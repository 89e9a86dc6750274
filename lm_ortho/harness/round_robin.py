"""Several sequences as one, an item of each in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any, TypeVar

T = TypeVar("T")


def in_turns(*sides: Iterable[T]) -> Iterator[T]:
    """One of each side after the other, until all are at their end."""
    gap: Any = object()
    return (item for turn in zip_longest(*sides, fillvalue=gap) for item in turn if item is not gap)
