"""Metrics as pure functions of numbers: perplexity, truth ratio, extraction, membership, and their intervals."""

from lm_ortho.metrics.compare import KS, auc, auc_difference, exposure, ks, ks_distance, paired_difference
from lm_ortho.metrics.interval import Interval, clustered_mean, clustered_ratio, rate, wilson
from lm_ortho.metrics.likelihood import (
    answer_probability,
    geometric_mean,
    log_truth_ratio,
    token_perplexity,
    truth_ratio,
)

__all__ = [
    "KS",
    "Interval",
    "answer_probability",
    "auc",
    "auc_difference",
    "clustered_mean",
    "clustered_ratio",
    "exposure",
    "geometric_mean",
    "ks",
    "ks_distance",
    "log_truth_ratio",
    "paired_difference",
    "rate",
    "token_perplexity",
    "truth_ratio",
    "wilson",
]
