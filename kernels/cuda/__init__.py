"""The dual-stream product on a GPU, in Triton; its plain-PyTorch twin is ``kernels.reference``.

Importing this package imports no Triton; the first product does.
"""

from .layout import Csr, Prepared, plane_width, prepare
from .product import fuses, linear, refuses

__all__ = ["Csr", "Prepared", "fuses", "linear", "plane_width", "prepare", "refuses"]
