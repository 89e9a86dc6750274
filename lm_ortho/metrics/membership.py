"""Membership inference: scores that are higher for documents a model was trained on, and how well they tell.

Every score takes natural logarithms of probabilities of the tokens of one document, given those before them.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import ArrayLike

from lm_ortho.metrics.compare import auc, weighted_auc
from lm_ortho.metrics.interval import CONFIDENCE, RESAMPLES, Floats, Groups, Interval, around, drawn_weights, finite

SHARE = 0.2
"""Share of the least likely tokens in Min-K%."""


def loss_score(logp: ArrayLike) -> float:
    """Mean log-probability per token (Yeom et al. 2018, arXiv 1709.01604)."""
    return float(finite(logp, "logp").mean())


def zlib_score(logp: ArrayLike, text: str) -> float:
    """Log-probability of the text per byte of it under zlib (Carlini et al. 2021, arXiv 2012.07805).

    What is likely merely because it repeats itself compresses well, too. Raises ``ValueError`` for an empty text.
    """
    if not text:
        raise ValueError("text: an empty text has no compressed length to compare with")
    return float(finite(logp, "logp").sum()) / len(zlib.compress(text.encode()))


def reference_score(logp: ArrayLike, reference_logp: ArrayLike) -> float:
    """Mean log-probability beyond that of a model that was not trained on it (Carlini et al. 2021, arXiv 2012.07805).

    Both sums are over the whole document, so the two may have different tokenizers; the mean is over own tokens.
    """
    own, theirs = finite(logp, "logp"), finite(reference_logp, "reference_logp")
    return float(own.sum() - theirs.sum()) / len(own)


def min_k_score(logp: ArrayLike, share: float = SHARE) -> float:
    """Mean log-probability of the least likely tokens, at least one (Shi et al. 2024, Min-K%, arXiv 2310.16789)."""
    return _lowest_mean(finite(logp, "logp"), share)


def min_k_plus_plus_score(logp: ArrayLike, mean: ArrayLike, deviation: ArrayLike, share: float = SHARE) -> float:
    """Min-K% of log-probabilities standardised by the whole distribution at their place.

    ``mean`` and ``deviation`` (tokens,) are those of log p(z) for z drawn from the model's own distribution there. A
    deviation of 0 (a distribution that is uniform, or certain) makes the token's value 0. Source: Zhang et al. 2024,
    Min-K%++, arXiv 2404.02936.
    """
    own, centre, width = finite(logp, "logp"), finite(mean, "mean"), finite(deviation, "deviation")
    if not len(own) == len(centre) == len(width):
        raise ValueError(f"{len(own)} tokens with {len(centre)} means and {len(width)} deviations")
    if (width < 0).any():
        raise ValueError("deviation: a standard deviation is not negative")
    standard = np.divide(own - centre, width, out=np.zeros_like(own), where=width > 0)
    return _lowest_mean(standard, share)


def _lowest_mean(values: Floats, share: float) -> float:
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: must be above 0 and at most 1")
    count = max(1, math.floor(share * len(values) + 1e-9))
    return float(np.partition(values, count - 1)[:count].mean())


def tpr_at_fpr(members: ArrayLike, others: ArrayLike, fpr: float = 0.01) -> float:
    """Share of members above the lowest threshold that at most ``fpr`` of the others reach.

    Members that score like the threshold itself are not counted: the attacker could not tell them from the others.
    """
    high, low = finite(members, "members"), np.sort(finite(others, "others"))[::-1]
    if not 0 <= fpr <= 1:
        raise ValueError(f"fpr={fpr}: must be between 0 and 1")
    allowed = math.floor(fpr * len(low) + 1e-9)
    if allowed >= len(low):
        return 1.0
    return float((high > low[allowed]).mean())


def auc_interval(
    members: ArrayLike,
    others: ArrayLike,
    groups: tuple[Groups, Groups],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """``auc`` with an interval over groups (authors, say), those of the members and those of the others."""
    high, low = finite(members, "members"), finite(others, "others")
    drawn = [drawn_weights(part, resamples, seed + i) for i, part in enumerate(groups)]
    return around(auc(high, low), weighted_auc(high, low, *drawn), confidence)


def tpr_interval(
    members: ArrayLike,
    others: ArrayLike,
    groups: tuple[Groups, Groups],
    fpr: float = 0.01,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """``tpr_at_fpr`` with an interval over groups; the threshold is set anew in every resample."""
    high, low = finite(members, "members"), finite(others, "others")
    value = tpr_at_fpr(high, low, fpr)
    weights = [drawn_weights(part, resamples, seed + i) for i, part in enumerate(groups)]
    order = np.argsort(-low, kind="stable")
    reached = weights[1][:, order].cumsum(-1)
    allowed = np.floor(fpr * reached[:, -1:] + 1e-9)
    first = (reached > allowed).argmax(-1)  # the best of the others that would be one too many
    thresholds = low[order][first]
    above = (weights[0] * (high > thresholds[:, None])).sum(-1) / weights[0].sum(-1)
    return around(value, np.where(reached[:, -1] > allowed[:, 0], above, 1.0), confidence)


def priv_leak(model_auc: float, retrained_auc: float) -> float:
    """How far a model is from one retrained without the forget set, in percent: MUSE's PrivLeak.

    Both arguments are ``auc`` of Min-K% with the forget set as members and hold-out documents as others. MUSE counts
    the other way round, so the value is that of ``1 - auc``: about 0 like the retrained model, towards -100 where the
    forget set is still remembered, above 0 where it is avoided. Source: Shi et al. 2024, arXiv 2407.06460.

    Raises:
        ValueError: for an AUC outside [0, 1], and a retrained one of 1, which leaves nothing to compare with.
    """
    if not (0 <= model_auc <= 1 and 0 <= retrained_auc < 1):
        raise ValueError(f"AUC of {model_auc} and {retrained_auc}: both lie in [0, 1], the second below 1")
    return 100.0 * (retrained_auc - model_auc) / (1 - retrained_auc)


def priv_leak_interval(
    model: tuple[ArrayLike, ArrayLike],
    retrained: tuple[ArrayLike, ArrayLike] | float,
    groups: tuple[Groups, Groups],
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """``priv_leak`` with an interval over groups; each pair is (scores of the forget set, of the hold-out set).

    Both models are resampled alike, unless only the AUC of the retrained one is known. Resamples in which it tells the
    sets apart without an error are left out: nothing can be compared with that.
    """
    weights = [drawn_weights(part, resamples, seed + i) for i, part in enumerate(groups)]

    def aucs(pair: tuple[ArrayLike, ArrayLike]) -> Floats:
        return weighted_auc(finite(pair[0], "forget"), finite(pair[1], "holdout"), *weights)

    own = aucs(model)
    if isinstance(retrained, tuple):
        value, theirs = priv_leak(auc(*model), auc(*retrained)), aucs(retrained)
    else:
        value, theirs = priv_leak(auc(*model), retrained), np.full_like(own, retrained)
    usable = theirs < 1
    return around(value, 100.0 * (theirs - own)[usable] / (1 - theirs[usable]), confidence)
