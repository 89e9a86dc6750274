"""The fused product for few rows of x, in Triton: base and ortho stream of a tile in one program.

A program owns ``BN`` output rows and ``BM`` rows of x. Its warps share in_features: each of ``SLICES`` slices runs
through its own spans of the base (layout.py) and the slices are summed at the end, so a narrow layer fills the device
without a second launch. Where that is not enough, ``SPLIT`` programs share a tile and ``_add_parts`` adds their
sums, in a fixed order. Products of codes and activations are exact; the scale goes onto the FP32 sum of a plane.

The bits of a result depend on SLICES, SPLIT and SLOTS, which belong to the shape of the layer. BM, BN and the
number of stages do not change the order of any sum, so a row has the same bits in every batch. For that every sum is
an explicit tree or chain, every fused multiply-add is written out and the compiler may make no other.

Calls between Triton functions are positional, in the order of their signatures: all arguments are inlined.
"""

from __future__ import annotations

import triton
import triton.language as tl

ORTHO_ROWS = tl.constexpr(16)
"""Output rows whose sparse words are processed together."""


@triton.jit
def plane_codes(words, INDEX: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr):
    """Codes -8..7 of plane INDEX, (..., 2 x words), in BF16 (FP16 with HALF; FP32 with UPCAST).

    A nibble under the bits of 128 (FP16: 1024) is that number plus the nibble; the difference is exact.
    """
    magic: tl.constexpr = 0x64006400 if HALF else 0x43004300
    two = ((words >> (4 * INDEX)) & 0x000F000F) | magic
    pair = tl.join(two.to(tl.int16), (two >> 16).to(tl.int16))
    flat = pair.reshape(words.shape[:-1] + [2 * words.shape[-1]])  # noqa: RUF005 (Triton knows no star here)
    if HALF and UPCAST:
        codes = flat.to(tl.float16, bitcast=True).to(tl.float32) - 1032.0
    elif HALF:
        codes = flat.to(tl.float16, bitcast=True) - 1032.0
    elif UPCAST:
        # No BF16 arithmetic in the interpreter: the same bits as the upper half of a float32.
        codes = (flat.to(tl.int32) << 16).to(tl.float32, bitcast=True) - 136.0
    else:
        codes = flat.to(tl.bfloat16, bitcast=True) - 136.0
    return codes


