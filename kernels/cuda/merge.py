"""The pass before a dense product, in Triton: writes W(alpha) in the dtype of x.

A program owns 16 rows of the weight: it writes their dequantised codes, waits for its own writes, and then, unless
alpha is 0, reads the rows' sparse words and writes base + alpha * value over the positions of the support, computed
from the codes again, so that each entry is rounded once.

Calls between Triton functions are positional, in the order of their signatures: all arguments are inlined.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fused import plane_codes, plane_scale, word_value


@triton.jit
def _plane_tile(codes, scales, weight, row, col_tile, OUT, IN, PLANE: tl.constexpr, ROWS: tl.constexpr):
    """Writes ROWS x one span from words of four planes."""
    line = col_tile * OUT + row
    words = tl.load(codes + line[:, None] * (PLANE // 2) + tl.arange(0, PLANE // 2)[None, :])
    factors = tl.load(scales + line)
    for plane in tl.static_range(4):
        col = col_tile * (4 * PLANE) + plane * PLANE + tl.arange(0, PLANE)
        value = plane_codes(words, plane, False, True) * plane_scale(factors, plane)[:, None]
        to = weight + row[:, None].to(tl.int64) * IN + col[None, :]
        tl.store(to, value.to(weight.dtype.element_ty), mask=col[None, :] < IN)


@triton.jit
def _plane_values(codes, scales, row, col, OUT, PLANE: tl.constexpr):
    """W_base at (row, col), FP32, from words of four planes."""
    span = col // (4 * PLANE)
    plane = col % (4 * PLANE) // PLANE
    line = span * OUT + row
    word = tl.load(codes + line * (PLANE // 2) + col % PLANE // 2)
    code = ((word >> (4 * plane + 16 * (col % 2))) & 15) - 8
    factor = tl.load(scales + line) >> (16 * plane).to(tl.int64)
    return code.to(tl.float32) * plane_scale(factor, 0)


@triton.jit
def _stored_values(codes, scales, row, col, IN, width, groups, BITS: tl.constexpr, GROUP: tl.constexpr):
    """W_base at (row, col), FP32, from codes packed as in a checkpoint; columns beyond IN read the last one."""
    bit = tl.minimum(col, IN - 1) * BITS
    byte = codes + row.to(tl.int64) * width
    lower = tl.load(byte + (bit >> 3)).to(tl.int32)
    upper = tl.load(byte + tl.minimum((bit >> 3) + 1, width - 1)).to(tl.int32)
    code = (((upper << 8) | lower) >> (bit & 7)) & ((1 << BITS) - 1)
    factor = tl.load(scales + row.to(tl.int64) * groups + tl.minimum(col, IN - 1) // GROUP)
    return (code - (1 << (BITS - 1))).to(tl.float32) * factor.to(tl.float32)


@triton.jit(do_not_specialize=["alpha_memory", "first_memory"])
def _merge(
    codes, scales, ortho, rowptr, alphas, alpha_memory, weight, OUT, IN, width, groups, first_memory,
    MEMORIES: tl.constexpr, BLOCKS: tl.constexpr, SLOTS: tl.constexpr, BASE: tl.constexpr,
    PLANE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of W_base + alpha * W_ortho into ``weight`` (OUT, IN); without BASE of alpha * W_ortho alone."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, OUT - 1)
    for tile in range(tl.cdiv(IN, TILE)):
        if BASE and PLANE > 0:
            _plane_tile(codes, scales, weight, row, tile, OUT, IN, PLANE, ROWS)
        else:
            col = (tile * TILE + tl.arange(0, TILE))[None, :]
            if BASE:
                value = _stored_values(codes, scales, row[:, None], col, IN, width, groups, BITS, GROUP)
            else:
                value = tl.zeros((ROWS, TILE), tl.float32)
            to = weight + row[:, None].to(tl.int64) * IN + col
            tl.store(to, value.to(weight.dtype.element_ty), mask=col < IN)
    if MEMORIES > 0:
        # The support is written by other threads of this program than the tile under it.
        tl.debug_barrier()
    for memory in tl.static_range(MEMORIES):
        alpha = tl.load(alphas + memory * alpha_memory)
        # At alpha=0 no row is read.
        end_row = tl.where(alpha != 0.0, OUT, 0)
        for block in tl.static_range(BLOCKS):
            at = rowptr + ((first_memory + memory) * BLOCKS + block) * (OUT + 1) + n
            present = n < end_row
            start = tl.load(at, mask=present, other=0)
            end = tl.load(at + 1, mask=present, other=0)
            for chunk in range(tl.cdiv(tl.max(end - start, 0), SLOTS)):
                here = start[:, None] + chunk * SLOTS + tl.arange(0, SLOTS)[None, :]
                live = here < end[:, None]
                word = tl.load(ortho + here, mask=live, other=0)
                col = (word & 0xFFFF) + block * 65536
                value = tl.zeros((ROWS, SLOTS), tl.float32)
                if BASE and PLANE > 0:
                    value = _plane_values(codes, scales, tl.broadcast_to(row[:, None], col.shape), col, OUT, PLANE)
                elif BASE:
                    value = _stored_values(
                        codes, scales, tl.broadcast_to(row[:, None], col.shape), col, IN, width, groups, BITS, GROUP
                    )
                merged_value = tl.fma(tl.zeros_like(value) + alpha, word_value(word), value)
                to = weight + row[:, None].to(tl.int64) * IN + col
                tl.store(to, merged_value.to(weight.dtype.element_ty), mask=live)
