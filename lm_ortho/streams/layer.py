"""The streams of one linear layer together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm_ortho.streams.base import BaseStream
from lm_ortho.streams.ortho import OrthoStream


@dataclass(frozen=True, eq=False)
class LayerStreams:
    """One layer: W(alpha) = base + alpha * ortho, and a bias that belongs to neither.

    ``ortho`` is None in a base-only model, which is not the same as an empty stream. ``bias`` is
    (out_features,) and stored in BF16.
    """

    base: BaseStream
    ortho: OrthoStream | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ortho is not None and self.ortho.shape != self.base.shape:
            raise ValueError(f"base {self.base.shape} and ortho {self.ortho.shape} differ in shape")
        if self.bias is None:
            return
        if tuple(self.bias.shape) != (self.base.shape[0],) or not self.bias.is_floating_point():
            raise ValueError(f"bias of shape {tuple(self.bias.shape)} for {self.base.shape[0]} out_features")
        if not bool(torch.isfinite(self.bias).all()):
            raise ValueError("bias holds a value that is not finite")
        object.__setattr__(self, "bias", self.bias.detach().to(torch.bfloat16))

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.base.shape

    @property
    def n_weights(self) -> int:
        """Weights of the matrix, the bias not counted."""
        return self.shape[0] * self.shape[1]

    @property
    def nnz(self) -> int:
        """Values in the ortho stream."""
        return 0 if self.ortho is None else self.ortho.nnz

    def dense(self, alpha: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """W(alpha), (out_features, in_features), computed in at least float32 and rounded once."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weight = self.base.dequantize(wide)
        if alpha and self.ortho is None:
            raise ValueError(f"alpha={alpha} without an ortho stream")
        if alpha and self.ortho is not None:
            weight.add_(self.ortho.to_dense(wide), alpha=alpha)
        return weight.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors by the name they have in a checkpoint."""
        ortho = {} if self.ortho is None else self.ortho.tensors()
        bias = {} if self.bias is None else {"bias": self.bias}
        return {**self.base.tensors(), **ortho, **bias}

    def nbytes(self) -> int:
        """Bytes of both streams; the bias is not counted, as no stream changes it."""
        return self.base.nbytes() + (0 if self.ortho is None else self.ortho.nbytes())

    def bits_per_weight(self) -> float:
        """Bits stored for each weight of the matrix: codes, scales, indices, values and padding."""
        return 8 * self.nbytes() / self.n_weights

    def to(self, device: Any) -> LayerStreams:
        """The same streams on another device."""
        return LayerStreams(
            self.base.to(device),
            None if self.ortho is None else self.ortho.to(device),
            None if self.bias is None else self.bias.to(device),
        )
