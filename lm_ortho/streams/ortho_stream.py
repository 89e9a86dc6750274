"""The ortho stream: a sparse BF16 matrix in CSR form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm_ortho.streams.validation import validate_ortho

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class OrthoStream:
    """W_ortho of one layer; positions outside the support are 0.

    Attributes:
        rowptr: (out_features + 1,) int32, int64 beyond 2^31 - 1 values; row r is ``rowptr[r]:rowptr[r+1]``.
        cols: (nnz,) int32, strictly increasing within a row.
        vals: (nnz,) BF16.
        shape: (out_features, in_features).
    """

    rowptr: Tensor
    cols: Tensor
    vals: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (int(self.shape[0]), int(self.shape[1])))
        validate_ortho(self.shape, self.rowptr, self.cols, self.vals)

    @classmethod
    def from_dense(cls, delta: Tensor, support: Tensor) -> OrthoStream:
        """The stream of ``delta`` (out, in) on ``support`` (out, in, bool), rounded to BF16.

        A zero on the support is stored, too.

        Raises:
            ValueError: for shapes that differ and for values on the support that are not finite.
        """
        if delta.dim() != 2 or delta.shape != support.shape or support.dtype != torch.bool:
            raise ValueError(
                f"need a matrix and a boolean support of the same shape, not {tuple(delta.shape)} and "
                f"{support.dtype} {tuple(support.shape)}"
            )
        rowptr = torch.zeros(delta.shape[0] + 1, dtype=torch.int64, device=delta.device)
        torch.cumsum(support.sum(1), 0, out=rowptr[1:])
        if int(rowptr[-1]) <= _INT32_MAX:
            rowptr = rowptr.to(torch.int32)
        cols = support.nonzero()[:, 1].to(torch.int32)
        vals = delta.detach()[support].to(torch.bfloat16)
        return cls(rowptr, cols, vals, (delta.shape[0], delta.shape[1]))

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> OrthoStream:
        """A stream without values."""
        return cls.from_dense(torch.zeros(shape), torch.zeros(shape, dtype=torch.bool))

    def rows(self) -> Tensor:
        """(nnz,) int64: the row of each stored value."""
        return torch.repeat_interleave(self.rowptr.long().diff())

    def support(self) -> Tensor:
        """The support mask, (out_features, in_features) bool."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.cols.device)
        mask[self.rows(), self.cols.long()] = True
        return mask

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W_ortho, (out_features, in_features), zero outside the support."""
        dense = torch.zeros(self.shape, dtype=dtype, device=self.vals.device)
        dense[self.rows(), self.cols.long()] = self.vals.to(dtype)
        return dense

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.vals.numel()

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by the name they have in a checkpoint."""
        return {"ortho_rowptr": self.rowptr, "ortho_cols": self.cols, "ortho_vals": self.vals}

    def nbytes(self) -> int:
        """Bytes of the stored tensors, indices included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self, device: Any) -> OrthoStream:
        """The same stream on another device."""
        return OrthoStream(self.rowptr.to(device), self.cols.to(device), self.vals.to(device), self.shape)
