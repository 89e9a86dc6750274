"""The C++ kernel for CPUs: AVX-512 BF16, AVX2 or plain, compiled with the wheel or at first use.

``dual_stream.h`` describes the memory layout of the streams; the reference kernel is ``kernels/reference.py``.
"""

from .library import ISAS, SWITCH, Library, MissingLibrary, find, forget, product_speed, read_speed, require_library
from .op import cpu_linear, path_name
from .operands import check_sheets, pack_base, pack_sheets

__all__ = [
    "ISAS",
    "SWITCH",
    "Library",
    "MissingLibrary",
    "check_sheets",
    "cpu_linear",
    "find",
    "forget",
    "pack_base",
    "pack_sheets",
    "path_name",
    "product_speed",
    "read_speed",
    "require_library",
]
