"""Benchmark of the kernels beside the alternatives without them, in one run on one machine."""

from lm_ortho.bench.layers import Plan, make_quick_plan, run

__all__ = ["Plan", "make_quick_plan", "run"]
