"""The base stream: symmetric low-bit codes in groups along in_features, one BF16 scale per group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lm_ortho.kernels import base_operand, pack_codes, unpack_codes
from lm_ortho.streams.validation import base_layout, validate_base, validate_lattice


def code_range(bits: int) -> tuple[int, int]:
    """The smallest and largest code: -2^(bits-1) and 2^(bits-1) - 1."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


@dataclass(frozen=True, eq=False)
class BaseStream:
    """W_base of one layer: ``code * scale``, or a BF16 matrix as it is when ``bits`` is 16.

    Attributes:
        shape: (out_features, in_features), without padding.
        bits: 3, 4, 8 or 16.
        group_size: weights per scale, a multiple of 8; the last group of a row may be short.
        qweight: (out_features, packed width) uint8; codes beyond in_features are 0. None at 16 bits.
        scales: (out_features, number of groups) BF16. None at 16 bits.
        weight: (out_features, in_features) BF16 at 16 bits, else None.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    qweight: Tensor | None = None
    scales: Tensor | None = None
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        tensors = {"qweight": self.qweight, "scales": self.scales, "weight": self.weight}
        validate_base(self.shape, self.bits, self.group_size, tensors)

    @staticmethod
    def layout(shape: tuple[int, int], bits: int, group_size: int) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
        """The stored tensors of a stream of this shape and lattice: name -> (dtype, shape)."""
        return base_layout(shape, bits, group_size)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, bits: int, group_size: int) -> BaseStream:
        """The stream of integer ``codes`` (out, in) with ``scales`` (out, ceil(in / group_size)).

        Scales are rounded to BF16.

        Raises:
            ValueError: for codes outside the range of ``bits``, shapes that do not fit and scales that are not finite.
        """
        if bits == 16:
            raise ValueError("16 bits have no codes; use BaseStream.from_weight")
        validate_lattice(bits, group_size)
        if codes.dim() != 2 or codes.is_floating_point() or codes.is_complex():
            raise ValueError(f"codes must be an integer matrix, not {codes.dtype} {tuple(codes.shape)}")
        low, high = code_range(bits)
        if codes.numel() and not (low <= int(codes.min()) and int(codes.max()) <= high):
            raise ValueError(
                f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits [{low}, {high}]"
            )
        padding = -codes.shape[1] % group_size
        qweight = pack_codes(functional.pad(codes, (0, padding)).contiguous(), bits)
        shape = (codes.shape[0], codes.shape[1])
        return cls(shape, bits, group_size, qweight=qweight, scales=scales.to(torch.bfloat16).contiguous())

    @classmethod
    def from_weight(cls, weight: Tensor, group_size: int = 64) -> BaseStream:
        """The 16-bit stream: ``weight`` (out, in) rounded to BF16."""
        if weight.dim() != 2:
            raise ValueError(f"weight must be a matrix, not {tuple(weight.shape)}")
        shape = (weight.shape[0], weight.shape[1])
        return cls(shape, 16, group_size, weight=weight.detach().to(torch.bfloat16).contiguous())

    def codes(self) -> Tensor:
        """The codes, ``(out_features, in_features)`` int8. Raises ``ValueError`` at 16 bits."""
        if self.qweight is None:
            raise ValueError("a 16-bit base stream has no codes")
        codes: Tensor = unpack_codes(self.qweight, self.bits)[:, : self.shape[1]].contiguous()
        return codes

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_base, ``(out_features, in_features)``: code * scale, exact in float32."""
        tensor = self.weight if self.qweight is None else self.qweight
        dense: Tensor = base_operand(
            tensor,
            self.scales,
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.shape[1],
            dtype=dtype,
        )
        return dense

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        tensors = {"qweight": self.qweight, "scales": self.scales, "weight": self.weight}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def nbytes(self) -> int:
        """Bytes of the stored tensors, padding included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: Any) -> BaseStream:
        """The same stream on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return BaseStream(self.shape, self.bits, self.group_size, **tensors)
