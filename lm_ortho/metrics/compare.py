"""Two models, or two kinds of documents, against each other."""

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
    around,
    cluster_sums,
    drawn_weights,
    finite,
    resampled_ratios,
)


class KS(NamedTuple):
    """Largest distance between two empirical distribution functions, and how likely it is by chance."""

    statistic: float
    pvalue: float


def ks(first: ArrayLike, second: ArrayLike) -> KS:
    """Two-sided two-sample Kolmogorov-Smirnov; its p-value on truth ratios is TOFU's forget quality."""
    from scipy.stats import ks_2samp

    result = ks_2samp(finite(first, "first"), finite(second, "second"))
    return KS(float(result.statistic), float(result.pvalue))


def ks_distance(
    first: ArrayLike,
    second: ArrayLike,
    groups: Groups,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The statistic of ``ks`` for two models on the same documents, with an interval over groups.

    Both models lose the same groups in a resample. Drawing with replacement adds a distance of its own, so the
    interval of two equal models lies above 0; for a bar from above that errs on the strict side.
    """
    one, two = finite(first, "first"), finite(second, "second")
    if not len(one) == len(two) == len(groups):
        raise ValueError(f"{len(one)} and {len(two)} values in {len(groups)} groups: the documents must be the same")
    every = np.concatenate([one, two])
    order = np.argsort(every, kind="stable")
    ends = np.append(np.diff(every[order]) != 0, True)  # between equal values the distance is not defined

    def distances(weights: Floats) -> Floats:
        share = weights / weights.sum(-1, keepdims=True)
        return np.abs(np.concatenate([share, -share], -1)[:, order].cumsum(-1)[:, ends]).max(-1)

    value = float(distances(np.ones((1, len(one))))[0])
    return around(value, distances(drawn_weights(groups, resamples, seed)), confidence)


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """Chance that a member scores higher than another document, ties counted half; 0.5 is blind."""
    from sklearn.metrics import roc_auc_score

    high, low = finite(members, "members"), finite(others, "others")
    labels = np.r_[np.ones(len(high)), np.zeros(len(low))]
    return float(roc_auc_score(labels, np.r_[high, low]))


def auc_difference(
    model: tuple[ArrayLike, ArrayLike],
    reference: tuple[ArrayLike, ArrayLike],
    groups: tuple[Groups, Groups],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """``auc`` of the model minus that of the reference, with an interval over groups of members and of others.

    ``model`` and ``reference`` are each (scores of the members, scores of the others) on the same documents, whose
    groups are ``groups``, in this order. A resample draws both kinds of groups, the same for both models.
    """
    scores = [[finite(part, "scores") for part in pair] for pair in (model, reference)]
    weights = [drawn_weights(part, resamples, seed + i) for i, part in enumerate(groups)]
    value = auc(*model) - auc(*reference)
    own, theirs = (weighted_auc(members, others, *weights) for members, others in scores)
    return around(value, own - theirs, confidence)


def weighted_auc(members: Floats, others: Floats, member_weights: Floats, other_weights: Floats) -> Floats:
    """``auc`` per resample, where value i counts ``weights[:, i]`` times."""
    order = np.argsort(others)
    upto = np.pad(other_weights[:, order].cumsum(-1), ((0, 0), (1, 0)))
    below = sum(upto[:, np.searchsorted(others[order], members, side=side)] for side in ("left", "right")) / 2
    return (member_weights * below).sum(-1) / member_weights.sum(-1) / upto[:, -1]


def exposure(losses: ArrayLike, candidates: ArrayLike) -> Floats:
    """Bits by which each canary stands out: ``log2(size) - log2(rank)`` of its loss among all candidates.

    ``candidates`` are losses of canaries that were never planted. Rank 1 is the lowest loss; the canary is
    ranked against them alone, ties count half. 0 bits: last; about 1.44 on average for an unknown canary;
    ``log2(size)`` at most, where ``size = len(candidates) + 1``.
    Source: Carlini et al. 2019, arXiv 1802.08232.
    """
    own, pool = finite(losses, "losses"), np.sort(finite(candidates, "candidates"))
    below = np.searchsorted(pool, own, side="left")
    ties = np.searchsorted(pool, own, side="right") - below
    rank = 1 + below + ties / 2
    return np.log2(len(pool) + 1) - np.log2(rank)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: Groups | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """``mean(first) - mean(second)`` over the same documents; each bound is one-sided at ``confidence``.

    ``low`` answers "at least how much better is the first, at worst", ``high`` "at most how much". Where all
    documents agree, a bootstrap has no width; then the bounds say how rare a disagreement must be to stay
    unseen in that many clusters, ``1 - (1 - confidence) ** (1 / clusters)``.
    """
    one, two = finite(first, "first"), finite(second, "second")
    if len(one) != len(two):
        raise ValueError(f"{len(one)} values for {len(two)} others: the documents must be the same")
    sums, sizes = cluster_sums([one - two, np.ones_like(one)], groups)
    value = float((one - two).mean())
    if not (one - two).any():
        bound = 1 - (1 - confidence) ** (1 / len(sums))
        return Interval(0.0, -bound, bound)
    differences = resampled_ratios(sums, sizes, resamples, seed)
    low, high = np.quantile(differences, [1 - confidence, confidence])
    return Interval(value, min(float(low), value), max(float(high), value))
