"""Comparisons of two models, or of two kinds of documents."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lm_ortho.metrics.interval import (
    CONFIDENCE,
    RESAMPLES,
    Floats,
    Groups,
    Interval,
    bootstrap_ratios,
    check_finite,
    cluster_sums,
    draw_weights,
    percentile_interval,
)


class KS(NamedTuple):
    """The largest distance between two empirical distribution functions, and its p-value."""

    statistic: float
    pvalue: float


def ks(first: ArrayLike, second: ArrayLike) -> KS:
    """Runs the two-sided two-sample Kolmogorov-Smirnov test. Its p-value on truth ratios is TOFU's forget quality."""
    from scipy.stats import ks_2samp

    result = ks_2samp(check_finite(first, "first"), check_finite(second, "second"))
    return KS(float(result.statistic), float(result.pvalue))


def ks_distance(
    first: ArrayLike,
    second: ArrayLike,
    groups: Groups,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns the statistic of ``ks`` for two models on the same documents, with an interval over groups.

    A resample draws the same groups for both models. Drawing with replacement adds a distance of its own, so the
    interval of two equal models lies above 0. A test against an upper acceptance threshold is therefore conservative.
    """
    one, two = check_finite(first, "first"), check_finite(second, "second")
    if not len(one) == len(two) == len(groups):
        raise ValueError(f"{len(one)} and {len(two)} values in {len(groups)} groups: the documents must be the same")
    # 1. Sort the values of both models together; the distance is defined at the last of equal values only.
    values = np.concatenate([one, two])
    order = np.argsort(values, kind="stable")
    is_last = np.append(np.diff(values[order]) != 0, True)

    # 2. Per resample: the largest gap between the two weighted cumulative distributions.
    def compute_distances(weights: Floats) -> Floats:
        share = weights / weights.sum(-1, keepdims=True)
        return np.abs(np.concatenate([share, -share], -1)[:, order].cumsum(-1)[:, is_last]).max(-1)

    value = float(compute_distances(np.ones((1, len(one))))[0])
    return percentile_interval(value, compute_distances(draw_weights(groups, resamples, seed)), confidence)


def auc(members: ArrayLike, non_members: ArrayLike) -> float:
    """Returns the probability that a member scores higher than a non-member, ties counted half; 0.5 is chance."""
    from sklearn.metrics import roc_auc_score

    high, low = check_finite(members, "members"), check_finite(non_members, "non_members")
    labels = np.r_[np.ones(len(high)), np.zeros(len(low))]
    return float(roc_auc_score(labels, np.r_[high, low]))


def auc_difference(
    model: tuple[ArrayLike, ArrayLike],
    reference: tuple[ArrayLike, ArrayLike],
    groups: tuple[Groups, Groups],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns ``auc`` of the model minus that of the reference, with an interval over both kinds of groups.

    ``model`` and ``reference`` are each (scores of the members, scores of the non-members) on the same documents, whose
    groups are ``groups``, in this order. A resample draws both kinds of groups, the same for both models.
    """
    scores = [[check_finite(part, "scores") for part in pair] for pair in (model, reference)]
    weights = [draw_weights(part, resamples, seed + i) for i, part in enumerate(groups)]
    value = auc(*model) - auc(*reference)
    model_aucs, reference_aucs = (weighted_auc(members, non_members, *weights) for members, non_members in scores)
    return percentile_interval(value, model_aucs - reference_aucs, confidence)


def weighted_auc(members: Floats, non_members: Floats, member_weights: Floats, non_member_weights: Floats) -> Floats:
    """Returns (resamples,) values of ``auc``, where value i counts ``weights[:, i]`` times."""
    # 1. Per resample, count the non-members up to each place of the sorted scores.
    order = np.argsort(non_members)
    counts = np.pad(non_member_weights[:, order].cumsum(-1), ((0, 0), (1, 0)))
    # 2. Per member, count the non-members below it, ties half.
    sorted_scores = non_members[order]
    below = sum(counts[:, np.searchsorted(sorted_scores, members, side=side)] for side in ("left", "right")) / 2
    # 3. Average over members, and divide by the number of non-members.
    return (member_weights * below).sum(-1) / member_weights.sum(-1) / counts[:, -1]


def exposure(losses: ArrayLike, candidates: ArrayLike) -> Floats:
    """Returns the exposure of each canary in bits: ``log2(size) - log2(rank)`` of its loss among all candidates.

    ``candidates`` are the losses of canaries that were never planted, and ``size = len(candidates) + 1``. Rank 1 is the
    lowest loss; each canary is ranked against the candidates alone, ties count half. The minimum is 0 bits (ranked
    last), the mean for an unknown canary is about 1.44 bits, the maximum is ``log2(size)``.
    Source: Carlini et al. 2019, arXiv 1802.08232.
    """
    canary_losses = check_finite(losses, "losses")
    candidate_losses = np.sort(check_finite(candidates, "candidates"))
    below = np.searchsorted(candidate_losses, canary_losses, side="left")
    ties = np.searchsorted(candidate_losses, canary_losses, side="right") - below
    rank = 1 + below + ties / 2
    return np.log2(len(candidate_losses) + 1) - np.log2(rank)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: Groups | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns ``mean(first) - mean(second)`` over the same documents; each bound is one-sided at ``confidence``.

    ``low`` is the smallest advantage of the first that is consistent with the data, ``high`` the largest. Where all
    documents agree, a bootstrap has no width. The bounds are then the largest share of disagreeing clusters that would
    still go unobserved in that many clusters, ``1 - (1 - confidence) ** (1 / clusters)``.
    """
    one, two = check_finite(first, "first"), check_finite(second, "second")
    if len(one) != len(two):
        raise ValueError(f"{len(one)} values for {len(two)} values: the documents must be the same")
    # 1. Take the differences per document, and sum them per cluster.
    sums, sizes = cluster_sums([one - two, np.ones_like(one)], groups)
    value = float((one - two).mean())
    # 2. Without any disagreement, bound the share of disagreements that could go unobserved.
    if not (one - two).any():
        bound = 1 - (1 - confidence) ** (1 / len(sums))
        return Interval(0.0, -bound, bound)
    # 3. Otherwise resample clusters, and take a one-sided bound on either side.
    differences = bootstrap_ratios(sums, sizes, resamples=resamples, seed=seed)
    low, high = np.quantile(differences, [1 - confidence, confidence])
    return Interval(value, min(float(low), value), max(float(high), value))
