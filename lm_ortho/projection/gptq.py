"""GPTQ: rounding errors of a column are made up for by the columns after it (Frantar et al. 2023, 2210.17323)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lm_ortho.calibration.activations import damped_inverse
from lm_ortho.projection.interface import PROJECTIONS
from lm_ortho.projection.lattice import expand_scales
from lm_ortho.streams import code_range

BLOCK = 128
"""Columns after which errors are handed on to the rest of the matrix, in one product."""


@PROJECTIONS.register("gptq")
def gptq(weight: Tensor, scales: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes that nearly minimise ``||(Q - W) X||``; scales stay those of the unchanged weight.

    ``hessian`` is E[x x^T] (in, in) of the layer's inputs; inputs that never fire get a unit diagonal.
    """
    return _column_by_column(weight, expand_scales(scales, group_size, weight.shape[1]), hessian, bits)


@PROJECTIONS.register("gptq_ordered")
def gptq_ordered(weight: Tensor, scales: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """GPTQ that begins with the inputs of the largest second moment, whose errors nothing could make up for later.

    A few inputs are hundreds of times larger than the rest in many models (Sun et al. 2024, arXiv 2402.17762). Groups
    and scales stay where they are, so the stored form is the same. It is what the code of GPTQ calls ``act-order``.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    per_weight = expand_scales(scales, group_size, weight.shape[1])[:, order]
    codes = _column_by_column(weight[:, order], per_weight, hessian[order][:, order], bits)
    return torch.empty_like(codes).index_copy_(1, order, codes)


def _column_by_column(weight: Tensor, per_weight: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """Codes (out, in) int8 of the columns in the given order; ``per_weight`` is the scale of each weight."""
    low, high = code_range(bits)
    steps = per_weight.double()

    def nearest(j: int, column: Tensor) -> Tensor:
        return (column / steps[:, j]).round().clamp(low, high) * steps[:, j]

    return (compensated(weight, hessian, nearest) / steps).round().to(torch.int8)


def compensated(weight: Tensor, hessian: Tensor, settle: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``weight`` (out, in) in float64 with column after column settled, its error made up for by those after it.

    ``settle`` is given the number of a column and what it has become, and says what it shall be. ``hessian`` is
    E[x x^T] (in, in), damped here.
    """
    left = weight.double()
    factor = torch.linalg.cholesky(damped_inverse(hessian), upper=True)
    settled = torch.empty_like(left)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block, errors = left[:, start:end].clone(), torch.empty_like(left[:, start:end])
        for j in range(end - start):
            settled[:, start + j] = settle(start + j, block[:, j])
            errors[:, j] = (block[:, j] - settled[:, start + j]) / factor[start + j, start + j]
            block[:, j + 1 :] -= errors[:, j, None] * factor[start + j, start + j + 1 : end]
        left[:, end:] -= errors @ factor[start:end, end:]
    return settled
