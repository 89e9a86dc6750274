"""The C++ kernel for CPUs: AVX-512 BF16, AVX2 or plain, compiled with the wheel or at first use.

``dual_stream.h`` says how the streams lie in memory; the plain-PyTorch twin is ``kernels/reference.py``.
"""

from .library import ISAS, SWITCH, Absent, Library, find, forget, product_speed, read_speed
from .op import cpu_linear, path_of
from .operands import pack_base, pack_sheets

__all__ = [
    "ISAS",
    "SWITCH",
    "Absent",
    "Library",
    "cpu_linear",
    "find",
    "forget",
    "pack_base",
    "pack_sheets",
    "path_of",
    "product_speed",
    "read_speed",
]
