"""Checks of stored tensors before arithmetic or C++ reads them: dtype, shape, layout, memory, and every index.

Indices come from files, so they are compared and never subtracted: the difference of two int64 numbers can wrap around
to a harmless one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import PACKED_BITS, packed_width

MAX_FEATURES = 2**31 - 1
"""The largest in_features and out_features: columns are int32, and so a position in the matrix fits into int64."""


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """Checks one stored tensor without reading its values.

    Raises:
        ValueError: for another dtype or shape, and for a tensor that is sparse, not contiguous, without data or longer
            than its memory.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        actual = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be {expected} of shape {shape}, not {actual} of shape {tuple(tensor.shape)}")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise ValueError(f"{name} must be a dense, contiguous tensor")
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and has no data")
    if _is_traced(tensor):
        return
    if tensor.untyped_storage().nbytes() < (tensor.storage_offset() + tensor.numel()) * tensor.element_size():
        raise ValueError(f"{name} is longer than its memory")


def check_codes(qweight: Tensor, scales: Tensor, *, bits: int, group_size: int, in_features: int) -> None:
    """Checks packed codes and their scales, without reading values; ``qweight`` has one row per output feature.

    Raises:
        ValueError: for a lattice that does not exist, and as ``check_tensor``.
    """
    if type(bits) is not int or bits not in PACKED_BITS:
        raise ValueError(f"codes of {bits!r} bits do not exist; known widths: {PACKED_BITS}")
    if type(group_size) is not int or group_size < 8 or group_size % 8:
        raise ValueError(f"group_size={group_size!r} must be a positive multiple of 8")
    if not 1 <= in_features <= MAX_FEATURES or qweight.dim() != 2:
        raise ValueError(f"codes of shape {tuple(qweight.shape)} for {in_features} in_features")
    rows = qweight.shape[0]
    check_tensor("qweight", qweight, (torch.uint8,), (rows, packed_width(in_features, bits, group_size)))
    check_tensor("scales", scales, (torch.bfloat16,), (rows, -(-in_features // group_size)))
    if qweight.device != scales.device:
        raise ValueError(f"qweight is on {qweight.device}, scales on {scales.device}")


def check_csr(rowptr: Tensor, cols: Tensor, vals: Tensor, shape: tuple[int, int]) -> None:
    """Checks a sparse matrix in CSR form of ``shape`` (out_features, in_features), all indices included.

    ``rowptr`` int32 or int64 with ``0 = rowptr[0] <= rowptr[1] <= ... <= rowptr[-1] = nnz``; ``cols`` (nnz,) int32 in
    [0, in_features), strictly increasing within a row; ``vals`` (nnz,) BF16.

    Raises:
        ValueError: for anything else, and as ``check_tensor``.
    """
    out_features, in_features = shape
    if not (1 <= out_features <= MAX_FEATURES and 1 <= in_features <= MAX_FEATURES):
        raise ValueError(f"shape {shape} has no weights, or more rows or columns than {MAX_FEATURES}")
    if vals.dim() != 1 or cols.shape != vals.shape:
        raise ValueError(f"{tuple(cols.shape)} cols and {tuple(vals.shape)} vals do not match")
    nnz = vals.numel()
    if rowptr.shape != (out_features + 1,):
        raise ValueError(f"rowptr has shape {tuple(rowptr.shape)} for {out_features} rows")
    check_tensor("rowptr", rowptr, (torch.int32, torch.int64), (out_features + 1,))
    check_tensor("cols", cols, (torch.int32,), (nnz,))
    check_tensor("vals", vals, (torch.bfloat16,), (nnz,))
    if not rowptr.device == cols.device == vals.device:
        raise ValueError(f"rowptr, cols and vals are on {rowptr.device}, {cols.device} and {vals.device}")
    if int(rowptr[0]) != 0 or int(rowptr[-1]) != nnz or bool((rowptr[1:] < rowptr[:-1]).any()):
        raise ValueError(f"rowptr must rise from 0 to the {nnz} stored values")
    if nnz == 0:
        return
    if int(cols.min()) < 0 or int(cols.max()) >= in_features:
        raise ValueError(f"cols lie outside [0, {in_features})")
    increases = cols[1:] > cols[:-1]
    # The first value of a row may have a smaller column than the last one of the row before.
    starts = rowptr[1:-1]
    starts = starts[(starts > 0) & (starts < nnz)].long()
    increases[starts - 1] = True
    if not bool(increases.all()):
        raise ValueError("cols must be strictly increasing within each row")


def _is_traced(tensor: Tensor) -> bool:
    """Whether the tensor only stands for one, as while torch.compile reads the code."""
    return type(tensor) is not Tensor or torch.compiler.is_compiling()
