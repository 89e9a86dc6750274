"""From scores to the support: a budget over the whole model with a cap per matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CAP = 3.0
"""A matrix may hold at most this many times its share of the budget: unbounded, one layer takes most of it."""


def select_support(scores: Mapping[str, Tensor], density: float, cap: float = CAP) -> dict[str, Tensor]:
    """Boolean support per layer: exactly ``floor(density * weights)`` positions in all, never more.

    Ties are broken by position, earlier layers first. A NaN score is an error.

    Raises:
        ValueError: when a score is NaN.
    """
    total = sum(score.numel() for score in scores.values())
    budget = int(density * total + 1e-9)
    kept, places = [], []
    for name, score in scores.items():
        flat = score.flatten()
        if flat.isnan().any():
            raise ValueError(f"the sieve gave NaN scores for {name}")
        k = min(flat.numel(), max(1, int(cap * density * flat.numel())))
        order = flat.argsort(descending=True, stable=True)[:k]
        kept.append(flat[order])
        places.append(order)
    chosen = torch.cat(kept).argsort(descending=True, stable=True)[:budget]
    support, offset = {}, 0
    for (name, score), order in zip(scores.items(), places, strict=True):
        mine = chosen[(chosen >= offset) & (chosen < offset + len(order))] - offset
        mask = torch.zeros(score.numel(), dtype=torch.bool)
        mask[order[mine]] = True
        support[name] = mask.reshape(score.shape)
        offset += len(order)
    return support
