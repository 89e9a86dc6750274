"""Membership inference: attack scores that are higher for training documents, and how well they separate.

Every score takes natural logarithms of the probabilities of the tokens of one document, given those before them.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import ArrayLike

from lm_ortho.metrics.compare import auc, weighted_auc
from lm_ortho.metrics.interval import (
    CONFIDENCE,
    RESAMPLES,
    Floats,
    Groups,
    Interval,
    check_finite,
    draw_weights,
    percentile_interval,
)

MIN_K_SHARE = 0.2
"""Share of the least likely tokens in Min-K%."""


def loss_score(logp: ArrayLike) -> float:
    """Returns the mean log-probability per token (Yeom et al. 2018, arXiv 1709.01604)."""
    return float(check_finite(logp, "logp").mean())


def zlib_score(logp: ArrayLike, text: str) -> float:
    """Returns the log-probability of the text per byte of its zlib compression.

    A text that is likely only because it is repetitive also compresses well.
    Source: Carlini et al. 2021, arXiv 2012.07805.

    Raises:
        ValueError: for an empty text.
    """
    if not text:
        raise ValueError("text: an empty text has no compressed length to compare with")
    return float(check_finite(logp, "logp").sum()) / len(zlib.compress(text.encode()))


def reference_score(logp: ArrayLike, reference_logp: ArrayLike) -> float:
    """Returns the mean log-probability in excess of a reference model's (Carlini et al. 2021, arXiv 2012.07805).

    The reference model was not trained on the document. Both sums are over the whole document, so the two models may
    have different tokenizers; the mean is over the tokens of ``logp``.
    """
    values, reference_values = check_finite(logp, "logp"), check_finite(reference_logp, "reference_logp")
    return float(values.sum() - reference_values.sum()) / len(values)


def min_k_score(logp: ArrayLike, share: float = MIN_K_SHARE) -> float:
    """Returns the mean log-probability of the least likely tokens, at least one.

    Source: Shi et al. 2024, Min-K%, arXiv 2310.16789.
    """
    return _mean_of_lowest(check_finite(logp, "logp"), share)


def min_k_plus_plus_score(logp: ArrayLike, mean: ArrayLike, deviation: ArrayLike, share: float = MIN_K_SHARE) -> float:
    """Returns Min-K% of log-probabilities that are standardised by the whole distribution at their position.

    ``mean`` and ``deviation`` (tokens,) are the mean and standard deviation of log p(z) for z drawn from the model's
    own distribution at that position. With a deviation of 0 (a uniform or a certain distribution) the value of the
    token is 0. Source: Zhang et al. 2024, Min-K%++, arXiv 2404.02936.
    """
    values, centre, width = check_finite(logp, "logp"), check_finite(mean, "mean"), check_finite(deviation, "deviation")
    if not len(values) == len(centre) == len(width):
        raise ValueError(f"{len(values)} tokens with {len(centre)} means and {len(width)} deviations")
    if (width < 0).any():
        raise ValueError("deviation: a standard deviation is not negative")
    standardised = np.divide(values - centre, width, out=np.zeros_like(values), where=width > 0)
    return _mean_of_lowest(standardised, share)


def _mean_of_lowest(values: Floats, share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: must be above 0 and at most 1")
    count = max(1, math.floor(share * len(values) + 1e-9))
    return float(np.partition(values, count - 1)[:count].mean())


def tpr_at_fpr(members: ArrayLike, non_members: ArrayLike, fpr: float = 0.01) -> float:
    """Returns the share of members above the lowest threshold that at most ``fpr`` of the non-members reach.

    Members whose score equals the threshold are not counted, because the attack cannot separate them from non-members.
    """
    member_scores = check_finite(members, "members")
    other_scores = np.sort(check_finite(non_members, "non_members"))[::-1]
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr={fpr}: must be between 0 and 1")
    false_positives = math.floor(fpr * len(other_scores) + 1e-9)
    if false_positives >= len(other_scores):
        return 1.0
    return float((member_scores > other_scores[false_positives]).mean())


def auc_interval(
    members: ArrayLike,
    non_members: ArrayLike,
    groups: tuple[Groups, Groups],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns ``auc`` with an interval over groups (authors, for example) of the members and of the non-members."""
    member_scores, other_scores = check_finite(members, "members"), check_finite(non_members, "non_members")
    weights = [draw_weights(part, resamples, seed + i) for i, part in enumerate(groups)]
    resampled = weighted_auc(member_scores, other_scores, *weights)
    return percentile_interval(auc(member_scores, other_scores), resampled, confidence)


