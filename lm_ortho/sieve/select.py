"""Selects the support from the scores, with one budget for the whole model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lm_ortho.errors import UserError

_BUCKETS = 1 << 16
"""Values of each half of a 32-bit key."""


def select_support(
    scores: Mapping[str, Tensor], density: float, other_supports: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Boolean support (out_features, in_features) per layer: the ``floor(density * weights)`` highest scores.

    The budget is met exactly and spent wherever the scores are highest: one matrix may take most of it. Positions of
    ``other_supports`` (out_features, in_features; bool) are excluded. Ties are broken by position, earlier layers
    first. Beside the scores this needs the memory of a few copies of one layer.

    Raises:
        ValueError: when a score is NaN.
        UserError: when the budget is larger than the number of free positions.
    """
    for name, score in scores.items():
        if score.isnan().any():
            raise ValueError(f"the sieve gave NaN scores for {name}")
    excluded_masks = other_supports or {}
    total = sum(score.numel() for score in scores.values())
    budget = int(density * total + 1e-9)
    free = total - sum(int(mask.sum()) for mask in excluded_masks.values())
    if budget > free:
        raise UserError(f"density={density:g}: other memories leave only {free / total:.3g} of the weights")
    threshold, tie_budget = _threshold_key(scores, excluded_masks, budget)
    support = {}
    for name, score in scores.items():
        keys = _sort_keys(score, excluded_masks.get(name))
        mask = keys > threshold
        ties = (keys == threshold).nonzero()[:tie_budget, 0]
        mask[ties] = True
        tie_budget -= len(ties)
        support[name] = mask.reshape(score.shape)
    return support


def _sort_keys(score: Tensor, excluded_mask: Tensor | None) -> Tensor:
    """Flat int32 keys in the order of the scores; both zeros have one key, and excluded positions come last."""
    score = score.detach().float() + 0.0
    if excluded_mask is not None:
        score = score.masked_fill(excluded_mask.to(score.device), -torch.inf)
    bits = score.flatten().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _threshold_key(scores: Mapping[str, Tensor], excluded_masks: Mapping[str, Tensor], budget: int) -> tuple[int, int]:
    """The lowest key within the budget, and how many positions with exactly that key are within it.

    A radix selection over two histograms, of the upper and of the lower 16 bits, so that nothing is sorted.
    """
    if budget == 0:
        return 2**31 - 1, 0
    upper_counts = torch.zeros(_BUCKETS, dtype=torch.int64)
    for name, score in scores.items():
        upper = (_sort_keys(score, excluded_masks.get(name)) >> 16) + _BUCKETS // 2
        upper_counts += torch.bincount(upper, minlength=_BUCKETS).cpu()
    bucket, budget_left = _index_from_top(upper_counts, budget)
    lower_counts = torch.zeros(_BUCKETS, dtype=torch.int64)
    for name, score in scores.items():
        keys = _sort_keys(score, excluded_masks.get(name))
        lower = keys[(keys >> 16) + _BUCKETS // 2 == bucket] & (_BUCKETS - 1)
        lower_counts += torch.bincount(lower, minlength=_BUCKETS).cpu()
    lower_key, budget_left = _index_from_top(lower_counts, budget_left)
    return ((bucket - _BUCKETS // 2) << 16) + lower_key, budget_left


def _index_from_top(counts: Tensor, budget: int) -> tuple[int, int]:
    """The index at which the counts, summed from the last one on, reach ``budget``, and how many it contributes."""
    sums = counts.flip(0).cumsum(0)
    steps = int((sums < budget).sum())
    above = int(sums[steps - 1]) if steps else 0
    return len(counts) - 1 - steps, budget - above
