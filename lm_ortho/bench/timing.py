"""Fair timing of several calls on a machine that is shared."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

Key = TypeVar("Key")
MIN_ROUNDS = 5


def select_clock(threads: int) -> Callable[[], float]:
    """Returns a clock in seconds: the running time of a single thread, without other processes, else wall time."""
    return time.thread_time if threads == 1 else time.perf_counter


def time_interleaved(
    calls: Mapping[Key, Callable[[int], object]], rounds: int, seconds: float, clock: Callable[[], float], seed: int = 0
) -> dict[Key, list[float]]:
    """Returns the seconds of every call in every round.

    Each round makes all calls in a new random order, so that slow moments of the machine affect all alike. A call is
    made twice, with two consecutive numbers, and the second is timed: the first reloads the program that the variant
    before displaced from the caches, as the layer before does in a model, and the second uses other weights. The run
    ends after ``rounds`` rounds, or after ``seconds`` of wall time and at least ``MIN_ROUNDS`` rounds.
    """
    rng = random.Random(seed)
    times: dict[Key, list[float]] = {key: [] for key in calls}
    start_time = time.perf_counter()
    for number in range(rounds):
        if number >= MIN_ROUNDS and time.perf_counter() - start_time > seconds:
            break
        for key in rng.sample(list(calls), len(calls)):
            calls[key](2 * number)
            start = clock()
            calls[key](2 * number + 1)
            times[key].append(clock() - start)
    return times


class Ratio(NamedTuple):
    """A median ratio with its 95 % interval."""

    ratio: float
    low: float
    high: float


def compute_paired_ratio(above: Sequence[float], below: Sequence[float], resamples: int = 2000, seed: int = 0) -> Ratio:
    """Computes the median over rounds of ``above / below``; the interval is a bootstrap over rounds."""
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return Ratio(statistics.median(ratios), medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1])
