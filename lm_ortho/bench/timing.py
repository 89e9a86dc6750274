"""Timing several calls fairly on a machine that others use, too."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Key = TypeVar("Key")
LEAST_ROUNDS = 5


def clock_for(threads: int) -> Callable[[], float]:
    """Seconds: those in which the one thread ran, so that other processes do not count; wall time for several."""
    return time.thread_time if threads == 1 else time.perf_counter


def interleaved(
    calls: Mapping[Key, Callable[[int], object]], rounds: int, seconds: float, clock: Callable[[], float], seed: int = 0
) -> dict[Key, list[float]]:
    """Seconds of every call in every round.

    Each round makes every call in an order of its own, so that slow moments of the machine fall on all alike. A call is
    made twice, with two numbers, and the second is timed: the first brings back the program that the variant before
    drove out of the caches, as the layer before does in a model; the weights of the second are others. Ends after
    ``rounds``, or after ``seconds`` of wall time once there are ``LEAST_ROUNDS``.
    """
    shuffled = random.Random(seed)
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    began = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        for key in shuffled.sample(list(calls), len(calls)):
            calls[key](2 * number)
            start = clock()
            calls[key](2 * number + 1)
            taken[key].append(clock() - start)
    return taken


class Ratio(NamedTuple):
    """A median ratio with its 95 % interval."""

    ratio: float
    low: float
    high: float


def paired_ratio(above: Sequence[float], below: Sequence[float], resamples: int = 2000, seed: int = 0) -> Ratio:
    """Median over rounds of ``above / below``; the interval is a bootstrap over rounds."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    drawn = random.Random(seed)
    medians = sorted(statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return Ratio(statistics.median(ratios), medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1])
