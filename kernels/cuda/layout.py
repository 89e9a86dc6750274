"""Conversion of the tensors of a checkpoint to the layout of the GPU kernels.

Base, 4 bits: in_features is cut into *spans* of four *planes*; a plane (64, 32 or 16 columns) lies within one group.
A 32-bit word holds the column pair ``(2j, 2j + 1)`` of all four planes of a span: bits ``4p..4p+3`` are the even column
of plane ``p``, bits ``16+4p..`` the odd one. So one shift, one mask and one "or" turn a word into two neighbouring
BF16 numbers, as the operand of a tensor core needs them, and one 16-byte load brings 32 weights.

Ortho: one 32-bit word per value, BF16 in the upper half and the column, modulo 65,536, in the lower; sorted by memory,
block of 65,536 columns, row, column.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_codes, check_csr
from ..packing import PACKED_BITS, unpack_codes
from . import tuning

PLANES = 4
_PLANE_WIDTHS = (64, 32, 16)
"""The wider the plane, the fewer products with a scale; a tensor core takes no fewer than 16 columns at once."""
_MAX_PADDING_DIVISOR = 16
"""A wide plane may pad in_features by a 16th at most."""
COLUMN_BLOCK = 1 << 16
_INT32_MAX = 2**31 - 1

Csr = tuple[Tensor, Tensor, Tensor]
"""rowptr (out_features + 1), cols (nnz,), vals (nnz,) BF16 of one memory."""


class Prepared(NamedTuple):
    """The streams of one layer in the layout of the kernels, on the device.

    ``plane`` is the width of a plane; 0 means that ``codes`` and ``scales`` are the stored ones, which only the
    dequantise pass can read (3 and 8 bits, and groups that are no multiple of 16).

    codes: (spans, out_features, plane / 2) int32, or (out_features, packed width) uint8 as stored.
    scales: (spans, out_features) int64, a BF16 scale for each of the four planes; or (out_features, groups) BF16.
    ortho: (nnz,) int32, or None without an ortho stream.
    rowptr: (memories, column blocks, out_features + 1) int32 into ``ortho``.
    fused_rows: the most rows of x for which the fused kernel is used here.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int
    plane: int
    codes: Tensor
    scales: Tensor
    ortho: Tensor | None
    rowptr: Tensor | None
    fused_rows: int

    @property
    def memories(self) -> int:
        """Number of ortho streams, each with its own alpha."""
        return 0 if self.rowptr is None else self.rowptr.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.codes, self.scales, self.ortho, self.rowptr)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def plane_width(bits: int, group_size: int, in_features: int) -> int:
    """Columns per plane, or 0 if the fused kernel cannot read such a base.

    The widest plane that divides the group and pads in_features by at most a 16th, else the one that pads least.
    """
    fitting = [width for width in _PLANE_WIDTHS if group_size % width == 0]
    if bits != 4 or not fitting:
        return 0
    padding = {width: -in_features % (PLANES * width) for width in fitting}
    for width in fitting:
        if padding[width] * _MAX_PADDING_DIVISOR <= in_features:
            return width
    return min(fitting, key=lambda width: padding[width])


def prepare(
    qweight: Tensor,
    scales: Tensor,
    memories: Sequence[Csr] = (),
    *,
    in_features: int,
    bits: int = 4,
    group_size: int = 64,
) -> Prepared:
    """Repacks the stored tensors for the kernels, on their device.

    ``qweight`` (out_features, packed width) uint8 and ``scales`` (out_features, groups) BF16 as in a checkpoint;
    ``memories``: CSR tensors of each ortho stream, in the order of the alphas of ``linear``. Temporarily
    needs twice the memory of the unpacked codes (a byte each).

    Raises:
        ValueError: for a lattice that ``refuses`` rejects.
    """
    out_features = qweight.shape[0]
    if bits not in PACKED_BITS:
        raise ValueError(f"a base of {bits} bits has no codes")
    check_codes(qweight, scales, bits=bits, group_size=group_size, in_features=in_features)
    plane = plane_width(bits, group_size, in_features)
    codes, factors = (qweight, scales) if plane == 0 else _pack_planes(qweight, scales, in_features, group_size, plane)
    ortho, rowptr = (None, None) if not memories else ortho_words(memories, in_features)
    return Prepared(
        out_features=out_features,
        in_features=in_features,
        bits=bits,
        group_size=group_size,
        plane=plane,
        codes=codes.contiguous(),
        scales=factors.contiguous(),
        ortho=ortho,
        rowptr=rowptr,
        fused_rows=tuning.fused_rows(tuning.device_name(qweight.device)) if plane else 0,
    )


def _pack_planes(
    qweight: Tensor, scales: Tensor, in_features: int, group_size: int, plane: int
) -> tuple[Tensor, Tensor]:
    rows = qweight.shape[0]
    span = PLANES * plane
    spans = -(-in_features // span)
    offset_codes = torch.full((rows, spans * span), 8, dtype=torch.int32, device=qweight.device)
    offset_codes[:, :in_features] = unpack_codes(qweight, 4)[:, :in_features] + 8
    parts = offset_codes.view(rows, spans, PLANES, plane // 2, 2)
    words = torch.zeros(rows, spans, plane // 2, dtype=torch.int32, device=qweight.device)
    for index in range(PLANES):
        words |= parts[:, :, index, :, 0] << 4 * index
        words |= parts[:, :, index, :, 1] << 4 * index + 16
    groups = (torch.arange(spans * PLANES, device=scales.device) * plane // group_size).clamp(max=scales.shape[1] - 1)
    factors = scales[:, groups].view(rows, spans, PLANES).contiguous().view(torch.int64).squeeze(-1)
    return words.transpose(0, 1), factors.t()


def ortho_words(memories: Sequence[Csr], in_features: int) -> tuple[Tensor, Tensor]:
    """``ortho`` and ``rowptr`` of ``Prepared``. Raises ``ValueError`` for more values than 31 bits can count."""
    blocks = -(-in_features // COLUMN_BLOCK)
    words, counts = [], []
    for rowptr, cols, vals in memories:
        out_features = rowptr.numel() - 1
        if not torch.compiler.is_compiling():  # its values cannot be read then
            check_csr(rowptr, cols, vals, (out_features, in_features))
        rows = torch.repeat_interleave(torch.arange(out_features, device=cols.device), rowptr.diff().long())
        position = cols.long() // COLUMN_BLOCK * out_features + rows
        order = torch.argsort(position, stable=True)
        upper = vals.view(torch.int16).to(torch.int32) << 16
        words.append((upper | (cols % COLUMN_BLOCK).to(torch.int32))[order])
        counts.append(torch.bincount(position, minlength=blocks * out_features).view(blocks, out_features))
    total = torch.stack(counts)
    if int(total.sum()) > _INT32_MAX:
        raise ValueError(f"{int(total.sum())} values in the ortho streams; their positions must fit into 31 bits")
    ends = total.flatten().cumsum(0).view_as(total)
    starts = (ends - total)[..., :1]
    return torch.cat(words), torch.cat([starts, ends], dim=-1).to(torch.int32)
