"""From scores to the support: one budget over the whole model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lm_ortho.errors import UserError

_HALF = 1 << 16


def select_support(
    scores: Mapping[str, Tensor], density: float, taken: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Boolean support per layer: exactly ``floor(density * weights)`` positions in all, never more.

    Positions that are ``taken`` (out, in; bool) are left out. The highest scores win, wherever they are: one matrix may
    take most of the budget. Ties are broken by position, earlier layers first. Beside the scores no more memory is
    needed than for a few copies of one layer.

    Raises:
        ValueError: when a score is NaN.
        UserError: when more is asked for than is not taken.
    """
    for name, score in scores.items():
        if score.isnan().any():
            raise ValueError(f"the sieve gave NaN scores for {name}")
    held = taken or {}
    total = sum(score.numel() for score in scores.values())
    budget = int(density * total + 1e-9)
    free = total - sum(int(mask.sum()) for mask in held.values())
    if budget > free:
        raise UserError(f"density={density:g}: other memories leave only {free / total:.3g} of the weights")
    last, left = _last_key(scores, held, budget)
    result = {}
    for name, score in scores.items():
        keys = _keys(score, held.get(name))
        chosen = keys > last
        ties = (keys == last).nonzero()[:left, 0]
        chosen[ties] = True
        left -= len(ties)
        result[name] = chosen.reshape(score.shape)
    return result


def _keys(score: Tensor, taken: Tensor | None) -> Tensor:
    """Flat int32 numbers in the order of the scores; both zeros are one, and what is taken comes last."""
    score = score.detach().float() + 0.0
    if taken is not None:
        score = score.masked_fill(taken.to(score.device), -torch.inf)
    bits = score.flatten().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _last_key(scores: Mapping[str, Tensor], held: Mapping[str, Tensor], budget: int) -> tuple[int, int]:
    """The key of the last score that is within the budget, and how many of those with that key are."""
    if budget == 0:
        return 2**31 - 1, 0
    upper = sum(
        torch.bincount((_keys(s, held.get(name)) >> 16) + _HALF // 2, minlength=_HALF) for name, s in scores.items()
    )
    bucket, left = _from_above(torch.as_tensor(upper), budget)
    lower = torch.zeros(_HALF, dtype=torch.int64)
    for name, score in scores.items():
        keys = _keys(score, held.get(name))
        inside = keys[(keys >> 16) + _HALF // 2 == bucket] & (_HALF - 1)
        lower += torch.bincount(inside, minlength=_HALF).cpu()
    place, left = _from_above(lower, left)
    return ((bucket - _HALF // 2) << 16) + place, left


def _from_above(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The index at which the counts, added up from the last one, reach ``wanted``, and how many are wanted of it."""
    above = counts.flip(0).cumsum(0)
    at = int((above < wanted).sum())
    before = int(above[at - 1]) if at else 0
    return len(counts) - 1 - at, wanted - before
