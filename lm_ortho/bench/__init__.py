"""How fast the kernels are, beside what one would use without them, in one run on one machine."""

from lm_ortho.bench.layers import Plan, quick_plan, run

__all__ = ["Plan", "quick_plan", "run"]
