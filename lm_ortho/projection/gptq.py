"""GPTQ: rounding errors of a column are made up for by the columns after it (Frantar et al. 2023, 2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_ortho.calibration.activations import damped_inverse
from lm_ortho.projection.base import PROJECTIONS
from lm_ortho.projection.lattice import code_range, spread

BLOCK = 128
"""Columns after which errors are handed on to the rest of the matrix, in one product."""


@PROJECTIONS.register("gptq")
def gptq(weight: Tensor, scales: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes that nearly minimise ``||(Q - W) X||``; scales stay those of the unchanged weight.

    ``hessian`` is E[x x^T] (in, in) of the layer's inputs; inputs that never fire get a unit diagonal.
    """
    return _column_by_column(weight, spread(scales, group_size, weight.shape[1]), hessian, bits)


@PROJECTIONS.register("gptq_ordered")
def gptq_ordered(weight: Tensor, scales: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """GPTQ that begins with the inputs of the largest second moment, whose errors nothing could make up for later.

    A few inputs are hundreds of times larger than the rest in many models (Sun et al. 2024, arXiv 2402.17762). Groups
    and scales stay where they are, so the stored form is the same. It is what the code of GPTQ calls ``act-order``.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    per_weight = spread(scales, group_size, weight.shape[1])[:, order]
    codes = _column_by_column(weight[:, order], per_weight, hessian[order][:, order], bits)
    return torch.empty_like(codes).index_copy_(1, order, codes)


def _column_by_column(weight: Tensor, per_weight: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """Codes (out, in) int8 of the columns in the given order; ``per_weight`` is the scale of each weight."""
    low, high = code_range(bits)
    left, steps = weight.double(), per_weight.double()
    factor = torch.linalg.cholesky(damped_inverse(hessian), upper=True)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block, errors = left[:, start:end].clone(), torch.empty_like(left[:, start:end])
        for j in range(end - start):
            step = steps[:, start + j]
            code = (block[:, j] / step).round().clamp(low, high)
            errors[:, j] = (block[:, j] - code * step) / factor[start + j, start + j]
            block[:, j + 1 :] -= errors[:, j, None] * factor[start + j, start + j + 1 : end]
            codes[:, start + j] = code.to(torch.int8)
        left[:, end:] -= errors @ factor[start:end, end:]
    return codes
