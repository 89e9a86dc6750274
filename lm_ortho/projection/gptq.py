"""GPTQ: later columns compensate for the rounding errors of earlier ones (Frantar et al. 2023, arXiv 2210.17323)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lm_ortho.calibration.activations import damped_inverse
from lm_ortho.projection.interface import PROJECTIONS
from lm_ortho.projection.lattice import expand_scales
from lm_ortho.streams import code_range

BLOCK = 128
"""Number of columns after which their errors are passed on to the rest of the matrix, in one product."""


@PROJECTIONS.register("gptq")
def gptq(
    weight: Tensor, scales: Tensor, hessian: Tensor, *, bits: int, group_size: int, exact: Tensor | None = None
) -> Tensor:
    """Codes that nearly minimise ``||(Q - W) X||``; the scales stay those of the unchanged weight.

    ``hessian`` is E[x x^T] (in_features, in_features) of the layer's inputs; inputs that never fire get a unit
    diagonal. The weights of ``exact`` stay what they are: they make no error, and do not make up for those of others.
    """
    order = torch.arange(weight.shape[1], device=weight.device)
    return _round_columns(weight, scales, hessian, order=order, bits=bits, group_size=group_size, exact=exact)


@PROJECTIONS.register("gptq_ordered")
def gptq_ordered(
    weight: Tensor, scales: Tensor, hessian: Tensor, *, bits: int, group_size: int, exact: Tensor | None = None
) -> Tensor:
    """GPTQ that begins with the inputs of the largest second moment, whose errors no later column could compensate.

    A few inputs are hundreds of times larger than the rest in many models (Sun et al. 2024, arXiv 2402.17762). Groups
    and scales stay where they are, so the stored form is the same. The code of GPTQ calls this order ``act-order``.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    return _round_columns(weight, scales, hessian, order=order, bits=bits, group_size=group_size, exact=exact)


def _round_columns(
    weight: Tensor,
    scales: Tensor,
    hessian: Tensor,
    *,
    order: Tensor,
    bits: int,
    group_size: int,
    exact: Tensor | None,
) -> Tensor:
    """Codes (out_features, in_features) int8; columns are rounded in this ``order`` (in_features,)."""
    # 1. Weights, the scale of each of them, and the mask, in the order of the columns.
    low, high = code_range(bits)
    weights = weight.double()[:, order]
    steps = expand_scales(scales, group_size, weight.shape[1]).double()[:, order]
    mask = None if exact is None else exact[:, order]

    def project_column(j: int, column: Tensor) -> Tensor:
        rounded = (column / steps[:, j]).round().clamp(low, high) * steps[:, j]
        return rounded if mask is None else torch.where(mask[:, j], weights[:, j], rounded)

    # 2. The values that take part in the products: those of the codes, and on the mask the weights.
    values = compensate_errors(weights, hessian[order][:, order], project_column)
    # 3. The codes of all; on the mask they are those nearest to the weights.
    codes = (values / steps).round().clamp(low, high).to(torch.int8)
    return torch.empty_like(codes).index_copy_(1, order, codes)


def compensate_errors(weight: Tensor, hessian: Tensor, project_column: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``weight`` (out_features, in_features) with every column projected and later columns compensating, in float64.

    ``project_column`` is called with the number of a column and its current values (out_features,) and returns its
    final values. ``hessian`` is E[x x^T] (in_features, in_features), damped here.
    """
    # 1. Factorise the inverse: U is the upper Cholesky factor of (H + damping)^-1.
    factor = torch.linalg.cholesky(damped_inverse(hessian), upper=True)
    remaining = weight.double()
    result = torch.empty_like(remaining)
    # 2. Go through the columns from left to right, in blocks.
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block, errors = remaining[:, start:end].clone(), torch.empty_like(remaining[:, start:end])
        for j in range(end - start):
            # 3. Project the column and divide its error by U_jj.
            result[:, start + j] = project_column(start + j, block[:, j])
            errors[:, j] = (block[:, j] - result[:, start + j]) / factor[start + j, start + j]
            # 4. Subtract the error times U_jk from the later columns of the block.
            block[:, j + 1 :] -= errors[:, j, None] * factor[start + j, start + j + 1 : end]
        # 5. Pass the errors of the block on to all columns after it, in one product.
        remaining[:, end:] -= errors @ factor[start:end, end:]
    return result
