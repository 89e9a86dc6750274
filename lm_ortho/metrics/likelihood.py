"""Metrics computed from losses in nats: perplexity per token, answer probability, truth ratio."""

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
    check_finite,
    clustered_mean,
    clustered_ratio,
)

LOG_MAX = math.log(sys.float_info.max)
"""The largest x for which ``exp(x)`` is a finite float."""


def _exp(value: float) -> float:
    """Returns ``exp(value)``, clipped at the largest float, so that no finite loss overflows."""
    return math.exp(min(value, LOG_MAX))


def _exp_interval(logs: Interval) -> Interval:
    return Interval(*map(_exp, logs))


def token_perplexity(
    nll: ArrayLike,
    tokens: ArrayLike,
    groups: Groups | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns ``exp(sum(nll) / sum(tokens))``; the interval is computed on the exponent.

    ``nll`` is the summed loss of each document in nats, ``tokens`` its number of scored tokens, without padding and
    prompt.
    """
    return _exp_interval(clustered_ratio(nll, tokens, groups, confidence=confidence, resamples=resamples, seed=seed))


def answer_probability(nll: ArrayLike, tokens: ArrayLike) -> Floats:
    """Returns ``exp(-nll / tokens)`` per answer: the length-normalised probability of TOFU (arXiv 2401.06121)."""
    losses, counts = check_finite(nll, "nll"), check_finite(tokens, "tokens")
    if (counts <= 0).any():
        raise ValueError("tokens: every value must be positive")
    return np.exp(np.clip(-losses / counts, None, LOG_MAX))


def log_truth_ratio(paraphrased: float, perturbed: ArrayLike) -> float:
    """Returns log R for one question, where R = geometric mean of P(perturbed answer) / P(paraphrased answer).

    The arguments are mean losses per token in nats: ``paraphrased`` of the right answer in other words, ``perturbed``
    of each wrong answer. The logarithm of a geometric mean of ``exp(-loss)`` is the negated mean of the losses, so
    nothing is exponentiated here. A negative value means that the right answer is likelier than the wrong ones.
    Source: TOFU, arXiv 2401.06121, section 2.2, with the geometric mean.
    """
    (right_loss,) = check_finite(paraphrased, "paraphrased")
    return float(right_loss - check_finite(perturbed, "perturbed").mean())


def truth_ratio(paraphrased: float, perturbed: ArrayLike) -> float:
    """Returns R of ``log_truth_ratio``. It is below 1 where the model prefers the right answer, and never infinite."""
    return _exp(log_truth_ratio(paraphrased, perturbed))


def geometric_mean(
    logs: ArrayLike,
    groups: Groups | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns ``exp(mean(logs))``; the interval is computed on the exponent."""
    return _exp_interval(clustered_mean(logs, groups, confidence=confidence, resamples=resamples, seed=seed))
