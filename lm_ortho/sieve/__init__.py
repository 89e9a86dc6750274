"""Sieves score the weights; the support is selected from the scores."""

from lm_ortho.sieve import attribution as _attribution
from lm_ortho.sieve import curvature as _curvature
from lm_ortho.sieve import simple as _simple
from lm_ortho.sieve.interface import SIEVES, Sieve, SieveInput
from lm_ortho.sieve.select import select_support

__all__ = ["SIEVES", "Sieve", "SieveInput", "select_support"]
del _attribution, _curvature, _simple
