"""Dual-stream linear layers: tensors in, tensors out, each fast path beside its plain-PyTorch twin.

``calls()`` says which path really ran, so that no figure is ever measured on the wrong one.
"""

from .counter import calls, record, reset_calls
from .dispatch import AUTO, KERNELS, Ask, Choice, Implementation, StoredBase, StoredOrtho, choose, register
from .gpu import Triton
from .implementations import Cpu, Reference
from .packing import pack_codes, packed_width, unpack_codes
from .reference import SparseOperand, base_operand, dual_stream_linear, prepared_linear, several_linear, sparse_operand

__all__ = [
    "AUTO",
    "KERNELS",
    "Ask",
    "Choice",
    "Cpu",
    "Implementation",
    "Reference",
    "SparseOperand",
    "StoredBase",
    "StoredOrtho",
    "Triton",
    "base_operand",
    "calls",
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
