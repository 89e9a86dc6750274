"""The Triton kernels as torch operators, so that torch.compile keeps them whole and a CUDA graph can hold them.

No operator waits for the device: alpha stays there, and whether the ortho stream is read is decided in the kernel.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..counter import record
from . import tuning
from .fused import _add_parts, _fused, _turn
from .layout import COLUMN_BLOCK, PLANES
from .merge import _merge

_FUSION: dict[str, Any] = {"enable_fp_fusion": False}
"""Which products are added without rounding in between is written in the kernels; the compiler may not choose."""
_MERGE_ROWS, _MERGE_SLOTS, _MERGE_TILE = 16, 32, 256


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    return not isinstance(_fused, triton.JITFunction)


@lru_cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; a few are kept for what the compiler adds."""
    if device.type != "cuda":
        return 1 << 20
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024)) - 4096


@torch.library.custom_op("lm_ortho::triton_fused", mutates_args=())
def fused(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    ortho: Tensor | None,
    rowptr: Tensor | None,
    alphas: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``(rows, out_features)`` in ``out_dtype`` from ``x`` (rows, in_features) and words of planes (layout.py).

    ``alphas``: float32, (memories,), or (memories, rows) for an alpha per row.
    """
    name, spans = tuning.device_name(x.device), scales.shape[0]
    order = tuning.order(name, scales.shape[1], spans)
    launch = tuning.launch(name, scales.shape[1], spans, x.shape[0])
    launch = tuning.fitted(order, launch, 2 * codes.shape[2], shared_limit(x.device))
    record("triton.fused")
    return run_fused(x, codes, scales, ortho, rowptr, alphas, bias, out_dtype, order, launch)


@fused.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    ortho: Tensor | None,
    rowptr: Tensor | None,
    alphas: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], scales.shape[1], dtype=out_dtype)


def run_fused(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    ortho: Tensor | None,
    rowptr: Tensor | None,
    alphas: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    order: tuning.Order,
    launch: tuning.Launch,
) -> Tensor:
    """``fused`` with given settings, for tuning."""
    x = x.contiguous()
    rows, in_features = x.shape
    spans, out_features = scales.shape
    out = x.new_empty(rows, out_features, dtype=out_dtype)
    if rows == 0:
        return out
    slices, split, slots = order
    bm, bn, stages = launch
    to = x.new_empty(split, rows, out_features, dtype=torch.float32) if split > 1 else out
    turned = x
    memories = 0
    if rowptr is not None and ortho is not None and alphas is not None and ortho.numel():
        memories = rowptr.shape[0]
        turned = _turned(x, bm)
    grid = (triton.cdiv(rows, bm), triton.cdiv(out_features, bn), split)
    _fused[grid](
        x, codes, scales, ortho, rowptr, alphas, *_alpha_strides(alphas), turned, bias, to,
        rows, out_features, in_features, spans,
        MEMORIES=memories, BLOCKS=_blocks(in_features), SPLIT=split, SLICES=slices, SLOTS=slots,
        PLANE=2 * codes.shape[2], BN=bn, BM=bm,
        HAS_BIAS=bias is not None, HALF=x.dtype == torch.float16, UPCAST=interpreted(),
        num_warps=slices, num_stages=stages, **_FUSION,
    )  # fmt: skip
    if split > 1:
        _add_parts[(triton.cdiv(out_features, 256), rows)](
            to, bias, out, rows, out_features, SPLIT=split, HAS_BIAS=bias is not None, BN=256, num_warps=4, **_FUSION
        )
    return out


def _turned(x: Tensor, bm: int) -> Tensor:
    """x as (blocks of ``bm`` rows, in_features, bm), zeros beyond its last row; one row is its own transpose."""
    if bm == 1:
        return x
    rows, in_features = x.shape
    blocks = triton.cdiv(rows, bm)
    turned = x.new_empty(blocks, in_features, bm)
    _turn[(blocks, triton.cdiv(in_features, 64))](x, turned, rows, in_features, BK=64, BM=bm, num_warps=4)
    return turned


def _alpha_strides(alphas: Tensor | None) -> tuple[int, int]:
    if alphas is None:
        return 0, 0
    return alphas.stride(0), alphas.stride(1) if alphas.dim() == 2 else 0


def _blocks(in_features: int) -> int:
    return triton.cdiv(in_features, COLUMN_BLOCK)


@torch.library.custom_op("lm_ortho::triton_weight", mutates_args=())
def weight(
    codes: Tensor,
    scales: Tensor,
    ortho: Tensor | None,
    rowptr: Tensor | None,
    alphas: Tensor | None,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    plane: int,
    dtype: torch.dtype,
) -> Tensor:
    """``(out_features, in_features)``: W(alpha), each entry rounded once into ``dtype``; W_base without ``alphas``."""
    return _written(
        codes, scales, ortho, rowptr, alphas, (out_features, in_features), (bits, group_size, plane), dtype, None
    )


@weight.register_fake
def _(
    codes: Tensor,
    scales: Tensor,
    ortho: Tensor | None,
    rowptr: Tensor | None,
    alphas: Tensor | None,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    plane: int,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(out_features, in_features, dtype=dtype)


@torch.library.custom_op("lm_ortho::triton_ortho", mutates_args=())
def ortho_dense(
    ortho: Tensor, rowptr: Tensor, memory: int, out_features: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """``(out_features, in_features)``: W_ortho of one memory, dense."""
    one = ortho.new_ones(1, dtype=torch.float32)
    return _written(ortho, ortho, ortho, rowptr, one, (out_features, in_features), (4, 64, 0), dtype, memory)


@ortho_dense.register_fake
def _(ortho: Tensor, rowptr: Tensor, memory: int, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return ortho.new_empty(out_features, in_features, dtype=dtype)


def _written(
    codes: Tensor,
    scales: Tensor,
    ortho: Tensor | None,
    rowptr: Tensor | None,
    alphas: Tensor | None,
    shape: tuple[int, int],
    form: tuple[int, int, int],
    dtype: torch.dtype,
    memory: int | None,
) -> Tensor:
    """One run of the merge kernel; with ``memory`` of that ortho stream alone."""
    bits, group_size, plane = form
    out_features, in_features = shape
    written = codes.new_empty(shape, dtype=dtype)
    memories = 0
    if ortho is not None and rowptr is not None and alphas is not None and ortho.numel():
        memories = rowptr.shape[0] if memory is None else 1
    width, groups = (codes.shape[1], scales.shape[1]) if memory is None and not plane else (1, 1)
    _merge[(triton.cdiv(out_features, _MERGE_ROWS),)](
        codes, scales, ortho, rowptr, alphas, _alpha_strides(alphas)[0], written,
        out_features, in_features, width, groups, memory or 0,
        MEMORIES=memories, BLOCKS=_blocks(in_features), SLOTS=_MERGE_SLOTS, BASE=memory is None,
        PLANE=plane, BITS=bits, GROUP=group_size, TILE=PLANES * plane or _MERGE_TILE, ROWS=_MERGE_ROWS,
        num_warps=4, **_FUSION,
    )  # fmt: skip
    record("triton.weight")
    return written
