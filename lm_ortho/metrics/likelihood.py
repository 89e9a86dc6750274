"""What losses say: perplexity per token, answer probability, truth ratio. Losses are in nats."""

from __future__ import annotations

import math
import sys

import numpy as np
from numpy.typing import ArrayLike

from lm_ortho.metrics.interval import (
    CONFIDENCE,
    RESAMPLES,
    Floats,
    Groups,
    Interval,
    clustered_mean,
    clustered_ratio,
    finite,
)

LOG_MAX = math.log(sys.float_info.max)
"""The largest exponent whose power is a float."""


def _exp(value: float) -> float:
    """``exp``, at most the largest float: no finite loss overflows."""
    return math.exp(min(value, LOG_MAX))


def _exp_interval(logs: Interval) -> Interval:
    return Interval(*map(_exp, logs))


def token_perplexity(
    nll: ArrayLike,
    tokens: ArrayLike,
    groups: Groups | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """``exp(sum(nll) / sum(tokens))``; the interval is computed on the exponent.

    ``nll`` holds the summed loss of each document in nats, ``tokens`` its real tokens: no padding, no prompt.
    """
    return _exp_interval(clustered_ratio(nll, tokens, groups, confidence, resamples, seed))


def answer_probability(nll: ArrayLike, tokens: ArrayLike) -> Floats:
    """``exp(-nll / tokens)`` per answer: the length-normalised probability of TOFU (arXiv 2401.06121)."""
    losses, counts = finite(nll, "nll"), finite(tokens, "tokens")
    if (counts <= 0).any():
        raise ValueError("tokens: every value must be positive")
    return np.exp(np.clip(-losses / counts, None, LOG_MAX))


def log_truth_ratio(paraphrased: float, perturbed: ArrayLike) -> float:
    """log R for one question, R = geometric mean of P(perturbed) over P(paraphrased).

    Takes mean losses per token: of the paraphrased right answer, and of each perturbed (wrong) answer. The
    logarithm of a geometric mean of ``exp(-loss)`` is the negated mean of the losses, so nothing is
    exponentiated here. Negative: the right answer is likelier than the wrong ones.
    Source: TOFU, arXiv 2401.06121, section 2.2, with the geometric mean.
    """
    (right,) = finite(paraphrased, "paraphrased")
    return float(right - finite(perturbed, "perturbed").mean())


def truth_ratio(paraphrased: float, perturbed: ArrayLike) -> float:
    """R of ``log_truth_ratio``: below 1 where the model prefers the right answer; never infinite."""
    return _exp(log_truth_ratio(paraphrased, perturbed))


def geometric_mean(
    logs: ArrayLike,
    groups: Groups | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """``exp(mean(logs))``; the interval is computed on the exponent."""
    return _exp_interval(clustered_mean(logs, groups, confidence, resamples, seed))
