"""Aggregate metrics of TOFU (Maini et al. 2024, arXiv 2401.06121), computed from the losses in its logs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from lm_ortho.metrics.compare import ks
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
from lm_ortho.metrics.likelihood import LOG_MAX

SETS = ("retain", "real_authors", "world_facts")
PARTS = ("prob", "rouge", "truth_ratio")


def truth_ratio(perturbed_loss: ArrayLike, paraphrased_loss: ArrayLike) -> Floats:
    """Returns R of each question, (questions,): P(wrong answers) / P(paraphrased answer).

    ``perturbed_loss`` is (questions, wrong answers), or (questions,) with one wrong answer each; ``paraphrased_loss``
    is (questions,). Both are mean losses per token in nats. The probability of the wrong answers is the geometric mean
    of their ``exp(-loss)``, as in the published code. Where there is no paraphrase (real authors, world facts) the
    answer takes its place.
    """
    wrong, right = np.asarray(perturbed_loss, dtype=float), check_finite(paraphrased_loss, "paraphrased_loss")
    wrong = wrong[:, None] if wrong.ndim == 1 else wrong
    if wrong.ndim != 2 or wrong.shape[1] == 0 or len(wrong) != len(right):
        raise ValueError(f"perturbed_loss of shape {np.shape(perturbed_loss)} for {len(right)} paraphrased answers")
    check_finite(wrong.ravel(), "perturbed_loss")
    return np.exp(np.clip(right - wrong.mean(1), None, LOG_MAX))


def forget_quality(unlearned_ratios: ArrayLike, retain_ratios: ArrayLike) -> float:
    """Returns the p-value of the two-sample Kolmogorov-Smirnov test on R: unlearned against retain-only model.

    R is taken on the forget set. A value near 1 means that the test cannot distinguish the two models. The test gets
    stricter with the number of questions.
    """
    return ks(unlearned_ratios, retain_ratios).pvalue


def forget_truth_ratio(ratios: ArrayLike) -> float:
    """Returns mean(min(R, 1/R)) on the forget set; it is 1 where right and wrong answers are equally likely."""
    r = check_finite(ratios, "ratios")
    if (r < 0).any():
        raise ValueError("ratios: no ratio of probabilities is negative")
    with np.errstate(divide="ignore"):
        return float(np.minimum(r, 1 / r).mean())


def retain_truth_ratio(ratios: ArrayLike) -> float:
    """Returns mean(max(0, 1 - R)) on a retain set; it is 1 where wrong answers have no probability."""
    return float(np.maximum(0.0, 1.0 - check_finite(ratios, "ratios")).mean())


def choice_probability(true_loss: ArrayLike, wrong_loss: ArrayLike) -> Floats:
    """Returns (questions,) P(answer) / (P(answer) + sum of P(wrong answers)), from mean losses per token in nats.

    ``true_loss`` is (questions,), ``wrong_loss`` (questions, wrong answers). Model utility takes this as the
    probability on real authors and world facts; on the retain set it takes ``exp(-true_loss)``.
    """
    right, wrong = check_finite(true_loss, "true_loss"), np.asarray(wrong_loss, dtype=float)
    if wrong.ndim != 2 or len(wrong) != len(right):
        raise ValueError(f"wrong_loss of shape {wrong.shape} for {len(right)} answers")
    check_finite(wrong.ravel(), "wrong_loss")
    return 1.0 / (1.0 + np.exp(np.clip(right[:, None] - wrong, None, LOG_MAX - 10)).sum(1))


def model_utility(means: Mapping[str, Mapping[str, float]]) -> float:
    """Returns the harmonic mean of nine numbers: probability, ROUGE-L recall and truth ratio of three sets.

    ``means`` maps ``retain``, ``real_authors`` and ``world_facts`` to ``prob``, ``rouge`` and ``truth_ratio``, each a
    mean over its set (``truth_ratio`` is ``retain_truth_ratio``). The result is 0 if any of them is 0.

    Raises:
        ValueError: for a set or part that is missing or unknown, and for a number outside [0, 1].
    """
    if set(means) != set(SETS):
        raise ValueError(f"means has the sets {sorted(means)}; needed are {', '.join(SETS)}")
    for name in SETS:
        if set(means[name]) != set(PARTS):
            raise ValueError(f"means[{name!r}] has {sorted(means[name])}; needed are {', '.join(PARTS)}")
    values = check_finite([means[name][part] for name in SETS for part in PARTS], "means")
    if ((values < 0) | (values > 1)).any():
        raise ValueError("means: every number lies between 0 and 1")
    return 0.0 if (values == 0).any() else float(len(values) / (1 / values).sum())


def utility_interval(
    values: Mapping[str, ArrayLike],
    groups: Mapping[str, Groups],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Returns ``model_utility`` of the means over three sets, with an interval over groups (authors) of each set.

    ``values[set]`` is (questions, 3): probability, ROUGE-L recall, max(0, 1 - R), in the order of ``PARTS``.
    """
    resampled_means, means = [], {}
    for number, name in enumerate(SETS):
        table = np.asarray(values[name], dtype=float)
        if table.ndim != 2 or table.shape[1] != len(PARTS):
            raise ValueError(f"values[{name!r}] of shape {table.shape}; needed is (questions, {len(PARTS)})")
        weights = draw_weights(groups[name], resamples, seed + number)
        resampled_means.append(weights @ table / weights.sum(-1, keepdims=True))
        means[name] = dict(zip(PARTS, table.mean(0).tolist(), strict=True))
    nine = np.concatenate(resampled_means, -1)
    with np.errstate(divide="ignore"):
        return percentile_interval(model_utility(means), nine.shape[-1] / (1 / nine).sum(-1), confidence)