def tpr_interval(
    members: ArrayLike,
    non_members: ArrayLike,
    groups: tuple[Groups, Groups],
    *,
    fpr: float = 0.01,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns ``tpr_at_fpr`` with an interval over groups; every resample has its own threshold."""
    member_scores, other_scores = check_finite(members, "members"), check_finite(non_members, "non_members")
    value = tpr_at_fpr(member_scores, other_scores, fpr)
    # 1. Draw how often each value occurs in each resample.
    member_weights, other_weights = (draw_weights(part, resamples, seed + i) for i, part in enumerate(groups))
    # 2. Per resample, count the non-members from the highest score downwards.
    order = np.argsort(-other_scores, kind="stable")
    counts = other_weights[:, order].cumsum(-1)
    totals = counts[:, -1]
    # 3. The threshold is the score of the first non-member that exceeds the permitted false positives.
    false_positives = np.floor(fpr * totals + 1e-9)
    first = (counts > false_positives[:, None]).argmax(-1)
    thresholds = other_scores[order][first]
    # 4. Count the members above the threshold; without a threshold, every member is a true positive.
    above = (member_weights * (member_scores > thresholds[:, None])).sum(-1) / member_weights.sum(-1)
    return percentile_interval(value, np.where(totals > false_positives, above, 1.0), confidence)


def priv_leak(model_auc: float, retrained_auc: float) -> float:
    """Returns MUSE's PrivLeak in percent: how far a model is from one retrained without the forget set.

    Both arguments are ``auc`` of Min-K% with the forget set as members and held-out documents as non-members. MUSE
    computes the AUC with the signs exchanged, so the value is that of ``1 - auc``. It is about 0 for a model like the
    retrained one, approaches -100 where the forget set is still memorised, and is above 0 where it is avoided.
    Source: Shi et al. 2024, arXiv 2407.06460.

    Raises:
        ValueError: for an AUC outside [0, 1], and for a retrained AUC of 1, against which nothing can be compared.
    """
    if not (0 <= model_auc <= 1 and 0 <= retrained_auc < 1):
        raise ValueError(f"AUC of {model_auc} and {retrained_auc}: both lie in [0, 1], the second below 1")
    return 100.0 * (retrained_auc - model_auc) / (1 - retrained_auc)


def priv_leak_interval(
    model: tuple[ArrayLike, ArrayLike],
    retrained: tuple[ArrayLike, ArrayLike] | float,
    groups: tuple[Groups, Groups],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns ``priv_leak`` with an interval over groups; each pair is (scores of the forget set, of the held-out set).

    Both models are resampled alike, unless only the AUC of the retrained model is known. Resamples in which the
    retrained model separates the two sets without an error are left out, because nothing can be compared with them.
    """
    # 1. Draw how often each value occurs in each resample.
    weights = [draw_weights(part, resamples, seed + i) for i, part in enumerate(groups)]

    def resample_aucs(pair: tuple[ArrayLike, ArrayLike]) -> Floats:
        return weighted_auc(check_finite(pair[0], "forget"), check_finite(pair[1], "holdout"), *weights)

    # 2. Compute the AUC of both models in every resample; a published AUC of the retrained model is a constant.
    model_aucs = resample_aucs(model)
    if isinstance(retrained, tuple):
        value, retrained_aucs = priv_leak(auc(*model), auc(*retrained)), resample_aucs(retrained)
    else:
        value, retrained_aucs = priv_leak(auc(*model), retrained), np.full_like(model_aucs, retrained)
    # 3. Compute PrivLeak wherever the retrained model leaves something to compare with.
    usable = retrained_aucs < 1
    leaks = 100.0 * (retrained_aucs - model_aucs)[usable] / (1 - retrained_aucs[usable])
    return percentile_interval(value, leaks, confidence)
