"""Dual-stream linear layers on tensors: the reference kernel in plain PyTorch, and faster kernels for CPU and GPU.

``calls()`` counts which path ran, so that a measurement can prove that it timed the intended one.
"""

from .checks import MAX_FEATURES, check_codes, check_csr, check_tensor
from .counter import calls, record, reset_calls
from .dispatch import (
    AUTO,
    KERNELS,
    REFERENCE,
    Choice,
    Implementation,
    ProductSpec,
    StoredBase,
    StoredOrtho,
    choose,
    register,
)
from .gpu import Triton
from .implementations import Cpu, Reference
from .packing import pack_codes, packed_width, unpack_codes
from .reference import SparseOperand, base_operand, dual_stream_linear, prepared_linear, several_linear, sparse_operand

__all__ = [
    "AUTO",
    "KERNELS",
    "MAX_FEATURES",
    "REFERENCE",
    "Choice",
    "Cpu",
    "Implementation",
    "ProductSpec",
    "Reference",
    "SparseOperand",
    "StoredBase",
    "StoredOrtho",
    "Triton",
    "base_operand",
    "calls",
    "check_codes",
    "check_csr",
    "check_tensor",
    "choose",
    "dual_stream_linear",
    "pack_codes",
    "packed_width",
    "prepared_linear",
    "record",
    "register",
    "reset_calls",
    "several_linear",
    "sparse_operand",
    "unpack_codes",
]

for _implementation in (Reference(), Cpu(), Triton()):
    register(_implementation)
