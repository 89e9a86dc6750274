"""The streams of a layer in the layouts of the C++ kernel (``dual_stream.h``), made once per layer."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..checks import check_codes, check_tensor
from ..packing import unpack_codes
from .library import raise_for_status, require_library
from .pages import reserve

PANEL = 64
_SCALE_BYTES = 2
_CHUNK_BYTES = PANEL * 4
_CHUNK = 8
_ROWS_AT_ONCE = 16 * PANEL
"""Rows unpacked at a time, so that making an operand needs little additional memory."""


def count_planes(bits: int) -> int:
    """Planes of 4 bits per code: codes of 3 bits take one too, codes of 8 bits two."""
    return 2 if bits == 8 else 1


def panel_bytes(n_groups: int, bits: int, group_size: int) -> int:
    """Bytes of a panel of 64 output rows: 4 or 8 bits a weight and a BF16 scale a group, padding included."""
    return n_groups * (_SCALE_BYTES * PANEL + count_planes(bits) * (group_size // _CHUNK) * _CHUNK_BYTES)


def pack_base(qweight: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """The base stream as panels: flat uint8, 64-byte aligned.

    ``qweight`` and ``scales`` as stored, on the CPU. It has as many bytes as the stored tensors at 4 and 8 bits, a
    third more at 3, plus the padding of the last panel. The arguments of the C functions here are positional, in the
    order of their C signatures, because ctypes has no keywords.
    """
    functions = require_library().functions
    if scales.dim() != 2:
        raise ValueError(f"scales of shape {tuple(scales.shape)} are no matrix")
    out_features, n_groups = scales.shape
    check_codes(qweight, scales, bits=bits, group_size=group_size, in_features=n_groups * group_size)
    _check_on_cpu(qweight)
    per_panel = panel_bytes(n_groups, bits, group_size)
    panels = reserve(-(-out_features // PANEL) * per_panel)
    for first in range(0, out_features, _ROWS_AT_ONCE):
        codes = unpack_codes(qweight[first : first + _ROWS_AT_ONCE], bits).contiguous()
        row_scales = scales[first : first + _ROWS_AT_ONCE].contiguous()
        start = first // PANEL * per_panel
        status = functions.lm_ortho_pack_base(
            codes.data_ptr(),
            codes.numel(),
            row_scales.data_ptr(),
            row_scales.numel(),
            codes.shape[0],
            codes.shape[1],
            group_size,
            count_planes(bits),
            panels.data_ptr() + start,
            panels.numel() - start,
        )
        raise_for_status(status)
    return panels


def pack_sheets(rowptr: Tensor, cols: Tensor, vals: Tensor, in_features: int) -> Tensor:
    """An ortho stream as sheets: flat uint8, 64-byte aligned; 3.3 to 6 bytes per value on even supports.

    ``rowptr`` (out_features + 1,) int32 or int64, ``cols`` int32 and ``vals`` BF16 as stored, on the CPU.

    Raises:
        ValueError: for tensors of another form, and indices outside (out_features, in_features).
    """
    functions = require_library().functions
    rows, nnz = rowptr.numel() - 1, vals.numel()
    check_tensor("rowptr", rowptr, (torch.int32, torch.int64), (rows + 1,))
    check_tensor("cols", cols, (torch.int32,), (nnz,))
    check_tensor("vals", vals, (torch.bfloat16,), (nnz,))
    _check_on_cpu(rowptr, cols, vals)
    handle, size = ctypes.c_void_p(), ctypes.c_int64()
    status = functions.lm_ortho_make_sheets(
        rowptr.data_ptr(),
        int(rowptr.dtype == torch.int64),
        cols.data_ptr(),
        vals.data_ptr(),
        rows,
        nnz,
        in_features,
        ctypes.byref(handle),
        ctypes.byref(size),
    )
    raise_for_status(status)
    sheets = reserve(size.value)
    raise_for_status(functions.lm_ortho_take_sheets(handle, sheets.data_ptr(), sheets.numel()))
    return sheets


def check_sheets(sheets: Tensor, out_features: int, in_features: int) -> None:
    """Raises ``ValueError`` unless ``sheets`` is an intact result of ``pack_sheets`` for a matrix of this shape."""
    check_tensor("sheets", sheets, (torch.uint8,), (sheets.numel(),))
    _check_on_cpu(sheets)
    functions = require_library().functions
    raise_for_status(functions.lm_ortho_check_sheets(sheets.data_ptr(), sheets.numel(), out_features, in_features))


def _check_on_cpu(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"the CPU kernel reads tensors of the CPU, not of {tensor.device}")
