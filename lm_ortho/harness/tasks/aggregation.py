"""Aggregations: lm-eval calls them with the values of all documents of a task.

The value of a document is ``(number, group)``, or ``(nll, tokens, group)`` for a perplexity; the remaining kinds are
described below. There are three of each aggregation: the value, and the ``_low`` and ``_high`` bound of its 95 %
confidence interval over groups.

A metric that cannot be computed for a document is a string with the reason, "n/a: ...", which also appears in the
table of results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
    """Returns the share of groups with at least one hit."""
    group_hits: dict[str, float] = {}
    for value, group in items:
        group_hits[group] = max(value, group_hits.get(group, 0.0))
    return metrics.rate(list(group_hits.values()))


def _geometric_mean(items: Sequence[tuple[float, str]]) -> Interval:
    logs, groups = zip(*items, strict=True)
    return metrics.geometric_mean(logs, groups)


def not_available(reason: str) -> str:
    """Returns the value of a metric that cannot be computed, with the reason."""
    return f"n/a: {reason}"


def _find_reason(items: Sequence[Any]) -> str | None:
    """Returns the first reason why a document has no value, or None."""
    return next((item for item in items if isinstance(item, str)), None)


def make_aggregations(interval: Callable[[Any], Interval | str]) -> tuple[Aggregation, Aggregation, Aggregation]:
    """Returns the aggregations for the value and its two bounds. Without a value, all three return the reason."""

    def get_field(items: Sequence[Any], name: str) -> float | str:
        result = _find_reason(items) or interval(items)
        return result if isinstance(result, str) else float(getattr(result, name))

    def value(items: Sequence[Any]) -> float | str:
        return get_field(items, "value")

    def low(items: Sequence[Any]) -> float | str:
        return get_field(items, "low")

    def high(items: Sequence[Any]) -> float | str:
        return get_field(items, "high")

    return value, low, high


perplexity, perplexity_low, perplexity_high = make_aggregations(_perplexity)
mean, mean_low, mean_high = make_aggregations(_mean)
rate, rate_low, rate_high = make_aggregations(_rate)
any_rate, any_rate_low, any_rate_high = make_aggregations(_any_rate)
geometric_mean, geometric_mean_low, geometric_mean_high = make_aggregations(_geometric_mean)


RatioItem = tuple[float, float | None, str, str]
"""(log R, log R of the retain-only model, group, reason why the second is missing)."""


def _split_ratios(items: Sequence[RatioItem]) -> tuple[Any, Any, Any] | str:
    """Returns (log R, log R of the retain-only model, groups), or the reason why the second is missing."""
    if missing := next((reason for _, retain_ratio, _, reason in items if retain_ratio is None), None):
        return missing
    ratios, retain_ratios, groups, _ = zip(*items, strict=True)
    return ratios, retain_ratios, groups


def forget_quality(items: Sequence[RatioItem]) -> float | str:
    """Returns the p-value of the two-sample Kolmogorov-Smirnov test on the truth ratio."""
    result = _find_reason(items) or _split_ratios(items)
    return result if isinstance(result, str) else metrics.ks(result[0], result[1]).pvalue


def _forget_ks(items: Sequence[RatioItem]) -> Interval | str:
    result = _split_ratios(items)
    return result if isinstance(result, str) else metrics.ks_distance(*result)


class PrivLeakItem(NamedTuple):
    """The value of one document for PrivLeak.

    ``score`` is its Min-K% score, ``retrained_score`` that of the retrained model, ``part`` "member" or "other",
    ``reason`` why ``retrained_score`` is missing, and ``retrained_auc`` the published AUC of the retrained model.
    """

    score: float | None
    retrained_score: float | None
    part: str
    group: str
    reason: str
    retrained_auc: float | None


def _priv_leak(values: Sequence[tuple[Any, ...]]) -> Interval | str:
    items = [PrivLeakItem(*value) for value in values]
    if any(item.score is None for item in items):
        return not_available("the model gives no probability per token")
    parts = [[item for item in items if item.part == part] for part in ("member", "other")]
    retrained_auc = items[0].retrained_auc
    if missing := next((item.reason for item in items if item.retrained_score is None and item.reason), None):
        return missing
    needs_scores = retrained_auc is None
    if not all(parts) or (needs_scores and any(item.retrained_score is None for item in items)):
        return not_available("no held-out rows among those evaluated here and with the retrained model")
    groups = ([item.group for item in parts[0]], [item.group for item in parts[1]])
    scores: Any = tuple([item.score for item in part] for part in parts)
    retrained_scores: Any = tuple([item.retrained_score for item in part] for part in parts)
    if needs_scores and metrics.auc(*retrained_scores) == 1:
        return not_available("the retrained model separates the two sets without an error")
    retrained = retrained_scores if retrained_auc is None else retrained_auc
    return membership.priv_leak_interval(scores, retrained, groups)


def _utility(items: Sequence[tuple[str, float, float, float, str]]) -> Interval | str:
    missing = set(tofu.SETS) - {part for part, *_ in items}
    if missing:
        names = ", ".join(sorted(missing))
        return not_available(
            f"no document of {names} among those evaluated; --metadata tofu_first=N in place of --limit N takes the "
            "first N of each set"
        )
    sets = {part: [item for item in items if item[0] == part] for part in tofu.SETS}
    values = {part: [item[1:4] for item in set_items] for part, set_items in sets.items()}
    groups = {part: [item[4] for item in set_items] for part, set_items in sets.items()}
    return tofu.utility_interval(values, groups)


forget_ks, forget_ks_low, forget_ks_high = make_aggregations(_forget_ks)
priv_leak, priv_leak_low, priv_leak_high = make_aggregations(_priv_leak)
utility, utility_low, utility_high = make_aggregations(_utility)


MemberItem = tuple[float, str, str, Any]
"""(score, "member" or "other", group, log-probability); for exposure the last is the number of the prompt."""


def _split_members(items: Sequence[MemberItem]) -> Any | str:
    """Returns (scores of members, scores of non-members, their groups), or why one of them is missing."""
    parts = [[item for item in items if item[1] == part] for part in ("member", "other")]
    if not all(parts):
        return not_available("only members, or only non-members, among the evaluated documents")
    members, non_members = ([item[0] for item in part] for part in parts)
    member_groups, non_member_groups = ([item[2] for item in part] for part in parts)
    return members, non_members, (member_groups, non_member_groups)


def _auc(items: Sequence[MemberItem]) -> Interval | str:
    result = _split_members(items)
    return result if isinstance(result, str) else membership.auc_interval(*result)


def _tpr(items: Sequence[MemberItem]) -> Interval | str:
    result = _split_members(items)
    return result if isinstance(result, str) else membership.tpr_interval(*result)


def _exposure(items: Sequence[MemberItem]) -> Interval | str:
    """Mean exposure in bits: each planted canary is ranked among unplanted canaries under the same prompt."""
    bits, groups = list[float](), list[str]()
    for prompt in sorted({item[3] for item in items}):
        result = _split_members([item for item in items if item[3] == prompt])
        if isinstance(result, str):
            return result
        members, non_members, (member_groups, _) = result
        bits += metrics.exposure([-score for score in members], [-score for score in non_members]).tolist()
        groups += member_groups
    return metrics.clustered_mean(bits, groups)


auc, auc_low, auc_high = make_aggregations(_auc)
tpr, tpr_low, tpr_high = make_aggregations(_tpr)
exposure, exposure_low, exposure_high = make_aggregations(_exposure)
