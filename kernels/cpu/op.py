"""The C++ kernel as a torch operator, so that inference mode and ``torch.compile`` take it as a whole."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..counter import record
from .library import ISAS, Absent, Layer, find
from .operands import panel_bytes

SMALL_ROWS = 32
"""Rows of x up to which a product is one of a small batch, and not of a prompt. Only the name depends on it: a row
has the same bits on every path."""

_SCHEMA = (
    "(Tensor x, Tensor base, Tensor[] sheets, Tensor[] alphas, Tensor? bias, int out_features, int bits, "
    "int group_size, str isa='', bool wide=False) -> Tensor"
)


def operator() -> Any:
    """``torch.ops.lm_ortho.cpu_linear``, registered at the first call.

    Not at import: transformers imports whatever is called ``kernels`` on the path, and in a checkout that is this
    folder, which must not register the operator a second time.
    """
    if not _libraries:
        library = torch.library.Library("lm_ortho", "FRAGMENT")
        library.define("cpu_linear" + _SCHEMA)
        library.impl("cpu_linear", cpu_linear, "CPU")
        torch.library.register_fake("lm_ortho::cpu_linear", _shape_only, lib=library)
        _libraries.append(library)
    return torch.ops.lm_ortho.cpu_linear


_libraries: list[torch.library.Library] = []
"""Registrations end with the object that made them."""


def path_of(rows: int) -> str:
    """``decode`` (one row), ``small`` (up to 32) or ``prefill``."""
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
    Raises ``ValueError`` for operands that do not fit and ``RuntimeError`` where the kernel cannot run.
    """
    return bound(x, base, sheets, alphas, bias, out_features, bits, group_size, isa, wide)(x)


def bound(
    x: Tensor,
    base: Tensor,
    sheets: Sequence[Tensor],
    alphas: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
    isa: str = "",
    wide: bool = False,
) -> Callable[[Tensor], Tensor]:
    """``cpu_linear`` for every further tensor like ``x`` (..., in_features), everything but it made ready and checked.

    Beside a product of 300 microseconds the interpreter counts: its data are not in the caches any more when a layer
    has read its weights through them.
    """
    library, in_features = find(), x.shape[-1]
    if isinstance(library, Absent):
        raise RuntimeError(f"the CPU kernel is not there: {library.why}")
    isa = isa or library.isa
    _check(x.reshape(-1, in_features), base, sheets, alphas, bias, out_features, bits, group_size)
    shift = None if bias is None else bias.to(torch.float32).contiguous()
    blobs, numbers, strides = _pointers(sheets, alphas)
    layer = Layer(
        ISAS.index(isa), 2 if bits == 8 else 1, len(sheets), int(wide), in_features, out_features, group_size,
        base.data_ptr(), None if shift is None else shift.data_ptr(),
        *(ctypes.cast(array, ctypes.c_void_p) for array in (blobs, numbers, strides)),
    )  # fmt: skip
    owned = (layer, base, sheets, alphas, shift, blobs, numbers, strides)
    place, product, threads = ctypes.addressof(layer), library.functions.lm_ortho_layer, torch.get_num_threads
    shape, rows = (*x.shape[:-1], out_features), x.numel() // max(1, in_features)
    path, dtype = f"cpu.{path_of(rows)}", torch.float32 if wide else torch.bfloat16

    def run(x: Tensor, owned: Any = owned) -> Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty(shape, dtype=dtype)
        status = product(place, threads(), rows, x.data_ptr(), y.data_ptr())
        if status:
            raise RuntimeError(f"CPU kernel: {f'no {isa} here' if status == 1 else 'out of memory'}")
        record(path)
        return y

    return run


def _pointers(sheets: Sequence[Tensor], alphas: Sequence[Tensor]) -> tuple[Any, Any, Any]:
    """C arrays of the addresses of sheets and alphas, and of the steps from one alpha to the next."""
    count = len(sheets)
    pointers = ctypes.c_void_p * count
    return (
        pointers(*(sheet.data_ptr() for sheet in sheets)),
        pointers(*(alpha.data_ptr() for alpha in alphas)),
        (ctypes.c_int64 * count)(*(int(alpha.numel() > 1) for alpha in alphas)),
    )


def _check(
    x: Tensor,
    base: Tensor,
    sheets: Sequence[Tensor],
    alphas: Sequence[Tensor],
    bias: Tensor | None,
    out_features: int,
    bits: int,
    group_size: int,
) -> None:
    """A wrong size would be read as it is, outside the tensor."""
    rows, in_features = x.shape
    n_panels, n_groups = -(-out_features // 64), -(-in_features // group_size)
    if x.dtype != torch.bfloat16:
        raise ValueError(f"x must be bfloat16, not {x.dtype}")
    if base.numel() != n_panels * panel_bytes(n_groups, bits, group_size) or base.data_ptr() % 64:
        raise ValueError(f"a packed base of {base.numel()} bytes does not fit ({out_features}, {in_features})")
    if len(sheets) != len(alphas):
        raise ValueError(f"{len(sheets)} ortho streams but {len(alphas)} alphas")
    for alpha in alphas:
        if alpha.dtype != torch.float32 or alpha.numel() not in (1, rows) or not alpha.is_contiguous():
            raise ValueError(f"alpha of {alpha.dtype} {tuple(alpha.shape)} for {rows} rows")
    if bias is not None and bias.shape != (out_features,):
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
