"""The registry of projections: functions that round weights to the codes of the base stream."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lm_ortho.registry import Registry


class Projection(Protocol):
    """Rounds a weight (out_features, in_features) to codes of the same shape, int8.

    ``scales`` are (out_features, groups), ``hessian`` is E[x x^T] (in_features, in_features). ``exact`` is a boolean
    mask (out_features, in_features) of the support, or None: the model has the exact weights there at alpha=1, so a
    projection that compensates errors should count none of them. The edit may change the codes on it.
    """

    def __call__(
        self,
        weight: Tensor,
        scales: Tensor,
        hessian: Tensor,
        *,
        bits: int,
        group_size: int,
        exact: Tensor | None = None,
    ) -> Tensor: ...


PROJECTIONS: Registry[Projection] = Registry("projection", "lm_ortho.projections")
