"""The compiled library: loaded or compiled at first use, or the reason why it is missing."""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from . import build
from .pages import reserve

ABI = 3
ISAS = ("scalar", "avx2", "avx512_bf16")
"""Instruction sets, at the index by which the library identifies them."""
SWITCH = "LM_ORTHO_CPU_KERNEL"
"""Environment variable: ``off``, or the widest instruction set to use."""
REASONS = {
    1: "this processor lacks the instruction set",
    2: "out of memory",
    3: "an array has another size than the layer needs",
    4: "rowptr must rise from 0 to the number of stored values",
    5: "cols must lie in [0, in_features) and increase within each row",
    6: "the packed ortho stream belongs to another matrix or was overwritten",
    7: "the ortho stream is too large for the CPU kernel",
}
"""What a status other than 0 means; the names are in ``dual_stream.h``."""
_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class Layer(ctypes.Structure):
    """``LmOrthoLayer`` of ``api.cpp``: the operands of a product, for ``lm_ortho_layer``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("isa", "planes", "n_terms", "y_float")),
        *((name, _LONG) for name in ("rows", "in_features", "out_features", "group", "base_bytes", "y_values")),
        *((name, _POINTER) for name in ("base", "bias", "sheets", "sheet_bytes", "alphas", "strides")),
    )


@dataclass(frozen=True)
class Library:
    """The functions of the library, and the widest instruction set that this processor has and the user allows."""

    path: Path
    functions: ctypes.CDLL
    isa: str

    @property
    def isas(self) -> tuple[str, ...]:
        """Every instruction set that can be used here, the narrowest first."""
        return ISAS[: ISAS.index(self.isa) + 1]


@dataclass(frozen=True)
class MissingLibrary:
    """The result of ``find`` without a library; ``reason`` is one line."""

    reason: str


_lock = threading.Lock()
_library: Library | MissingLibrary | None = None


def find() -> Library | MissingLibrary:
    """The library, loaded once per process; compiled if neither the wheel nor the cache has it."""
    global _library
    if _library is not None:
        return _library
    with _lock:
        if _library is None:
            _library = _load()
        return _library


def forget() -> None:
    """Makes the next ``find`` load the library again."""
    global _library
    with _lock:
        _library = None


def _load() -> Library | MissingLibrary:
    limit = os.environ.get(SWITCH, "").strip().lower()
    if limit == "off":
        return MissingLibrary(f"{SWITCH}=off")
    if limit and limit not in ISAS:
        return MissingLibrary(f"{SWITCH}={limit} is unknown; known: off, {', '.join(ISAS)}")
    try:
        bundled_path = build.HERE / build.BUNDLED
        path = bundled_path if bundled_path.is_file() else build.cached_library()
        functions = ctypes.CDLL(str(path))
        _declare(functions)
    except build.BuildError as error:
        return MissingLibrary(str(error))
    except (OSError, AttributeError) as error:
        return MissingLibrary(f"the library cannot be loaded: {error}")
    if functions.lm_ortho_abi() != ABI:
        return MissingLibrary(f"{path} belongs to another version; reinstall lm-ortho")
    widest = int(functions.lm_ortho_isa())
    return Library(path, functions, ISAS[min(widest, ISAS.index(limit)) if limit else widest])


def _declare(functions: ctypes.CDLL) -> None:
    """Declares the types of the functions of ``api.cpp`` and ``pack.cpp``."""
    functions.lm_ortho_abi.argtypes = []
    functions.lm_ortho_isa.argtypes = []
    functions.lm_ortho_layer.argtypes = [_POINTER, _INT, _POINTER, _LONG, _POINTER]
    functions.lm_ortho_read_speed.argtypes = [_POINTER, _LONG]
    functions.lm_ortho_read_speed.restype = ctypes.c_double
    sized, shape = (_POINTER, _LONG), (_LONG, _LONG)
    functions.lm_ortho_pack_base.argtypes = [*sized, *sized, *shape, _LONG, _INT, *sized]
    functions.lm_ortho_make_sheets.argtypes = [_POINTER, _INT, _POINTER, _POINTER, *shape, _LONG, _POINTER, _POINTER]
    functions.lm_ortho_take_sheets.argtypes = [_POINTER, *sized]
    functions.lm_ortho_check_sheets.argtypes = [*sized, *shape]


def raise_for_status(status: int) -> None:
    """Raises for a status other than 0: ``ValueError`` for operands that do not fit, else ``RuntimeError``."""
    if status:
        error = RuntimeError if status in (1, 2) else ValueError
        raise error(f"CPU kernel: {REASONS.get(status, f'status {status}')}")


def read_speed(megabytes: int = 256) -> float:
    """Bytes per second that one thread reads from memory, the best of five. Raises ``RuntimeError`` without library."""
    buffer = reserve(megabytes << 20).fill_(1)
    functions = require_library().functions
    return max(functions.lm_ortho_read_speed(buffer.data_ptr(), buffer.numel()) for _ in range(5))


def product_speed() -> float | None:
    """BF16 multiply-adds per second of one thread, the best of five; None without AVX-512 BF16."""
    library = require_library()
    if library.isa != ISAS[2]:
        return None
    probe = library.functions.lm_ortho_product_speed
    probe.argtypes, probe.restype = [], ctypes.c_double
    return max(probe() for _ in range(5))


def require_library() -> Library:
    """The library. Raises ``RuntimeError`` with the reason why it is missing."""
    library = find()
    if isinstance(library, MissingLibrary):
        raise RuntimeError(f"the CPU kernel is not available: {library.reason}")
    return library
