"""The stored form of codes: offset binary, packed along in_features without gaps."""

from __future__ import annotations

import torch
from torch import Tensor

PACKED_BITS = (3, 4, 8)
_ALIGN = 8  # the fewest codes that fill whole bytes at every width


def packed_width(in_features: int, bits: int, group_size: int) -> int:
    """Bytes per row; in_features is padded up to a multiple of ``group_size``."""
    return -(-in_features // group_size) * group_size * bits // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """``(out_features, in_features * bits / 8)`` uint8 from signed integer codes.

    A code ``c`` is stored as ``c + 2**(bits - 1)``. 8 bits: one code per byte; 4: two, low nibble first;
    3: eight codes in three bytes, the first code in the lowest bits. in_features must be a multiple of 8.
    """
    rows, width = codes.shape
    if bits not in PACKED_BITS:
        raise ValueError(f"codes of {bits} bits cannot be packed; known widths: {PACKED_BITS}")
    if width % _ALIGN:
        raise ValueError(f"cannot pack rows of {width} codes: not a multiple of {_ALIGN}")
    offset_codes = codes.to(torch.int32) + (1 << (bits - 1))
    if bits == 8:
        return offset_codes.to(torch.uint8)
    if bits == 4:
        pairs = offset_codes.view(rows, -1, 2)
        return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
    shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=codes.device)
    words = (offset_codes.view(rows, -1, 8) << shifts).sum(-1, dtype=torch.int32)
    word_bytes = torch.stack([words & 255, words >> 8 & 255, words >> 16], dim=-1)
    return word_bytes.to(torch.uint8).view(rows, -1)


def unpack_codes(qweight: Tensor, bits: int) -> Tensor:
    """``(out_features, padded in_features)`` int8 codes; the inverse of ``pack_codes``."""
    rows = qweight.shape[0]
    if bits not in PACKED_BITS:
        raise ValueError(f"codes of {bits} bits cannot be unpacked; known widths: {PACKED_BITS}")
    if bits == 8:
        return (qweight.to(torch.int16) - 128).to(torch.int8)
    if bits == 4:
        nibbles = torch.stack([qweight & 15, qweight >> 4], dim=-1)
        return nibbles.view(rows, -1).to(torch.int8) - 8
    parts = qweight.view(rows, -1, 3).to(torch.int32)
    words = parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16
    shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=qweight.device)
    return ((words.unsqueeze(-1) >> shifts) & 7).view(rows, -1).to(torch.int8) - 4
