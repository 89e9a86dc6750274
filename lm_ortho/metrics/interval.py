"""Confidence intervals over clusters: a bootstrap resamples whole authors (or canaries), never single answers.

Answers about one author are correlated, so an interval over single answers would be too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Groups = Sequence[Any] | NDArray[Any]
"""The cluster that each value belongs to."""

RESAMPLES = 1000
CONFIDENCE = 0.95
_CHUNK_INDICES = 4_000_000
"""Number of resampled indices held in memory at once (32 MB), whatever the number of clusters."""


class Interval(NamedTuple):
    """A value with the lower and upper bound of its confidence interval."""

    value: float
    low: float
    high: float


def check_finite(values: ArrayLike, name: str) -> Floats:
    """Returns the values as a float64 vector.

    Raises:
        ValueError: for an empty list, and for a value that is not a finite number.
    """
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if array.ndim != 1 or not len(array):
        raise ValueError(f"{name}: expected a non-empty list of numbers, found shape {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array))
    if len(bad):
        raise ValueError(f"{name}: {len(bad)} of {len(array)} values are not finite, the first at {bad[0]}")
    return array


def cluster_sums(columns: Sequence[Floats], groups: Groups | None) -> list[Floats]:
    """Sums each column per cluster. Without groups, or with a single one, every value is its own cluster."""
    size = len(columns[0])
    if groups is None:
        return list(columns)
    if len(groups) != size:
        raise ValueError(f"{len(groups)} groups for {size} values")
    index = _cluster_numbers(groups)
    return [np.bincount(index, weights=column).astype(np.float64) for column in columns]


def _cluster_numbers(groups: Groups) -> NDArray[np.int64]:
    """Returns the number of the cluster of each value. With a single cluster, every value is its own."""
    numbers: dict[Any, int] = {}
    index = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    return index if len(numbers) > 1 else np.arange(len(index))


def bootstrap_ratios(numerator: Floats, denominator: Floats, *, resamples: int, seed: int) -> Floats:
    """Returns (resamples,) ratios ``sum(numerator) / sum(denominator)`` over clusters drawn with replacement."""
    clusters = len(numerator)
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK_INDICES // clusters)
    ratios = []
    for start in range(0, resamples, chunk):
        indices = rng.integers(0, clusters, size=(min(chunk, resamples - start), clusters))
        ratios.append(numerator[indices].sum(axis=1) / denominator[indices].sum(axis=1))
    return np.concatenate(ratios)


def draw_weights(groups: Groups, resamples: int, seed: int) -> Floats:
    """Returns how often each value occurs in each resample of the groups: (resamples, values).

    Groups are drawn with replacement. If there is a single group, its values are drawn instead.
    """
    index = _cluster_numbers(groups)
    clusters = int(index.max()) + 1
    counts = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), resamples)
    return counts[:, index].astype(np.float64)


def percentile_interval(value: float, resampled: ArrayLike, confidence: float) -> Interval:
    """Returns ``value`` with the percentile interval of its ``resampled`` values, widened to contain it."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(resampled), [tail, 1 - tail])
    return Interval(value, min(float(low), value), max(float(high), value))


def clustered_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    groups: Groups | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns ``sum(numerator) / sum(denominator)`` with the percentile interval of a bootstrap over clusters.

    With a single value there is nothing to resample: both bounds are the value.

    Raises:
        ValueError: for lists of different lengths, and for a denominator that is not positive.
    """
    # 1. Check both columns and compute the ratio itself.
    top, bottom = check_finite(numerator, "numerator"), check_finite(denominator, "denominator")
    if len(top) != len(bottom):
        raise ValueError(f"{len(top)} numerators for {len(bottom)} denominators")
    if (bottom <= 0).any():
        raise ValueError("denominator: every value must be positive")
    value = float(top.sum() / bottom.sum())
    # 2. Sum both columns per cluster, so that a resample draws whole clusters.
    top_sums, bottom_sums = cluster_sums([top, bottom], groups)
    # 3. Recompute the ratio in every resample, and take its percentiles.
    ratios = bootstrap_ratios(top_sums, bottom_sums, resamples=resamples, seed=seed)
    return percentile_interval(value, ratios, confidence)


def clustered_mean(
    values: ArrayLike,
    groups: Groups | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns the mean of the values with the percentile interval of a bootstrap over clusters."""
    array = check_finite(values, "values")
    return clustered_ratio(array, np.ones_like(array), groups, confidence=confidence, resamples=resamples, seed=seed)


def wilson(hits: float, size: int, confidence: float = CONFIDENCE) -> Interval:
    """Returns ``hits / size`` with the score interval of Wilson (1927), whose width is never zero."""
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
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns the share of hits (each 0 or 1) with an interval that is also valid at shares of 0 and 1.

    The interval is a bootstrap over clusters. Where that has zero width (all hits, no hits, or the same share in every
    cluster) or nothing to resample (one cluster), it is Wilson's interval instead. Wilson's interval counts clusters
    and not answers, because a cluster is the independent unit; only a single cluster counts its answers.
    """
    array = check_finite(hits, "hits")
    if not np.isin(array, (0.0, 1.0)).all():
        raise ValueError("hits: every value must be 0 or 1")
    clusters = len(array) if groups is None else len(set(groups))
    share = float(array.mean())
    # 1. Try the bootstrap over clusters.
    if clusters > 1 and 0 < share < 1:
        interval = clustered_mean(array, groups, confidence=confidence, resamples=resamples, seed=seed)
        if interval.low < interval.high:
            return interval
    # 2. Otherwise take Wilson's interval over the independent units.
    size = clusters if clusters > 1 else len(array)
    return Interval(share, *wilson(share * size, size, confidence)[1:])
