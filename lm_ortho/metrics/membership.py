"""Membership inference: scores that are higher for documents a model was trained on, and how well they tell.

Every score takes natural logarithms of probabilities of the tokens of one document, given those before them.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
from numpy.typing import ArrayLike

from lm_ortho.metrics.compare import auc
from lm_ortho.metrics.interval import (
    CONFIDENCE,
    RESAMPLES,
    Floats,
    Groups,
    Interval,
    around,
    drawn_weights,
    finite,
)

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
    above = (high[:, None] > low).astype(float) + 0.5 * (high[:, None] == low)
    weighted = np.einsum("ri,ij,rj->r", drawn[0], above, drawn[1], optimize=True)
    return around(auc(high, low), weighted / drawn[0].sum(-1) / drawn[1].sum(-1), confidence)


def priv_leak(model_auc: float, retrained_auc: float) -> float:
    """How far the AUC of a model is from that of one retrained without the forget set, in percent of the latter.

    Near 0: like the retrained one; far from it in either direction gives the forget set away. Source: MUSE (Shi et al.
    2024, arXiv 2407.06460), whose AUC is that of Min-K% between forget and hold-out documents.
    """
    if not (0 <= model_auc <= 1 and 0 < retrained_auc <= 1):
        raise ValueError(f"AUC of {model_auc} and {retrained_auc}: both lie in [0, 1], the second above 0")
    return 100.0 * (model_auc - retrained_auc) / retrained_auc
