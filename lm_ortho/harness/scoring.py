"""Aggregations: what lm-eval does with the values of all documents of a task.

A value is ``(number, group)``, or ``(nll, tokens, group)`` for a perplexity. Each aggregation comes three
times: the value, and the ``_low`` and ``_high`` bound of its 95 % interval over groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_ortho import metrics
from lm_ortho.metrics import Interval

Aggregation = Callable[[Sequence[Any]], float]


def _perplexity(items: Sequence[tuple[float, int, str]]) -> Interval:
    nll, tokens, groups = zip(*items, strict=True)
    return metrics.token_perplexity(nll, tokens, groups)


def _mean(items: Sequence[tuple[float, str]]) -> Interval:
    values, groups = zip(*items, strict=True)
    return metrics.clustered_mean(values, groups)


def _rate(items: Sequence[tuple[float, str]]) -> Interval:
    hits, groups = zip(*items, strict=True)
    return metrics.rate(hits, groups)


def _any_rate(items: Sequence[tuple[float, str]]) -> Interval:
    """Share of groups with at least one hit."""
    hit: dict[str, float] = {}
    for value, group in items:
        hit[group] = max(value, hit.get(group, 0.0))
    return metrics.rate(list(hit.values()))


def _geometric_mean(items: Sequence[tuple[float, str]]) -> Interval:
    logs, groups = zip(*items, strict=True)
    return metrics.geometric_mean(logs, groups)


def _three(interval: Callable[[Any], Interval]) -> tuple[Aggregation, Aggregation, Aggregation]:
    def value(items: Sequence[Any]) -> float:
        return interval(items).value

    def low(items: Sequence[Any]) -> float:
        return interval(items).low

    def high(items: Sequence[Any]) -> float:
        return interval(items).high

    return value, low, high


perplexity, perplexity_low, perplexity_high = _three(_perplexity)
mean, mean_low, mean_high = _three(_mean)
rate, rate_low, rate_high = _three(_rate)
any_rate, any_rate_low, any_rate_high = _three(_any_rate)
geometric_mean, geometric_mean_low, geometric_mean_high = _three(_geometric_mean)
