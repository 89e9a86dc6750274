"""Round to nearest, every weight on its own."""

from __future__ import annotations

from torch import Tensor

from lm_ortho.projection.interface import PROJECTIONS
from lm_ortho.projection.lattice import round_to_codes


@PROJECTIONS.register("rtn")
def rtn(
    weight: Tensor, scales: Tensor, hessian: Tensor, *, bits: int, group_size: int, exact: Tensor | None = None
) -> Tensor:
    """The nearest codes; ``hessian`` and ``exact`` are not used."""
    return round_to_codes(weight, scales, bits, group_size)