@triton.jit
def plane_scale(scales, INDEX: tl.constexpr):
    """The BF16 scale of plane INDEX as FP32, from the four that an int64 holds."""
    return (((scales >> (16 * INDEX)) & 0xFFFF).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def tree_sum(values, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """(A, C): the sum over the middle of (A, B, C), neighbours first; the order does not depend on A or C."""
    partial = tl.permute(values, (0, 2, 1))
    for level in tl.static_range(1, 8):
        if (B >> level) > 0:
            even, odd = tl.split(partial.reshape(A, C, B >> level, 2))
            partial = even + odd
    return partial.reshape(A, C)


@triton.jit
def word_value(word):
    """The BF16 value of a sparse word as FP32."""
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _any_active(alphas, alpha_row, m, ROWS):
    """1 if the alpha of any of these rows of x is not 0, else 0."""
    return tl.max((tl.load(alphas + m * alpha_row, mask=m < ROWS, other=0.0) != 0.0).to(tl.int32), 0)


@triton.jit
def _row_span(rowptr, rows, limit, part, SPLIT: tl.constexpr):
    """Begin and end of the words of this part in each row; no pointer is read of rows from ``limit`` on."""
    begin = tl.load(rowptr + rows, mask=rows < limit, other=0)
    end = tl.load(rowptr + rows + 1, mask=rows < limit, other=0)
    if SPLIT > 1:
        count = end - begin
        end = begin + count * (part + 1) // SPLIT
        begin = begin + count * part // SPLIT
    return begin, end


@triton.jit
def _words(ortho, low, high, SLOTS: tl.constexpr):
    """(ORTHO_ROWS, SLOTS): the first words of each row, 0 beyond the last."""
    here = low[:, None] + tl.arange(0, SLOTS)[None, :]
    return tl.load(ortho + here, mask=here < high[:, None], other=0)


@triton.jit
def _ortho_sums(
    sums, ortho, low, high, word, xt, first_col, SLOTS: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """``sums`` (ORTHO_ROWS, SLOTS, BM) plus the products of the words from ``low`` to ``high`` with x.

    SLOTS words of each row are multiplied at a time, while the next ones are loaded. ``xt`` is this block of x
    transposed (IN, BM), so that the BM numbers a value is multiplied with are one short load.
    """
    slot = tl.arange(0, SLOTS)
    for _ in range(tl.cdiv(tl.max(high - low, 0), SLOTS)):
        live = low[:, None] + slot[None, :] < high[:, None]
        low += SLOTS
        next_word = _words(ortho, low, high, SLOTS)
        col = (word & 0xFFFF) + first_col
        near = xt + col.to(tl.int64)[:, :, None] * BM + tl.arange(0, BM)[None, None, :]
        x = tl.load(near, mask=live[:, :, None], other=0.0).to(tl.float32)
        sums = tl.fma(tl.broadcast_to(word_value(word)[:, :, None], sums.shape), x, sums)
        word = next_word
    return sums


@triton.jit
def _with_ortho(
    total, active, ready, ready_low, ready_high, ready_word,
    ortho, rowptr, alphas, alpha_memory, alpha_row, xt, first_row, m, ROWS, OUT, part,
    MEMORIES: tl.constexpr, BLOCKS: tl.constexpr, SPLIT: tl.constexpr, SLOTS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """``total`` (BN, BM) plus alpha times the sparse product of every memory; rows of x at alpha=0 stay as they are.

    ``active`` is 1 if an alpha of the first memory is not 0; ``ready`` if the words of its first tile were fetched.
    """
    tiles: tl.constexpr = BN // ORTHO_ROWS
    total = total.reshape(tiles, ORTHO_ROWS, BM)
    tile_index = tl.arange(0, tiles)[:, None, None]
    for memory in tl.static_range(MEMORIES):
        alpha = tl.load(alphas + memory * alpha_memory + m * alpha_row, mask=m < ROWS, other=0.0)
        # This is decided before any byte of the ortho stream is read: no tile is visited if every alpha is 0.
        if memory > 0:
            active = tl.max((alpha != 0.0).to(tl.int32), 0)
        for tile in range(active * tiles):
            rows = first_row + tile * ORTHO_ROWS + tl.arange(0, ORTHO_ROWS)
            sums = tl.zeros((ORTHO_ROWS, SLOTS, BM), tl.float32)
            for block in tl.static_range(BLOCKS):
                pointers = rowptr + (memory * BLOCKS + block) * (OUT + 1)
                if memory == 0 and block == 0:
                    is_loaded = tl.where(tile == 0, ready, 0)
                    low, high = _row_span(pointers, rows, tl.where(is_loaded == 1, 0, OUT), part, SPLIT)
                    word = _words(ortho, low, high, SLOTS)
                    low = tl.where(is_loaded == 1, ready_low, low)
                    high = tl.where(is_loaded == 1, ready_high, high)
                    word = tl.where(is_loaded == 1, ready_word, word)
                else:
                    low, high = _row_span(pointers, rows, OUT, part, SPLIT)
                    word = _words(ortho, low, high, SLOTS)
                sums = _ortho_sums(sums, ortho, low, high, word, xt, block * 65536, SLOTS, BM)
            sparse_sum = tl.broadcast_to(tree_sum(sums, ORTHO_ROWS, SLOTS, BM)[None, :, :], total.shape)
            new_total = tl.fma(tl.broadcast_to(alpha[None, None, :], total.shape), sparse_sum, total)
            total = tl.where((tile_index == tile) & (alpha != 0.0)[None, None, :], new_total, total)
    return total.reshape(BN, BM)


# One compilation serves every number of rows and memories, and both forms of alpha.
@triton.jit(do_not_specialize=["alpha_memory", "alpha_row", "ROWS", "spans"])
def _fused(
    x, codes, scales, ortho, rowptr, alphas, alpha_memory, alpha_row, xt, bias, out,
    ROWS, OUT, IN, spans,
    MEMORIES: tl.constexpr, BLOCKS: tl.constexpr, SPLIT: tl.constexpr, SLICES: tl.constexpr, SLOTS: tl.constexpr,
    PLANE: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    HAS_BIAS: tl.constexpr, HALF: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One tile of y (ROWS, OUT), or with SPLIT > 1 one part of it, into (SPLIT, ROWS, OUT) FP32."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    first_row = tl.program_id(1) * BN
    part = tl.program_id(2)
    n = first_row + tl.arange(0, BN)
    # Rows and spans beyond the end read the last ones again; their results are dropped or multiplied by 0: no masks.
    row = tl.minimum(n, OUT - 1)
    per_slice = tl.cdiv(spans, SLICES * SPLIT)
    first = (part * SLICES + tl.arange(0, SLICES)) * per_slice
    pair = tl.arange(0, PLANE // 2)
    k = tl.arange(0, PLANE)
    x_row = x + m[None, None, :].to(tl.int64) * IN
    acc = tl.zeros((SLICES, BN, BM), tl.float32)
    # The first words of the sparse part need three dependent loads. One is issued per step of the base loop, so that
    # they overlap with the loads of the base stream.
    near_rows = first_row + tl.arange(0, ORTHO_ROWS)
    active = 0
    low = tl.zeros((ORTHO_ROWS,), tl.int32)
    high = tl.zeros((ORTHO_ROWS,), tl.int32)
    word = tl.zeros((ORTHO_ROWS, SLOTS), tl.int32)
    for step in range(per_slice):
        if MEMORIES > 0:
            if step == 0:
                active = _any_active(alphas, alpha_row, m, ROWS)
            elif step == 1:
                low, high = _row_span(rowptr, near_rows, active * OUT, part, SPLIT)
            elif step == 2:
                word = _words(ortho, low, high, SLOTS)
        span = first + step
        line = tl.minimum(span, spans - 1)[:, None] * OUT + row[None, :]
        words = tl.load(codes + line[:, :, None] * (PLANE // 2) + pair[None, None, :])
        factors = tl.load(scales + line)
        for plane in tl.static_range(4):
            col = (span[:, None] * (4 * PLANE) + plane * PLANE + k[None, :])[:, :, None]
            near = tl.load(x_row + col, mask=(col < IN) & (m[None, None, :] < ROWS), other=0.0)
            if UPCAST:
                near = near.to(tl.float32)
            product = tl.dot(plane_codes(words, plane, HALF, UPCAST), near)
            factor = tl.broadcast_to(plane_scale(factors, plane)[:, :, None], product.shape)
            acc = tl.fma(product, factor, acc)
    total = tree_sum(tl.permute(acc, (1, 0, 2)), BN, SLICES, BM)
    if MEMORIES > 0:
        ready = (per_slice > 2).to(tl.int32)
        x_block = xt + tl.program_id(0).to(tl.int64) * IN * BM
        total = _with_ortho(
            total, active, ready, low, high, word,
            ortho, rowptr, alphas, alpha_memory, alpha_row, x_block, first_row, m, ROWS, OUT, part,
            MEMORIES, BLOCKS, SPLIT, SLOTS, BN, BM,
        )  # fmt: skip
    if HAS_BIAS and SPLIT == 1:
        total += tl.load(bias + row).to(tl.float32)[:, None]
    to = out + (part.to(tl.int64) * ROWS + m[None, :]) * OUT + n[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=(n[:, None] < OUT) & (m[None, :] < ROWS))


@triton.jit(do_not_specialize=["ROWS"])
def _add_parts(
    parts, bias, out, ROWS, OUT, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """y (ROWS, OUT) from (SPLIT, ROWS, OUT), added from the first to the last."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    here = tl.program_id(1).to(tl.int64) * OUT + n
    total = tl.load(parts + here, mask=n < OUT, other=0.0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts + tl.cast(part, tl.int64) * ROWS * OUT + here, mask=n < OUT, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32)
    tl.store(out + here, total.to(out.dtype.element_ty), mask=n < OUT)


@triton.jit(do_not_specialize=["ROWS"])
def _transpose(x, xt, ROWS, IN, BK: tl.constexpr, BM: tl.constexpr):
    """x (ROWS, IN) as (blocks of BM rows, IN, BM), zeros beyond ROWS."""
    block = tl.program_id(0)
    m = tl.arange(0, BM)[:, None]
    k = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    row = block * BM + m
    value = tl.load(x + row.to(tl.int64) * IN + k, mask=(row < ROWS) & (k < IN), other=0.0)
    tl.store(xt + (block.to(tl.int64) * IN + k) * BM + m, value, mask=k < IN)
