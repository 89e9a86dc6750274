"""The C++ kernel as a torch operator, which inference mode and ``torch.compile`` treat as one operation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_tensor
from ..counter import record
from .library import ISAS, Layer, raise_for_status, require_library
from .operands import check_sheets, count_planes, panel_bytes

SMALL_ROWS = 32
"""The number of rows of ``x`` up to which a product is counted as a small batch, not as a prompt. Only the counted name
depends on it: a row has the same bits on every path."""

_SCHEMA = (
    "(Tensor x, Tensor base, Tensor[] sheets, Tensor[] alphas, Tensor? bias, int out_features, int bits, "
    "int group_size, str isa='', bool wide=False) -> Tensor"
)


def operator() -> Any:
    """``torch.ops.lm_ortho.cpu_linear``, registered at the first call.

    Not at import: transformers imports any package named ``kernels`` on the path. In a checkout that is this folder,
    which must not register the operator a second time.
    """
    if not _libraries:
        library = torch.library.Library("lm_ortho", "FRAGMENT")
        library.define("cpu_linear" + _SCHEMA)
        library.impl("cpu_linear", cpu_linear, "CPU")
        torch.library.register_fake("lm_ortho::cpu_linear", _shape_only, lib=library)
        _libraries.append(library)
    return torch.ops.lm_ortho.cpu_linear


_libraries: list[torch.library.Library] = []
"""Kept here because a registration ends when its ``Library`` object is deleted."""


def path_name(rows: int) -> str:
    """The name of the path for this number of rows: ``decode`` (1), ``small`` (up to 32) or ``prefill``."""
    return "decode" if rows == 1 else "small" if rows <= SMALL_ROWS else "prefill"


def cpu_linear(
    x: Tensor,
    base: Tensor,
    sheets: list[Tensor],
    alphas: list[Tensor],
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    isa: str = "",
    wide: bool = False,
) -> Tensor:
    """``(rows, out_features)`` BF16, or float32 with ``wide``: the dual-stream product by the C++ kernel.

    ``x`` (rows, in_features) BF16; ``base`` and ``sheets`` from ``operands.py``; ``alphas`` float32, each with one
    number or one per row; ``bias`` (out_features,) of any dtype. ``isa`` forces an instruction set (``ISAS``).
    The parameters are those of the operator's schema, by which torch passes arguments in order.

    Raises:
        ValueError: for operands that do not fit.
        RuntimeError: where the kernel cannot run.
    """
    form = {"out_features": out_features, "bits": bits, "group_size": group_size}
    return bind_linear(x, base, sheets, alphas, bias, **form, isa=isa, wide=wide)(x)


def bind_linear(
    x: Tensor,
    base: Tensor,
    sheets: Sequence[Tensor],
    alphas: Sequence[Tensor],
    bias: Tensor | None,
    *,
    out_features: int,
    bits: int,
    group_size: int,
    isa: str = "",
    wide: bool = False,
) -> Callable[[Tensor], Tensor]:
    """``cpu_linear`` as a function of ``x`` alone, with all other arguments prepared and checked once.

    The function takes tensors of the shape of ``x`` (..., in_features). The time of the interpreter matters beside a
    product of 300 microseconds: its data have left the caches when a layer has read its weights through them.
    """
    library, in_features = require_library(), x.shape[-1]
    rows = x.numel() // max(1, in_features)
    isa = isa or library.isa
    form = {"out_features": out_features, "bits": bits, "group_size": group_size}
    _check(x.reshape(-1, in_features), base, sheets, alphas, bias, **form)
    float_bias = None if bias is None else bias.to(torch.float32).contiguous()
    sheet_pointers, sheet_bytes, alpha_pointers, strides = _pointers(sheets, alphas)
    layer = Layer(
        isa=ISAS.index(isa),
        planes=count_planes(bits),
        n_terms=len(sheets),
        y_float=int(wide),
        rows=rows,
        in_features=in_features,
        out_features=out_features,
        group=group_size,
        y_values=rows * out_features,
        base_bytes=base.numel(),
        base=base.data_ptr(),
        bias=None if float_bias is None else float_bias.data_ptr(),
        sheets=ctypes.cast(sheet_pointers, ctypes.c_void_p),
        sheet_bytes=ctypes.cast(sheet_bytes, ctypes.c_void_p),
        alphas=ctypes.cast(alpha_pointers, ctypes.c_void_p),
        strides=ctypes.cast(strides, ctypes.c_void_p),
    )
    references = (layer, base, sheets, alphas, float_bias, sheet_pointers, sheet_bytes, alpha_pointers, strides)
    address, product, threads = ctypes.addressof(layer), library.functions.lm_ortho_layer, torch.get_num_threads
    shape = (*x.shape[:-1], out_features)
    path, dtype = f"cpu.{path_name(rows)}", torch.float32 if wide else torch.bfloat16

    def run(x: Tensor, references: Any = references) -> Tensor:  # the default keeps the tensors alive
        if not x.is_contiguous():
            x = x.contiguous()
        if x.dtype is not torch.bfloat16:
            raise ValueError(f"x must be bfloat16, not {x.dtype}")
        y = x.new_empty(shape, dtype=dtype)
        status = product(address, threads(), x.data_ptr(), x.numel(), y.data_ptr())
        if status:
            raise_for_status(status)
        record(path)
        return y

    return run


def _pointers(sheets: Sequence[Tensor], alphas: Sequence[Tensor]) -> tuple[Any, Any, Any, Any]:
    """C arrays of addresses and sizes of sheets, addresses of alphas, and the stride of each alpha (0: one number)."""
    count = len(sheets)
    pointers = ctypes.c_void_p * count
    return (
        pointers(*(sheet.data_ptr() for sheet in sheets)),
        (ctypes.c_int64 * count)(*(sheet.numel() for sheet in sheets)),
        pointers(*(alpha.data_ptr() for alpha in alphas)),
        (ctypes.c_int64 * count)(*(int(alpha.numel() > 1) for alpha in alphas)),
    )


def _check(
    x: Tensor,
    base: Tensor,
    sheets: Sequence[Tensor],
    alphas: Sequence[Tensor],
    bias: Tensor | None,
    *,
    out_features: int,
    bits: int,
    group_size: int,
) -> None:
    """Raises ``ValueError`` for operands that do not fit: the kernel would read outside a tensor of a wrong size."""
    rows, in_features = x.shape
    n_panels, n_groups = -(-out_features // 64), -(-in_features // group_size)
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        raise ValueError(f"x must be bfloat16 on the CPU, not {x.dtype} on {x.device}")
    check_tensor("base", base, (torch.uint8,), (base.numel(),))
    if (
        base.device.type != "cpu"
        or base.numel() != n_panels * panel_bytes(n_groups, bits, group_size)
        or base.data_ptr() % 64
    ):
        raise ValueError(f"a packed base of {base.numel()} bytes does not fit ({out_features}, {in_features})")
    if len(sheets) != len(alphas):
        raise ValueError(f"{len(sheets)} ortho streams but {len(alphas)} alphas")
    for alpha in alphas:
        if (
            alpha.device.type != "cpu"
            or alpha.dtype != torch.float32
            or alpha.numel() not in (1, rows)
            or not alpha.is_contiguous()
        ):
            raise ValueError(f"alpha of {alpha.dtype} {tuple(alpha.shape)} for {rows} rows")
    for sheet in sheets:
        check_sheets(sheet, out_features, in_features)
    if bias is not None and (bias.shape != (out_features,) or bias.device.type != "cpu"):
        raise ValueError(f"bias of shape {tuple(bias.shape)} for {out_features} out_features")


def _shape_only(
    x: Tensor,
    base: Tensor,
    sheets: list[Tensor],
    alphas: list[Tensor],
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    isa: str = "",
    wide: bool = False,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features), dtype=torch.float32 if wide else torch.bfloat16)
