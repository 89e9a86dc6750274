"""Projections round the weights to the codes of the base stream."""

from lm_ortho.projection import gptq as _gptq
from lm_ortho.projection import rtn as _rtn
from lm_ortho.projection.interface import PROJECTIONS, Projection

__all__ = ["PROJECTIONS", "Projection"]
del _gptq, _rtn
