"""The dual-stream product on a GPU: the layers that it supports, and its two paths.

y = x W_base^T + bias + sum over memories of alpha * (x W_ortho^T)
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..packing import PACKED_BITS
from .layout import Prepared, plane_width

Path = Literal["fused", "dense"]
_DTYPES = (torch.bfloat16, torch.float16)
_MIN_CAPABILITY = (8, 0)
_MAX_WORDS = 1 << 31


@lru_cache
def _is_triton_missing() -> bool:
    return importlib.util.find_spec("triton") is None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def refuses(
    device: torch.device | str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    *,
    bits: int = 4,
    group_size: int = 64,
    nnz: int = 0,
    grad: bool = False,
) -> str | None:
    """The reason why a layer of ``shape`` (out_features, in_features) cannot run here with x in ``dtype``, or None.

    ``nnz`` counts the values of all ortho streams; ``grad`` means that a backward pass will follow. Cheap enough to
    be called for every product; nothing is imported.
    """
    device = torch.device(device)
    if _is_triton_missing():
        return "triton is not installed"
    if device.type != "cuda" and not _is_interpreted():
        return f"the kernels run on CUDA devices, not on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return "the device has no BF16 tensor cores (compute capability below 8.0)"
    if dtype not in _DTYPES:
        return f"activations are {dtype}; the kernels take bfloat16 and float16"
    if bits not in PACKED_BITS:
        return f"a base of {bits} bits has no codes"
    if group_size < 8 or group_size % 8:
        return f"group_size {group_size} is no multiple of 8"
    padded = shape[0] * (shape[1] + 4 * 64)
    if padded * bits // 8 >= _MAX_WORDS or nnz >= _MAX_WORDS:
        return f"{shape[0]} x {shape[1]} weights and {nnz} sparse values need positions of more than 31 bits"
    if grad:
        return "the kernels have no backward pass"
    return None


def fuses(bits: int, group_size: int, in_features: int) -> str | None:
    """The reason why few rows of such a layer take the dense path, too (correct, but slower than BF16), or None."""
    if bits != 4:
        return f"the fused kernel reads 4 bits, not {bits}"
    if plane_width(bits, group_size, in_features) == 0:
        return f"group_size {group_size} is no multiple of 16"
    return None


def linear(
    x: Tensor,
    prepared: Prepared,
    alphas: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    path: Path | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(..., out_features)`` in the dtype of ``x`` (..., in_features), BF16 or FP16.

    ``alphas``: float32 on the device of ``x``; (memories,), or (memories, n) with n the first dimension of ``x`` for
    an alpha per row. None leaves the ortho streams out. Nothing waits for the device, so that alpha may change
    between replays of a CUDA graph. ``path`` forces ``fused`` or ``dense``; otherwise the rows of ``x`` decide.

    Fused: a row has the same bits in every batch and beside every other alpha, at alpha=0 those of the base alone.
    Dense: one alpha for all rows is merged into the weight, which rounds it into the dtype of ``x``; alphas per row
    add the sparse products to the base product, and a row then has the bits that it has when all rows of this batch
    are at its alpha. ``out_dtype=torch.float32`` keeps sums, and the merged weight, in float32.
    Raises ``ValueError`` if shapes do not fit.
    """
    from . import ops

    if x.shape[-1] != prepared.in_features:
        raise ValueError(f"x of shape {tuple(x.shape)} for {prepared.in_features} in_features")
    flat = x.reshape(-1, prepared.in_features)
    rows = _per_row(alphas, x, prepared.memories)
    dtype = out_dtype or x.dtype
    if path is None:
        path = "fused" if flat.shape[0] <= prepared.fused_rows else "dense"
    if path == "fused":
        if prepared.plane == 0:
            raise ValueError(fuses(prepared.bits, prepared.group_size, prepared.in_features))
        ortho, pointers = (None, None) if rows is None else (prepared.ortho, prepared.rowptr)
        y = ops.fused(
            flat,
            prepared.codes,
            prepared.scales,
            ortho=ortho,
            rowptr=pointers,
            alphas=rows,
            bias=bias,
            out_dtype=dtype,
        )
    else:
        y = _dense(flat, prepared, rows, bias, dtype)
    return y.view(*x.shape[:-1], prepared.out_features)


def _per_row(alphas: Tensor | None, x: Tensor, memories: int) -> Tensor | None:
    """``alphas``, where one per entry of the first dimension of x is repeated to one per row of the flattened x."""
    if alphas is None or memories == 0:
        return None
    if alphas.shape == (memories,):
        return alphas
    if alphas.shape != (memories, x.shape[0]):
        raise ValueError(f"alphas of shape {tuple(alphas.shape)} for {memories} memories and x {tuple(x.shape)}")
    repeats = x.numel() // max(1, x.shape[-1] * x.shape[0])
    return alphas if repeats == 1 else alphas.repeat_interleave(repeats, dim=1)


def _dense(x: Tensor, prepared: Prepared, alphas: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Dequantises (and merges) the weight, then calls the matrix product of the vendor's library."""
    from . import ops

    merge_alphas = alphas if alphas is not None and alphas.dim() == 1 else None
    ortho, pointers = (None, None) if merge_alphas is None else (prepared.ortho, prepared.rowptr)
    shape = {"out_features": prepared.out_features, "in_features": prepared.in_features}
    weight = ops.weight(
        prepared.codes,
        prepared.scales,
        ortho=ortho,
        rowptr=pointers,
        alphas=merge_alphas,
        **shape,
        bits=prepared.bits,
        group_size=prepared.group_size,
        plane=prepared.plane,
        dtype=dtype,
    )
    x = x.to(dtype)
    y = functional.linear(x, weight, None if bias is None else bias.to(dtype))
    if alphas is None or alphas.dim() == 1 or prepared.ortho is None or prepared.rowptr is None:
        return y
    for memory in range(prepared.memories):
        sparse = ops.ortho_dense(prepared.ortho, prepared.rowptr, memory, **shape, dtype=dtype)
        alpha = alphas[memory].unsqueeze(1)
        y_with_memory = torch.addcmul(y.float(), functional.linear(x, sparse).float(), alpha).to(dtype)
        y = torch.where(alpha != 0, y_with_memory, y)
    return y
