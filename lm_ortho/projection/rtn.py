"""Round to nearest, every weight on its own."""

from __future__ import annotations

from torch import Tensor

from lm_ortho.projection.interface import PROJECTIONS
from lm_ortho.projection.lattice import round_to_codes


@PROJECTIONS.register("rtn")
def rtn(weight: Tensor, scales: Tensor, hessian: Tensor, bits: int, group_size: int) -> Tensor:
    """The nearest codes; ``hessian`` is not used."""
    return round_to_codes(weight, scales, bits, group_size)
