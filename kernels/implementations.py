"""The reference kernel and the CPU kernel as ``Implementation`` for ``dispatch``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cpu import library, op, operands
from .dispatch import REFERENCE, ProductSpec, StoredBase, StoredOrtho
from .reference import (
    MergedOperand,
    SparseOperand,
    base_operand,
    bind_dense,
    merged_linear,
    merged_operand,
    several_linear,
    sparse_operand,
)

MIN_WEIGHTS = 2**20
"""The number of weights from which ``auto`` selects the CPU kernel. A smaller dense copy stays in the caches, where the
products of torch are as fast; see docs/kernels.md."""


class Reference:
    """The reference kernel in plain PyTorch: any device, any floating dtype, differentiable.

    Keeps a dense copy in the dtype of ``x``: of the base stream, and of W(alpha) where all rows have one alpha.
    """

    name = REFERENCE

    def refuses(self, spec: ProductSpec) -> str | None:
        return None

    def declines(self, spec: ProductSpec) -> str | None:
        return None

    def base(self, stored: StoredBase, dtype: torch.dtype) -> Tensor:
        weight, scales, bits, group_size, in_features = stored
        return base_operand(weight, scales, bits=bits, group_size=group_size, in_features=in_features, dtype=dtype)

    def ortho(self, stored: StoredOrtho, dtype: torch.dtype) -> SparseOperand:
        return sparse_operand(*stored, dtype)

    def merge(self, base: StoredBase, terms: Sequence[tuple[StoredOrtho, float]], dtype: torch.dtype) -> MergedOperand:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        sparse_terms = [(sparse_operand(*stored, wide), alpha) for stored, alpha in terms]
        return merged_operand(self.base(base, wide), sparse_terms, dtype)

    def linear(
        self,
        x: Tensor,
        base: Tensor | MergedOperand,
        terms: Sequence[tuple[SparseOperand, float | Tensor]],
        bias: Tensor | None,
        spec: ProductSpec,
    ) -> Tensor:
        if isinstance(base, MergedOperand):
            return merged_linear(x, base, bias)
        return several_linear(x, base, terms, bias)

    def bind(
        self,
        x: Tensor,
        base: Tensor | MergedOperand,
        terms: Sequence[tuple[SparseOperand, float]],
        bias: Tensor | None,
        spec: ProductSpec,
    ) -> Callable[[Tensor], Tensor]:
        if isinstance(base, MergedOperand):
            return bind_dense(base.weight, bias, "reference.merged")
        if not terms:
            return bind_dense(base, bias, "reference.base")
        return lambda x: several_linear(x, base, terms, bias)


class Cpu:
    """The C++ kernel: BF16 on a CPU, without gradients. Keeps the streams in its own layout and no dense copy."""

    name = "cpu"

    def refuses(self, spec: ProductSpec) -> str | None:
        if spec.device != "cpu":
            return f"it is for CPUs, not for {spec.device}"
        if spec.dtype != torch.bfloat16:
            return f"x is {str(spec.dtype).removeprefix('torch.')}; it takes bfloat16"
        if spec.bits == 16:
            return "a base stream of 16 bits is a dense matrix"
        if spec.grad:
            return "it gives no gradients"
        if spec.autocast:
            return "autocast decides on the dtype"
        result = library.find()
        return result.reason if isinstance(result, library.MissingLibrary) else None

    def declines(self, spec: ProductSpec) -> str | None:
        if spec.device != "cpu" or spec.dtype != torch.bfloat16 or spec.bits == 16 or spec.grad or spec.autocast:
            return "not BF16 inference on a CPU"
        if spec.out_features * spec.in_features < MIN_WEIGHTS:
            return f"fewer than {MIN_WEIGHTS} weights"
        return None

    def base(self, stored: StoredBase, dtype: torch.dtype) -> Tensor:
        if stored.scales is None:
            raise ValueError("a base stream of 16 bits has no codes")
        op.operator()
        return operands.pack_base(stored.qweight, stored.scales, stored.bits, stored.group_size)

    def ortho(self, stored: StoredOrtho, dtype: torch.dtype) -> Tensor:
        return operands.pack_sheets(stored.rowptr, stored.cols, stored.vals, stored.in_features)

    def merge(self, base: StoredBase, terms: Sequence[tuple[StoredOrtho, float]], dtype: torch.dtype) -> None:
        return None

    def linear(
        self,
        x: Tensor,
        base: Tensor,
        terms: Sequence[tuple[Tensor, float | Tensor]],
        bias: Tensor | None,
        spec: ProductSpec,
    ) -> Tensor:
        rows = x.reshape(-1, spec.in_features)
        sheets = [sheet for sheet, _ in terms]
        alphas = [_per_row(alpha, x, rows.shape[0]) for _, alpha in terms]
        # The dispatcher of torch takes a noticeable part of 200 microseconds; only tracing needs it.
        is_tracing = torch.compiler.is_compiling() or type(x) is not Tensor
        product = op.operator() if is_tracing else op.cpu_linear
        y: Tensor = product(
            rows,
            base,
            sheets,
            alphas,
            bias,
            out_features=spec.out_features,
            bits=spec.bits,
            group_size=spec.group_size,
        )
        return y.view(*x.shape[:-1], spec.out_features)

    def bind(
        self, x: Tensor, base: Tensor, terms: Sequence[tuple[Tensor, float]], bias: Tensor | None, spec: ProductSpec
    ) -> Callable[[Tensor], Tensor]:
        sheets, alphas = [sheet for sheet, _ in terms], [_number_tensor(alpha) for _, alpha in terms]
        return op.bind_linear(
            x,
            base,
            sheets,
            alphas,
            bias,
            out_features=spec.out_features,
            bits=spec.bits,
            group_size=spec.group_size,
        )


def _per_row(alpha: float | Tensor, x: Tensor, rows: int) -> Tensor:
    """``(1,)`` or ``(rows,)`` float32 from one alpha, or one per entry of the first dimension of ``x``."""
    if not isinstance(alpha, Tensor):
        return _number_tensor(alpha)
    if alpha.shape != x.shape[:1]:
        raise ValueError(f"alpha of shape {tuple(alpha.shape)} for x of shape {tuple(x.shape)}")
    return alpha.to(torch.float32).repeat_interleave(rows // max(1, x.shape[0]))


def _number_tensor(alpha: float) -> Tensor:
    """``(1,)`` float32, cached: few numbers are in use, and creating a tensor costs a tenth of a small product."""
    tensor = _number_tensors.get(alpha)
    if tensor is None:
        with torch.inference_mode(False):
            tensor = torch.tensor([alpha], dtype=torch.float32, device="cpu")
        if len(_number_tensors) < _MAX_NUMBER_TENSORS:
            _number_tensors[alpha] = tensor
    return tensor


_number_tensors: dict[float, Tensor] = {}
_MAX_NUMBER_TENSORS = 256
