"""The Triton kernels as torch operators, which torch.compile treats as one operation and CUDA graphs can record.

No operator waits for the device: alpha stays there, and the kernel decides whether to read the ortho stream. The
arguments of a Triton launch that are not constants are positional, in the order of the kernel's signature.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..counter import record
from . import tuning
from .fused import _add_parts, _fused, _transpose
from .layout import COLUMN_BLOCK, PLANES
from .merge import _merge

_FUSION: dict[str, Any] = {"enable_fp_fusion": False}
"""The kernels state which products are added without rounding in between; the compiler may not fuse others."""
_MERGE_ROWS, _MERGE_SLOTS, _MERGE_TILE = 16, 32, 256


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    return not isinstance(_fused, triton.JITFunction)


@lru_cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; some are reserved for the compiler."""
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
    launch = tuning.fit_shared_memory(order, launch, 2 * codes.shape[2], shared_limit(x.device))
    record("triton.fused")
    return run_fused(
        x,
        codes,
        scales,
        ortho=ortho,
        rowptr=rowptr,
        alphas=alphas,
        bias=bias,
        out_dtype=out_dtype,
        order=order,
        launch=launch,
    )


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
    *,
    ortho: Tensor | None,
    rowptr: Tensor | None,
    alphas: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    order: tuning.Order,
    launch: tuning.Launch,
) -> Tensor:
    """``fused`` with explicit launch settings, for tuning."""
    x = x.contiguous()
    rows, in_features = x.shape
    spans, out_features = scales.shape
    out = x.new_empty(rows, out_features, dtype=out_dtype)
    if rows == 0:
        return out
    slices, split, slots = order
    bm, bn, stages = launch
    to = x.new_empty(split, rows, out_features, dtype=torch.float32) if split > 1 else out
    x_transposed = x
    memories = 0
    if rowptr is not None and ortho is not None and alphas is not None and ortho.numel():
        memories = rowptr.shape[0]
        x_transposed = _transpose_blocks(x, bm)
    grid = (triton.cdiv(rows, bm), triton.cdiv(out_features, bn), split)
    _fused[grid](
        x, codes, scales, ortho, rowptr, alphas, *_alpha_strides(alphas), x_transposed, bias, to,
        rows, out_features, in_features, spans,
        MEMORIES=memories, BLOCKS=_blocks(in_features), SPLIT=split, SLICES=slices, SLOTS=slots,
        PLANE=2 * codes.shape[2], BN=bn, BM=bm,
        HAS_BIAS=bias is not None, HALF=x.dtype == torch.float16, UPCAST=is_interpreted(),
        num_warps=slices, num_stages=stages, **_FUSION,
    )  # fmt: skip
    if split > 1:
        _add_parts[(triton.cdiv(out_features, 256), rows)](
            to, bias, out, rows, out_features, SPLIT=split, HAS_BIAS=bias is not None, BN=256, num_warps=4, **_FUSION
        )
    return out


def _transpose_blocks(x: Tensor, bm: int) -> Tensor:
    """x as (blocks of ``bm`` rows, in_features, bm), zeros beyond its last row; one row is its own transpose."""
    if bm == 1:
        return x
    rows, in_features = x.shape
    blocks = triton.cdiv(rows, bm)
    out = x.new_empty(blocks, in_features, bm)
    _transpose[(blocks, triton.cdiv(in_features, 64))](x, out, rows, in_features, BK=64, BM=bm, num_warps=4)
    return out


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
    return _run_merge(
        codes,
        scales,
        ortho=ortho,
        rowptr=rowptr,
        alphas=alphas,
        shape=(out_features, in_features),
        bits=bits,
        group_size=group_size,
        plane=plane,
        dtype=dtype,
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
    return _run_merge(
        ortho,  # codes and scales are not read
        ortho,
        ortho=ortho,
        rowptr=rowptr,
        alphas=one,
        shape=(out_features, in_features),
        bits=4,
        group_size=64,
        plane=0,
        dtype=dtype,
        memory=memory,
    )


@ortho_dense.register_fake
def _(ortho: Tensor, rowptr: Tensor, memory: int, out_features: int, in_features: int, dtype: torch.dtype) -> Tensor:
    return ortho.new_empty(out_features, in_features, dtype=dtype)


def _run_merge(
    codes: Tensor,
    scales: Tensor,
    *,
    ortho: Tensor | None,
    rowptr: Tensor | None,
    alphas: Tensor | None,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    plane: int,
    dtype: torch.dtype,
    memory: int | None = None,
) -> Tensor:
    """Runs the merge kernel once; with ``memory`` for that ortho stream alone, without the base stream."""
    out_features, in_features = shape
    out = codes.new_empty(shape, dtype=dtype)
    memories = 0
    if ortho is not None and rowptr is not None and alphas is not None and ortho.numel():
        memories = rowptr.shape[0] if memory is None else 1
    width, groups = (codes.shape[1], scales.shape[1]) if memory is None and not plane else (1, 1)
    _merge[(triton.cdiv(out_features, _MERGE_ROWS),)](
        codes, scales, ortho, rowptr, alphas, _alpha_strides(alphas)[0], out,
        out_features, in_features, width, groups, memory or 0,
        MEMORIES=memories, BLOCKS=_blocks(in_features), SLOTS=_MERGE_SLOTS, BASE=memory is None,
        PLANE=plane, BITS=bits, GROUP=group_size, TILE=PLANES * plane or _MERGE_TILE, ROWS=_MERGE_ROWS,
        num_warps=4, **_FUSION,
    )  # fmt: skip
    record("triton.weight")
    return out
