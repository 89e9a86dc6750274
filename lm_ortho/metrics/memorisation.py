"""Verbatim memorisation: how much of a text greedy decoding reproduces word for word."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def exact_memorisation(correct: ArrayLike) -> float:
    """Returns the share of tokens that are the most likely ones, each given the true tokens before it.

    ``correct`` (tokens,) is bool. Source: Tirumala et al. 2022, arXiv 2205.10770.
    """
    return float(_check_flags(correct).mean())


def extraction_strength(correct: ArrayLike) -> float:
    """Returns 1 - k/n for the shortest prefix of k tokens after which greedy decoding gives the remaining n - k.

    While every token is right, free decoding and teacher forcing see the same prefix. So only the run of right tokens
    at the end counts. ``correct`` (tokens,) is bool. Source: Carlini et al. 2021, arXiv 2012.07805, in the
    form of open-unlearning.
    """
    flags = _check_flags(correct)
    wrong = np.flatnonzero(~flags)
    return 1.0 if not len(wrong) else float(len(flags) - 1 - wrong[-1]) / len(flags)


def extraction_probability(logp: ArrayLike, samples: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Returns (texts,) the probability that at least one of ``samples`` draws from the model is exactly the text.

    ``logp`` (texts,) is the log-probability of each text in nats. The formula is exact for sampling at temperature 1,
    so nothing is sampled and the number does not depend on a seed.
    Source: Hayes et al. 2024, probabilistic discoverable extraction, arXiv 2410.19482.
    """
    logs = np.asarray(logp, dtype=float)
    if logs.ndim != 1 or not len(logs) or np.isnan(logs).any() or (logs > 1e-3).any():
        raise ValueError("logp: expected one logarithm of a probability per text")
    if samples < 1:
        raise ValueError(f"samples={samples}: at least one sample is needed")
    with np.errstate(divide="ignore"):
        return -np.expm1(samples * np.log1p(-np.exp(np.minimum(logs, 0.0))))


def edit_distance(first: Sequence[object], second: Sequence[object]) -> int:
    """Returns the fewest insertions, deletions and replacements between two sequences (Levenshtein 1966)."""
    short, long = sorted((list(first), list(second)), key=len)
    row = list(range(len(short) + 1))
    for i, item in enumerate(long, 1):
        diagonal, row[0] = row[0], i
        for j, counterpart in enumerate(short, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (item != counterpart))
    return row[-1]


def is_near_verbatim(generated: Sequence[object], true: Sequence[object], tolerance: float = 0.1) -> bool:
    """Returns whether a continuation equals the true one up to ``tolerance`` edits per true token.

    A tolerance of 0 means verbatim. Source of the tolerant form: Ippolito et al. 2023, arXiv 2210.17546.
    """
    if not len(true):
        raise ValueError("true: an empty continuation cannot be reproduced")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance}: must be at least 0 and below 1")
    return edit_distance(generated, true) <= tolerance * len(true)


def _check_flags(correct: ArrayLike) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    flags = np.asarray(correct)
    if flags.ndim != 1 or not len(flags) or flags.dtype != bool:
        raise ValueError(f"correct: expected one bool per token, found {flags.dtype} of shape {flags.shape}")
    return flags
