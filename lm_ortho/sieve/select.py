"""From scores to the support: one budget over the whole model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lm_ortho.errors import UserError


def select_support(
    scores: Mapping[str, Tensor], density: float, taken: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Boolean support per layer: exactly ``floor(density * weights)`` positions in all, never more.

    Positions that are ``taken`` (out, in; bool) are left out.

    The highest scores win, wherever they are: one matrix may take most of the budget. Ties are broken by position,
    earlier layers first.

    Raises:
        ValueError: when a score is NaN.
        UserError: when more is asked for than is not taken.
    """
    for name, score in scores.items():
        if score.isnan().any():
            raise ValueError(f"the sieve gave NaN scores for {name}")
    held = taken or {}
    scores = {name: s.masked_fill(held[name], -torch.inf) if name in held else s for name, s in scores.items()}
    every = torch.cat([score.flatten() for score in scores.values()])
    budget = int(density * every.numel() + 1e-9)
    free = every.numel() - sum(int(mask.sum()) for mask in held.values())
    if budget > free:
        raise UserError(f"density={density:g}: other memories leave only {free / every.numel():.3g} of the weights")
    mask = torch.zeros_like(every, dtype=torch.bool)
    mask[every.argsort(descending=True, stable=True)[:budget]] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return {name: part.reshape(score.shape) for part, (name, score) in zip(parts, scores.items(), strict=True)}
