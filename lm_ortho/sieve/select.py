"""From scores to the support: one budget over the whole model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def select_support(scores: Mapping[str, Tensor], density: float) -> dict[str, Tensor]:
    """Boolean support per layer: exactly ``floor(density * weights)`` positions in all, never more.

    The highest scores win, wherever they are: one matrix may take most of the budget. Ties are broken by position,
    earlier layers first.

    Raises:
        ValueError: when a score is NaN.
    """
    for name, score in scores.items():
        if score.isnan().any():
            raise ValueError(f"the sieve gave NaN scores for {name}")
    every = torch.cat([score.flatten() for score in scores.values()])
    budget = int(density * every.numel() + 1e-9)
    mask = torch.zeros_like(every, dtype=torch.bool)
    mask[every.argsort(descending=True, stable=True)[:budget]] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for part, (name, score) in zip(parts, scores.items(), strict=True)}
