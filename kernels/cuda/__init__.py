"""The dual-stream product on a GPU, in Triton; the reference kernel is ``kernels.reference``.

This package imports Triton at the first product only.
"""

from .layout import Csr, Prepared, plane_width, prepare
from .product import fuses, linear, refuses

__all__ = ["Csr", "Prepared", "fuses", "linear", "plane_width", "prepare", "refuses"]
