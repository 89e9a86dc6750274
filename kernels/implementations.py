"""The reference and the CPU kernel as ``dispatch`` knows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .cpu import library, op, operands
from .dispatch import REFERENCE, Ask, StoredBase, StoredOrtho
from .reference import SparseOperand, base_operand, several_linear, sparse_operand

SMALLEST = 2**20
"""Weights from which ``auto`` takes the CPU kernel. A smaller dense copy stays in the caches anyway, and there the
products of torch are as fast; see docs/kernels.md."""


class Reference:
    """Plain PyTorch: any device, any floating dtype, differentiable. Keeps a dense copy of the base in that dtype."""

    name = REFERENCE

    def refuses(self, ask: Ask) -> str | None:
        return None

    def declines(self, ask: Ask) -> str | None:
        return None

    def base(self, stored: StoredBase, dtype: torch.dtype) -> Tensor:
        weight, scales, bits, group_size, in_features = stored
        return base_operand(weight, scales, bits=bits, group_size=group_size, in_features=in_features, dtype=dtype)

    def ortho(self, stored: StoredOrtho, dtype: torch.dtype) -> SparseOperand:
        return sparse_operand(*stored, dtype)

    def linear(
        self,
        x: Tensor,
        base: Tensor,
        terms: Sequence[tuple[SparseOperand, float | Tensor]],
        bias: Tensor | None,
        ask: Ask,
    ) -> Tensor:
        return several_linear(x, base, terms, bias)

    def bind(
        self,
        x: Tensor,
        base: Tensor,
        terms: Sequence[tuple[SparseOperand, float]],
        bias: Tensor | None,
        ask: Ask,
    ) -> Callable[[Tensor], Tensor]:
        return lambda x: several_linear(x, base, terms, bias)


class Cpu:
    """The C++ kernel: BF16 on a CPU, without gradients. Keeps the streams in its own layout and no dense copy."""

    name = "cpu"

    def refuses(self, ask: Ask) -> str | None:
        if ask.device != "cpu":
            return f"it is for CPUs, not for {ask.device}"
        if ask.dtype != torch.bfloat16:
            return f"x is {str(ask.dtype).removeprefix('torch.')}; it takes bfloat16"
        if ask.bits == 16:
            return "a base stream of 16 bits is a dense matrix"
        if ask.grad:
            return "it gives no gradients"
        if ask.autocast:
            return "autocast decides on the dtype"
        found = library.find()
        return found.why if isinstance(found, library.Absent) else None

    def declines(self, ask: Ask) -> str | None:
        if ask.device != "cpu" or ask.dtype != torch.bfloat16 or ask.bits == 16 or ask.grad or ask.autocast:
            return "not BF16 inference on a CPU"
        if ask.out_features * ask.in_features < SMALLEST:
            return f"fewer than {SMALLEST} weights"
        return None

    def base(self, stored: StoredBase, dtype: torch.dtype) -> Tensor:
        if stored.scales is None:
            raise ValueError("a base stream of 16 bits has no codes")
        op.operator()
        return operands.pack_base(stored.qweight, stored.scales, stored.bits, stored.group_size)

    def ortho(self, stored: StoredOrtho, dtype: torch.dtype) -> Tensor:
        return operands.pack_sheets(stored.rowptr, stored.cols, stored.vals)

    def linear(
        self, x: Tensor, base: Tensor, terms: Sequence[tuple[Tensor, float | Tensor]], bias: Tensor | None, ask: Ask
    ) -> Tensor:
        rows = x.reshape(-1, ask.in_features)
        sheets = [sheet for sheet, _ in terms]
        alphas = [_per_row(alpha, x, rows.shape[0]) for _, alpha in terms]
        # Beside a product of 200 microseconds the way through the dispatcher of torch counts; only tracing needs it.
        traced = torch.compiler.is_compiling() or type(x) is not Tensor
        product = op.operator() if traced else op.cpu_linear
        y: Tensor = product(rows, base, sheets, alphas, bias, ask.out_features, ask.bits, ask.group_size)
        return y.view(*x.shape[:-1], ask.out_features)

    def bind(
        self, x: Tensor, base: Tensor, terms: Sequence[tuple[Tensor, float]], bias: Tensor | None, ask: Ask
    ) -> Callable[[Tensor], Tensor]:
        sheets, alphas = [sheet for sheet, _ in terms], [_one(alpha) for _, alpha in terms]
        return op.bound(x, base, sheets, alphas, bias, ask.out_features, ask.bits, ask.group_size)


def _per_row(alpha: float | Tensor, x: Tensor, rows: int) -> Tensor:
    """``(1,)`` or ``(rows,)`` float32 from one alpha, or one per entry of the first dimension of ``x``."""
    if not isinstance(alpha, Tensor):
        return _one(alpha)
    if alpha.shape != x.shape[:1]:
        raise ValueError(f"alpha of shape {tuple(alpha.shape)} for x of shape {tuple(x.shape)}")
    return alpha.to(torch.float32).repeat_interleave(rows // max(1, x.shape[0]))


def _one(alpha: float) -> Tensor:
    """``(1,)`` float32. The numbers in use are few, and making a tensor costs a tenth of a small product."""
    kept = _numbers.get(alpha)
    if kept is None:
        with torch.inference_mode(False):
            kept = torch.tensor([alpha], dtype=torch.float32, device="cpu")
        if len(_numbers) < _MOST_NUMBERS:
            _numbers[alpha] = kept
    return kept


_numbers: dict[float, Tensor] = {}
_MOST_NUMBERS = 256
