"""The registry of projections: which codes the base stream takes off the support."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lm_ortho.registry import Registry


class Projection(Protocol):
    """A function from a weight (out, in), its scales, and E[x x^T] (in, in) to codes (out, in) int8."""

    def __call__(self, weight: Tensor, scales: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor: ...


PROJECTIONS: Registry[Projection] = Registry("projection")
