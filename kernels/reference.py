"""The reference kernel: the dual-stream product in plain PyTorch, with which every faster kernel is compared.

y = x W_base^T + bias + alpha * (x W_ortho^T)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .checks import check_codes, check_csr
from .counter import record
from .packing import unpack_codes

# Adding the non-zeros to a copy of the base costs about out * in, a sparse product about 4 * nnz * rows
# (measured at 256 to 768 features, 1 % density, one thread).
_SPARSE_COST = 4


class SparseOperand(NamedTuple):
    """W_ortho in the forms that products need: ``csr`` for few rows of x, ``flat`` and ``values`` for many.

    ``csr`` is ``(out_features, in_features)``, or None where torch has no CSR product; ``flat`` holds the
    positions in the flattened matrix (int64); ``values`` are in the accumulation dtype.
    """

    shape: tuple[int, int]
    csr: Tensor | None
    flat: Tensor
    values: Tensor


class MergedOperand(NamedTuple):
    """W(alpha) as one dense ``(out_features, in_features)`` matrix in the dtype of ``x``."""

    weight: Tensor


def base_operand(
    qweight: Tensor,
    scales: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """W_base as a dense ``(out_features, in_features)`` matrix; each entry is rounded once, into ``dtype``.

    With ``bits=16`` ``qweight`` is the BF16 matrix itself and there are no scales.
    """
    if scales is None:
        if qweight.dim() != 2 or qweight.shape[1] != in_features or not qweight.is_floating_point():
            raise ValueError(f"a weight of {qweight.dtype} {tuple(qweight.shape)} for {in_features} in_features")
        return qweight.to(dtype)
    if not qweight.is_meta:
        check_codes(qweight, scales, bits=bits, group_size=group_size, in_features=in_features)
    codes = unpack_codes(qweight, bits)
    # A product of an 8-bit code and a BF16 scale is exact in float32.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight = codes.view(codes.shape[0], -1, group_size).to(wide) * scales.to(wide).unsqueeze(-1)
    return weight.view(codes.shape[0], -1)[:, :in_features].contiguous().to(dtype)


def sparse_operand(
    rowptr: Tensor, cols: Tensor, vals: Tensor, in_features: int, dtype: torch.dtype = torch.float32
) -> SparseOperand:
    """W_ortho for ``prepared_linear`` with activations in ``dtype``; it accumulates in at least float32."""
    shape = (rowptr.numel() - 1, in_features)
    if not torch.compiler.is_compiling():  # its values cannot be read then
        check_csr(rowptr, cols, vals, shape)
    values = vals.to(torch.float64 if dtype == torch.float64 else torch.float32)
    rows = torch.repeat_interleave(torch.arange(shape[0], device=cols.device), rowptr.diff().long())
    csr = _csr(rowptr, cols, values, shape) if _has_csr_product(values.device) else None
    return SparseOperand(shape, csr, rows * in_features + cols, values)


def merged_operand(
    weight: Tensor, terms: Sequence[tuple[SparseOperand, float]], dtype: torch.dtype = torch.float32
) -> MergedOperand:
    """W_base plus alpha times each sparse matrix; every entry is rounded once, into ``dtype``.

    ``weight`` is ``base_operand`` in the dtype of the sparse values; it is not changed.
    """
    result = weight.clone()
    for sparse, alpha in terms:
        result.view(-1).index_add_(0, sparse.flat, sparse.values, alpha=alpha)
    return MergedOperand(result.to(dtype))


def bind_dense(weight: Tensor, bias: Tensor | None, path: str) -> Callable[[Tensor], Tensor]:
    """The product with a dense matrix as a function of ``x`` alone, counted under ``path``."""

    def multiply(x: Tensor) -> Tensor:
        record(path)
        return functional.linear(x, weight, bias)

    return multiply


def merged_linear(x: Tensor, merged: MergedOperand, bias: Tensor | None = None) -> Tensor:
    """The product with ``merged_operand``, ``(..., out_features)``."""
    record("reference.merged")
    return functional.linear(x, merged.weight, bias)


def dual_stream_linear(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor | None,
    rowptr: Tensor | None = None,
    cols: Tensor | None = None,
    vals: Tensor | None = None,
    bias: Tensor | None = None,
    alpha: float | Tensor = 0.0,
    *,
    bits: int,
    group_size: int,
) -> Tensor:
    """``(..., out_features)`` in the dtype of ``x``, from the tensors as they are stored.

    ``alpha`` is one number, or one per entry of the first dimension of ``x``. Without an ortho stream
    (``rowptr=None``) only alpha=0 is possible. The codes are unpacked at every call; a layer caches the operands
    instead and calls ``prepared_linear``.
    """
    in_features = x.shape[-1]
    weight = base_operand(qweight, scales, bits=bits, group_size=group_size, in_features=in_features, dtype=x.dtype)
    sparse = None
    if rowptr is not None and cols is not None and vals is not None:
        sparse = sparse_operand(rowptr, cols, vals, in_features, x.dtype)
    return prepared_linear(x, weight, sparse, bias, alpha)


def prepared_linear(
    x: Tensor,
    weight: Tensor,
    sparse: SparseOperand | None,
    bias: Tensor | None = None,
    alpha: float | Tensor = 0.0,
) -> Tensor:
    """The dual-stream product, ``(..., out_features)``, from ``base_operand`` and ``sparse_operand``.

    ``alpha=0`` does no sparse work. A ``(rows,)`` tensor gives each entry of the first dimension of ``x`` its
    own alpha; entries at 0 get exactly the bits of the base product.
    """
    if isinstance(alpha, Tensor):
        return _per_row(x, weight, sparse, bias, alpha)
    if alpha == 0.0:
        record("reference.base")
        return functional.linear(x, weight, bias)
    if sparse is None:
        raise ValueError(f"alpha={alpha} without an ortho stream")
    if _merging_pays(x, weight, sparse):
        record("reference.merged")
        return functional.linear(x, _merge(weight, sparse, alpha), bias)
    return _add_sparse_product(x, functional.linear(x, weight, bias), sparse, alpha)


def several_linear(
    x: Tensor,
    weight: Tensor,
    terms: Sequence[tuple[SparseOperand, float | Tensor]],
    bias: Tensor | None = None,
) -> Tensor:
    """The base product plus several sparse ones, ``(..., out_features)``, each with its own alpha.

    The supports of the ``terms`` are disjoint. One term gives the bits of ``prepared_linear``.
    """
    if len(terms) < 2:
        sparse, alpha = terms[0] if terms else (None, 0.0)
        return prepared_linear(x, weight, sparse, bias, alpha)
    if all(isinstance(alpha, float) for _, alpha in terms) and _merging_pays(x, weight, *(s for s, _ in terms)):
        record("reference.merged")
        for term, factor in terms:
            weight = _merge(weight, term, float(factor))
        return functional.linear(x, weight, bias)
    y = functional.linear(x, weight, bias)
    for term, factor in terms:
        y = _add_sparse_product(x, y, term, factor)
    return y


def _add_sparse_product(x: Tensor, y: Tensor, sparse: SparseOperand, alpha: float | Tensor) -> Tensor:
    """``y`` with one more sparse product."""
    if isinstance(alpha, Tensor):
        active = alpha.nonzero().squeeze(1)
        return _add_to_rows(x, y, sparse, alpha, active) if active.numel() else y
    record("reference.sparse")
    return torch.add(y, _sparse_product(x, sparse), alpha=alpha).to(y.dtype)


def _per_row(x: Tensor, weight: Tensor, sparse: SparseOperand | None, bias: Tensor | None, alpha: Tensor) -> Tensor:
    if alpha.shape != x.shape[:1]:
        raise ValueError(f"alpha of shape {tuple(alpha.shape)} for x of shape {tuple(x.shape)}")
    active = alpha.nonzero().squeeze(1)
    y = functional.linear(x, weight, bias)
    if active.numel() == 0:
        record("reference.base")
        return y
    if sparse is None:
        raise ValueError("alpha other than 0 without an ortho stream")
    return _add_to_rows(x, y, sparse, alpha, active)


def _add_to_rows(x: Tensor, y: Tensor, sparse: SparseOperand, alpha: Tensor, active: Tensor) -> Tensor:
    """``y`` with the sparse product added in the ``active`` entries of its first dimension."""
    record("reference.sparse")
    product = _sparse_product(x.index_select(0, active), sparse)
    factors = alpha.index_select(0, active).to(product.dtype).view(-1, *[1] * (x.dim() - 1))
    sums = (y.index_select(0, active) + factors * product).to(y.dtype)
    return y.index_copy(0, active, sums)


def _merging_pays(x: Tensor, weight: Tensor, *sparse: SparseOperand) -> bool:
    """Whether W_base + alpha * W_ortho is computed for this call; below float32 that would round twice."""
    rows = x.numel() // max(1, x.shape[-1])
    wide = weight.dtype == sparse[0].values.dtype
    return wide and _SPARSE_COST * rows * sum(s.values.numel() for s in sparse) >= weight.numel()


def _merge(weight: Tensor, sparse: SparseOperand, alpha: float) -> Tensor:
    return merged_operand(weight, [(sparse, alpha)], weight.dtype).weight


def _sparse_product(x: Tensor, sparse: SparseOperand) -> Tensor:
    """``x W_ortho^T`` in the accumulation dtype. S @ x^T is several times faster than x @ S^T."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _sparse_product(x, sparse)
    rows = x.reshape(-1, sparse.shape[1]).to(sparse.values.dtype)
    if sparse.csr is not None:
        product = (sparse.csr @ rows.t()).t()
    else:
        zeros = torch.zeros(sparse.shape, dtype=sparse.values.dtype, device=x.device)
        product = functional.linear(rows, _merge(zeros, sparse, 1.0))
    return product.reshape(*x.shape[:-1], sparse.shape[0])


def _has_csr_product(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and torch.backends.mkl.is_available())


def _csr(rowptr: Tensor, cols: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(
        rowptr, cols.to(rowptr.dtype), values, size=shape, check_invariants=False, requires_grad=False
    )


def _silence_csr_warning() -> None:
    """Triggers, with warnings off, the one warning of torch that CSR is in beta, on which no user could act."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _csr(torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), (0, 0))


_silence_csr_warning()
