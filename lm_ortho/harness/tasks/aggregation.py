"""Aggregations: what lm-eval does with the values of all documents of a task.

A value is ``(number, group)``, or ``(nll, tokens, group)`` for a perplexity; others say themselves what they are.
Each aggregation comes three times: the value, and the ``_low`` and ``_high`` bound of its 95 % interval over groups.

A metric that cannot be had is a string that says why, "n/a: ...": for a document, and then for the whole table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_ortho import metrics
from lm_ortho.metrics import Interval, membership, tofu

Aggregation = Callable[[Sequence[Any]], float | str]


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


def not_available(reason: str) -> str:
    """What stands in the place of a metric that cannot be computed, and why not."""
    return f"n/a: {reason}"


def _said(items: Sequence[Any]) -> str | None:
    return next((item for item in items if isinstance(item, str)), None)


def with_intervals(interval: Callable[[Any], Interval | str]) -> tuple[Aggregation, Aggregation, Aggregation]:
    """The aggregations for the value and for its two bounds; where there is no value all three say why."""

    def part(items: Sequence[Any], name: str) -> float | str:
        found = _said(items) or interval(items)
        return found if isinstance(found, str) else float(getattr(found, name))

    def value(items: Sequence[Any]) -> float | str:
        return part(items, "value")

    def low(items: Sequence[Any]) -> float | str:
        return part(items, "low")

    def high(items: Sequence[Any]) -> float | str:
        return part(items, "high")

    return value, low, high


perplexity, perplexity_low, perplexity_high = with_intervals(_perplexity)
mean, mean_low, mean_high = with_intervals(_mean)
rate, rate_low, rate_high = with_intervals(_rate)
any_rate, any_rate_low, any_rate_high = with_intervals(_any_rate)
geometric_mean, geometric_mean_low, geometric_mean_high = with_intervals(_geometric_mean)


def _compared(items: Sequence[tuple[float, float | None, str, str]]) -> tuple[Any, Any, Any] | str:
    """(own log R, the retain-only model's, groups), or why there is nothing to compare with."""
    if why := next((reason for _, other, _, reason in items if other is None), None):
        return why
    own, other, groups, _ = zip(*items, strict=True)
    return own, other, groups


def forget_quality(items: Sequence[tuple[float, float | None, str, str]]) -> float | str:
    """p-value of the two-sample KS test on the truth ratio. Items: (log R, the retain-only model's, group, why not)."""
    found = _said(items) or _compared(items)
    return found if isinstance(found, str) else metrics.ks(found[0], found[1]).pvalue


def _forget_ks(items: Sequence[tuple[float, float | None, str, str]]) -> Interval | str:
    found = _compared(items)
    return found if isinstance(found, str) else metrics.ks_distance(*found)


PrivLeakItem = tuple[float | None, float | None, str, str, str, float | None]
"""(Min-K% score, that of the retrained model, member or other, group, why not, AUC of the retrained model)."""


def _priv_leak(items: Sequence[PrivLeakItem]) -> Interval | str:
    if any(item[0] is None for item in items):
        return not_available("the model gives no probability per token")
    parts = [[item for item in items if item[2] == part] for part in ("member", "other")]
    known = items[0][5]
    if why := next((item[4] for item in items if item[1] is None and item[4]), None):
        return why
    if not all(parts) or (known is None and any(item[1] is None for item in items)):
        return not_available("no hold-out rows among those measured here and with the retrained model")
    groups = ([item[3] for item in parts[0]], [item[3] for item in parts[1]])
    own: Any = tuple([item[0] for item in part] for part in parts)
    other: Any = tuple([item[1] for item in part] for part in parts)
    if known is None and metrics.auc(*other) == 1:
        return not_available("the retrained model tells the two sets apart without an error")
    return membership.priv_leak_interval(own, other if known is None else known, groups)


def _utility(items: Sequence[tuple[str, float, float, float, str]]) -> Interval | str:
    missing = set(tofu.SETS) - {part for part, *_ in items}
    if missing:
        return not_available(f"no document of {', '.join(sorted(missing))} among those measured")
    sets = {part: [item for item in items if item[0] == part] for part in tofu.SETS}
    values = {part: [item[1:4] for item in found] for part, found in sets.items()}
    return tofu.utility_interval(values, {part: [item[4] for item in found] for part, found in sets.items()})


forget_ks, forget_ks_low, forget_ks_high = with_intervals(_forget_ks)
priv_leak, priv_leak_low, priv_leak_high = with_intervals(_priv_leak)
utility, utility_low, utility_high = with_intervals(_utility)


MemberItem = tuple[float, str, str, Any]
"""(score, member or other, group, log-probability); for exposure the last is the kind of prompt."""


def _two_kinds(items: Sequence[MemberItem]) -> Any | str:
    parts = [[item for item in items if item[1] == part] for part in ("member", "other")]
    if not all(parts):
        return not_available("only members, or only others, among the documents measured")
    (members, member_groups), (others, other_groups) = (
        ([item[0] for item in part], [item[2] for item in part]) for part in parts
    )
    return members, others, (member_groups, other_groups)


def _auc(items: Sequence[MemberItem]) -> Interval | str:
    found = _two_kinds(items)
    return found if isinstance(found, str) else membership.auc_interval(*found)


def _tpr(items: Sequence[MemberItem]) -> Interval | str:
    found = _two_kinds(items)
    return found if isinstance(found, str) else membership.tpr_interval(*found)


def _exposure(items: Sequence[MemberItem]) -> Interval | str:
    """Mean exposure in bits: each planted canary is ranked among those never planted with the same kind of prompt."""
    bits, owners = list[float](), list[str]()
    for prompt in sorted({item[3] for item in items}):
        found = _two_kinds([item for item in items if item[3] == prompt])
        if isinstance(found, str):
            return found
        members, others, groups = found
        bits += metrics.exposure([-score for score in members], [-score for score in others]).tolist()
        owners += groups[0]
    return metrics.clustered_mean(bits, owners)


auc, auc_low, auc_high = with_intervals(_auc)
tpr, tpr_low, tpr_high = with_intervals(_tpr)
exposure, exposure_low, exposure_high = with_intervals(_exposure)
