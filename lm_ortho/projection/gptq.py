"""GPTQ: rounding errors of a column are made up for by the columns after it (Frantar et al. 2023, 2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_ortho.calibration.activations import damped_inverse
from lm_ortho.projection.base import PROJECTIONS
from lm_ortho.projection.lattice import code_range, spread


@PROJECTIONS.register("gptq")
def gptq(weight: Tensor, scales: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes that nearly minimise ``||(Q - W) X||``; scales stay those of the unchanged weight.

    ``hessian`` is E[x x^T] (in, in) of the layer's inputs; inputs that never fire get a unit diagonal.
    """
    low, high = code_range(bits)
    left = weight.double().clone()
    factor = torch.linalg.cholesky(damped_inverse(hessian), upper=True)
    per_weight = spread(scales, group_size, weight.shape[1]).double()
    codes = torch.empty_like(left)
    for j in range(left.shape[1]):
        codes[:, j] = (left[:, j] / per_weight[:, j]).round().clamp(low, high)
        error = (left[:, j] - codes[:, j] * per_weight[:, j]) / factor[j, j]
        left[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return codes.to(torch.int8)
