"""Confidence intervals and differences of table rows: a bootstrap over clusters of documents, plus seed variance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lm_ortho.metrics.interval import draw_weights

Floats = NDArray[np.float64]
RESAMPLES = 2000
CONFIDENCE = 0.95
_SHARE_METRICS = ("acc", "auc", "exact_match", "extraction", "prob", "rouge", "tpr", "verbatim", "near_verbatim")
_MIN_FINITE_SHARE = 0.9
"""Share of the resamples in which every mean has to be finite; a metric of few documents may be missing in some."""


class Number(NamedTuple):
    """A value with its confidence interval (None where unknown), and the values of the seeds that it averages."""

    value: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]


class Samples(NamedTuple):
    """One number per document (NaN where it has none) and the group of each: the subject it is about."""

    values: Floats
    groups: tuple[str, ...]


class Resampler:
    """Computes means over documents and over resamples of their groups; all models share the same resamples."""

    def __init__(self, resamples: int = RESAMPLES) -> None:
        self.resamples = resamples
        self._weights: dict[tuple[str, ...], Floats] = {}

    def means(self, samples: Samples) -> Floats:
        """Array (1 + resamples,): the mean over all documents, then the mean of every resample."""
        if samples.groups not in self._weights:
            resampled_weights = draw_weights(samples.groups, self.resamples, 0)
            self._weights[samples.groups] = np.concatenate([np.ones((1, len(samples.groups))), resampled_weights])
        weights, is_present = self._weights[samples.groups], ~np.isnan(samples.values)
        size = weights @ is_present
        total = weights @ np.nan_to_num(samples.values)
        return np.divide(total, size, out=np.full(len(size), np.nan), where=size > 0)


def average_seeds(values: Sequence[tuple[float, float | None, float | None]], metric: str = "") -> Number:
    """Averages (value, low, high) over seeds; adds the errors of documents and of seeds in quadrature.

    The documents are the same for every seed, so their part is the mean of the seeds' intervals. Perplexities are
    averaged geometrically; intervals of shares end at 1.
    """
    if metric.endswith("ppl") and all(part is None or part > 0 for value in values for part in value):
        logs = [tuple(None if part is None else math.log(part) for part in value) for value in values]
        value, low, high, _ = average_seeds(logs)  # type: ignore[arg-type]
        low, high = (None if end is None else math.exp(end) for end in (low, high))
        return Number(math.exp(value), low, high, tuple(value for value, _, _ in values))
    seeds = tuple(value for value, _, _ in values)
    mean = math.fsum(seeds) / len(seeds)
    lows = [value - low for value, low, _ in values if low is not None]
    highs = [high - value for value, _, high in values if high is not None]
    if len(lows) < len(seeds) or len(highs) < len(seeds):
        return Number(mean, None, None, seeds)
    scatter = seed_error(seeds)
    below, above = (math.hypot(math.fsum(part) / len(part), scatter) for part in (lows, highs))
    floor = 0.0 if metric and all(low is not None and low >= 0 for _, low, _ in values) else -math.inf
    ceiling = 1.0 if metric.startswith(_SHARE_METRICS) else math.inf
    return Number(mean, max(floor, mean - below), min(ceiling, mean + above), seeds)


def seed_error(values: Sequence[float]) -> float:
    """Half the width of Student's confidence interval of the mean over seeds; 0 for a single seed."""
    if len(values) < 2:
        return 0.0
    from scipy.stats import t

    return float(t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def interval_around(value: float, draws: Floats | None, seeds: Sequence[float], floor: float = -math.inf) -> Number:
    """``value`` with the bootstrap interval of ``draws`` (point estimate first), centred on it, and seed variance."""
    if draws is None or not _has_enough_draws(draws):
        return Number(value, None, None, tuple(seeds))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(draws[1:], [tail, 1 - tail]) - draws[0]
    scatter = seed_error(seeds)
    below, above = math.hypot(min(0.0, low), scatter), math.hypot(max(0.0, high), scatter)
    return Number(value, max(floor, value - below), value + above, tuple(seeds))


def is_significantly_worse(draws: Floats | None, best: Floats | None, rows: int) -> bool | None:
    """Whether ``draws`` are significantly above those of the best row, paired by document.

    Bonferroni: the one-sided bound is at 1 - 0.05 / ``rows``. None where there are no numbers of single documents.
    """
    if draws is None or best is None or not _has_enough_draws(draws - best):
        return None
    tail = max((1 - CONFIDENCE) / max(1, rows), 1 / len(draws[1:]))
    return bool(np.nanquantile(draws[1:] - best[1:], tail) > 0)


def _has_enough_draws(draws: Floats) -> bool:
    return not np.isnan(draws[0]) and bool(np.mean(~np.isnan(draws)) >= _MIN_FINITE_SHARE)


def find_dominating(
    points: Mapping[str, tuple[float, float]], rivals: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """For each point the rivals that are lower in both coordinates."""
    return {
        name: [rival for rival in rivals[name] if points[rival][0] < forget and points[rival][1] < retain]
        for name, (forget, retain) in points.items()
    }
