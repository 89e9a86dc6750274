"""GPTQ: rounding errors of a column are made up for by the columns after it (Frantar et al. 2023, 2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_ortho.projection.base import PROJECTIONS
from lm_ortho.projection.lattice import code_range, spread

DAMPING = 0.01
"""Share of the mean diagonal that is added to it, as in the paper's code."""


@PROJECTIONS.register("gptq")
def gptq(weight: Tensor, scales: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes that nearly minimise ``||(Q - W) X||``; scales stay those of the unchanged weight.

    ``hessian`` is E[x x^T] (in, in) of the layer's inputs; inputs that never fire get a unit diagonal.
    """
    low, high = code_range(bits)
    left = weight.double().clone()
    h = hessian.double().clone()
    diagonal = h.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky(inverse, upper=True)
    per_weight = spread(scales, group_size, weight.shape[1]).double()
    codes = torch.empty_like(left)
    for j in range(left.shape[1]):
        codes[:, j] = (left[:, j] / per_weight[:, j]).round().clamp(low, high)
        error = (left[:, j] - codes[:, j] * per_weight[:, j]) / factor[j, j]
        left[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return codes.to(torch.int8)
