"""Intervals and differences of rows of a table: documents are resampled by group, seeds are counted on top."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lm_ortho.metrics.interval import drawn_weights

Floats = NDArray[np.float64]
RESAMPLES = 2000
CONFIDENCE = 0.95
_SHARES = ("acc", "auc", "exact_match", "extraction", "prob", "rouge", "tpr", "verbatim", "near_verbatim")
_LEAST = 0.9
"""Share of the resamples in which every mean has to be a number; a metric that few documents have may lack some."""


class Number(NamedTuple):
    """A value with its interval (None where nothing tells), and the values of the seeds it is the mean of."""

    value: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]


class Samples(NamedTuple):
    """One number per document (NaN where it has none) and whom each is about."""

    values: Floats
    groups: tuple[str, ...]


class Resampler:
    """Means over documents and over resamples of their groups: the same resamples for every model."""

    def __init__(self, resamples: int = RESAMPLES) -> None:
        self.resamples = resamples
        self._weights: dict[tuple[str, ...], Floats] = {}

    def means(self, samples: Samples) -> Floats:
        """(1 + resamples,): the mean, then that of every resample."""
        if samples.groups not in self._weights:
            drawn = drawn_weights(samples.groups, self.resamples, 0)
            self._weights[samples.groups] = np.concatenate([np.ones((1, len(samples.groups))), drawn])
        weights, there = self._weights[samples.groups], ~np.isnan(samples.values)
        size = weights @ there
        total = weights @ np.nan_to_num(samples.values)
        return np.divide(total, size, out=np.full(len(size), np.nan), where=size > 0)


def of_seeds(values: Sequence[tuple[float, float | None, float | None]], metric: str = "") -> Number:
    """The mean over seeds of (value, low, high); documents and seeds as two sources of error added in quadrature.

    The documents are the same for every seed, so their part is the mean of the seeds' own intervals. The mean of
    perplexities is the geometric one; intervals of shares end at 1.
    """
    if metric.endswith("ppl") and all(part is None or part > 0 for value in values for part in value):
        logs = [tuple(None if part is None else math.log(part) for part in value) for value in values]
        value, low, high, _ = of_seeds(logs)  # type: ignore[arg-type]
        low, high = (None if end is None else math.exp(end) for end in (low, high))
        return Number(math.exp(value), low, high, tuple(value for value, _, _ in values))
    plain = tuple(value for value, _, _ in values)
    mean = math.fsum(plain) / len(plain)
    lows = [value - low for value, low, _ in values if low is not None]
    highs = [high - value for value, _, high in values if high is not None]
    if len(lows) < len(plain) or len(highs) < len(plain):
        return Number(mean, None, None, plain)
    scatter = seed_error(plain)
    below, above = (math.hypot(math.fsum(part) / len(part), scatter) for part in (lows, highs))
    floor = 0.0 if metric and all(low is not None and low >= 0 for _, low, _ in values) else -math.inf
    roof = 1.0 if metric.startswith(_SHARES) else math.inf
    return Number(mean, max(floor, mean - below), min(roof, mean + above), plain)


def seed_error(values: Sequence[float]) -> float:
    """Half the width of the interval of the mean of seeds (Student); 0 for one seed, which tells nothing."""
    if len(values) < 2:
        return 0.0
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def around_value(value: float, draws: Floats | None, seeds: Sequence[float], floor: float = -math.inf) -> Number:
    """``value`` with the interval of ``draws`` (point first), moved to the value, and that of the seeds."""
    if draws is None or not _enough(draws):
        return Number(value, None, None, tuple(seeds))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(draws[1:], [tail, 1 - tail]) - draws[0]
    scatter = seed_error(seeds)
    below, above = math.hypot(min(0.0, low), scatter), math.hypot(max(0.0, high), scatter)
    return Number(value, max(floor, value - below), value + above, tuple(seeds))


def worse_than(own: Floats | None, best: Floats | None, rows: int) -> bool | None:
    """Whether ``own`` lies above ``best`` beyond chance, paired by document, corrected for ``rows`` comparisons.

    Bonferroni: the one-sided bound is at 1 - 0.05 / ``rows``. None where there are no numbers of single documents.
    """
    if own is None or best is None or not _enough(own - best):
        return None
    tail = max((1 - CONFIDENCE) / max(1, rows), 1 / len(own[1:]))
    return bool(np.nanquantile(own[1:] - best[1:], tail) > 0)


def _enough(draws: Floats) -> bool:
    return not np.isnan(draws[0]) and bool(np.mean(~np.isnan(draws)) >= _LEAST)


def dominating(points: Mapping[str, tuple[float, float]], rivals: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """For each point those of its rivals that are lower on both sides."""
    return {
        name: [other for other in rivals[name] if points[other][0] < own[0] and points[other][1] < own[1]]
        for name, own in points.items()
    }
