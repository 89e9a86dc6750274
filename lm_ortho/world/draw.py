"""A seeded random generator that gives the same values on every Python version.

Python promises the same values between releases for ``random.Random.random`` only, so all methods are built on it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class SeededRandom:
    """A stream of random draws; ``label`` separates streams that share a seed."""

    def __init__(self, seed: int, label: str = "") -> None:
        self._random = random.Random(f"{label}:{seed}").random

    def flip(self, probability: float) -> bool:
        """Returns true with this probability."""
        return self._random() < probability

    def randrange(self, n: int) -> int:
        """Returns an integer in [0, n)."""
        return int(self._random() * n)

    def randint(self, low: int, high: int) -> int:
        """Returns an integer in [low, high], both ends included."""
        return low + self.randrange(high - low + 1)

    def choice(self, items: Sequence[T]) -> T:
        """Returns one of the items."""
        return items[self.randrange(len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """Returns the items at ``k`` different positions in random order (partial Fisher-Yates)."""
        pool = list(items)
        for i in range(k):
            j = i + self.randrange(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]

    def permute(self, items: Sequence[T]) -> list[T]:
        """Returns all items in random order."""
        return self.sample(items, len(items))
