"""Intervals over clusters: whole authors (or canaries) are resampled, never single answers.

Answers about one author stand or fall together, so an interval over single answers would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Groups = Sequence[Any] | NDArray[Any]

RESAMPLES = 1000
CONFIDENCE = 0.95
_CELLS = 4_000_000
"""Resampled indices held at once (32 MB), whatever the number of clusters."""


class Interval(NamedTuple):
    """A value with the bounds of its interval."""

    value: float
    low: float
    high: float


def finite(values: ArrayLike, name: str) -> Floats:
    """The values as a vector. Raises ``ValueError`` for no value, or one that is not a finite number."""
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: expected a non-empty list of numbers, found shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{name}: {len(bad)} of {len(array)} values are not finite, the first at {bad[0]}")
    return array


def cluster_sums(columns: Sequence[Floats], groups: Groups | None) -> list[Floats]:
    """Each column summed per cluster; without groups, or with one only, every value is its own cluster."""
    size = len(columns[0])
    if groups is None:
        return list(columns)
    if len(groups) != size:
        raise ValueError(f"{len(groups)} groups for {size} values")
    index = _cluster_numbers(groups)
    return [np.bincount(index, weights=column).astype(np.float64) for column in columns]


def _cluster_numbers(groups: Groups) -> NDArray[np.int64]:
    """The number of its cluster for each value; with one cluster only, every value is its own."""
    numbers: dict[Any, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    return index if len(numbers) > 1 else np.arange(len(index))


def resampled_ratios(numerator: Floats, denominator: Floats, resamples: int, seed: int) -> Floats:
    """``sum(numerator) / sum(denominator)`` over clusters drawn with replacement, ``resamples`` times."""
    clusters = len(numerator)
    rng = np.random.default_rng(seed)
    step = max(1, _CELLS // clusters)
    parts = []
    for start in range(0, resamples, step):
        drawn = rng.integers(0, clusters, size=(min(step, resamples - start), clusters))
        parts.append(numerator[drawn].sum(axis=1) / denominator[drawn].sum(axis=1))
    return np.concatenate(parts)


def drawn_weights(groups: Groups, resamples: int, seed: int) -> Floats:
    """How often each value is drawn when groups are drawn with replacement: (resamples, values).

    Of one group alone its values are drawn.
    """
    index = _cluster_numbers(groups)
    clusters = int(index.max()) + 1
    times = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), resamples)
    return times[:, index].astype(np.float64)


def around(value: float, drawn: ArrayLike, confidence: float) -> Interval:
    """``value`` with the percentile interval of what was ``drawn``, widened to hold it."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(drawn), [tail, 1 - tail])
    return Interval(value, min(float(low), value), max(float(high), value))


def clustered_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    groups: Groups | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """``sum(numerator) / sum(denominator)`` with the percentile interval of a bootstrap over clusters.

    With one value only there is nothing to resample: both bounds are the value.
    Denominators must be positive.
    """
    top, bottom = finite(numerator, "numerator"), finite(denominator, "denominator")
    if len(top) != len(bottom):
        raise ValueError(f"{len(top)} numerators for {len(bottom)} denominators")
    if (bottom <= 0).any():
        raise ValueError("denominator: every value must be positive")
    value = float(top.sum() / bottom.sum())
    tops, bottoms = cluster_sums([top, bottom], groups)
    return around(value, resampled_ratios(tops, bottoms, resamples, seed), confidence)


def clustered_mean(
    values: ArrayLike,
    groups: Groups | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean of the values with the percentile interval of a bootstrap over clusters."""
    array = finite(values, "values")
    return clustered_ratio(array, np.ones_like(array), groups, confidence, resamples, seed)


def wilson(hits: float, size: int, confidence: float = CONFIDENCE) -> Interval:
    """``hits / size`` with the score interval of Wilson (1927); never of zero width."""
    from scipy.stats import norm

    if size < 1 or not 0 <= hits <= size:
        raise ValueError(f"{hits} hits among {size}")
    z = float(norm.ppf(0.5 + confidence / 2))
    share, weight = hits / size, z * z / size
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / size + weight / (4 * size))
    return Interval(share, min(max(0.0, centre - half), share), max(min(1.0, centre + half), share))


def rate(
    hits: ArrayLike,
    groups: Groups | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The share of hits (0 or 1 each), with an interval that also holds at the ends.

    A bootstrap over clusters; where it has zero width (all hit, none hit, the same share in each) or nothing
    to resample (one cluster) it is Wilson's instead, counting clusters and not answers, because a cluster is
    the independent unit. One cluster alone counts its answers.
    """
    array = finite(hits, "hits")
    if not np.isin(array, (0.0, 1.0)).all():
        raise ValueError("hits: every value must be 0 or 1")
    clusters = len(array) if groups is None else len(set(groups))
    share = float(array.mean())
    if clusters > 1 and 0 < share < 1:
        interval = clustered_mean(array, groups, confidence, resamples, seed)
        if interval.low < interval.high:
            return interval
    size = clusters if clusters > 1 else len(array)
    return Interval(share, *wilson(share * size, size, confidence)[1:])
