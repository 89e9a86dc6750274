"""The compiled library: found or compiled at first use, and why it is not there where it is not."""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from . import build
from .pages import reserve

ABI = 2
ISAS = ("scalar", "avx2", "avx512_bf16")
"""Instruction sets by the number that the library knows them by."""
SWITCH = "LM_ORTHO_CPU_KERNEL"
"""Environment variable: ``off``, or the widest instruction set to use."""
_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class Layer(ctypes.Structure):
    """``LmOrthoLayer`` of ``api.cpp``: the operands of a product, for ``lm_ortho_layer``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("isa", "planes", "n_terms", "y_float")),
        *((name, _LONG) for name in ("in_features", "out_features", "group")),
        *((name, _POINTER) for name in ("base", "bias", "sheets", "alphas", "strides")),
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
class Absent:
    """There is no library, and ``why`` in one line."""

    why: str


_lock = threading.Lock()
_found: Library | Absent | None = None


def find() -> Library | Absent:
    """The library, loaded once per process; compiled where neither the wheel nor the cache has it."""
    global _found
    if _found is not None:
        return _found
    with _lock:
        if _found is None:
            _found = _load()
        return _found


def forget() -> None:
    """The next ``find`` looks again."""
    global _found
    with _lock:
        _found = None


def _load() -> Library | Absent:
    asked = os.environ.get(SWITCH, "").strip().lower()
    if asked == "off":
        return Absent(f"{SWITCH}=off")
    if asked and asked not in ISAS:
        return Absent(f"{SWITCH}={asked} is unknown; known: off, {', '.join(ISAS)}")
    try:
        bundled = build.HERE / build.BUNDLED
        path = bundled if bundled.is_file() else build.cached_library()
        functions = ctypes.CDLL(str(path))
        _declare(functions)
    except build.BuildError as error:
        return Absent(str(error))
    except (OSError, AttributeError) as error:
        return Absent(f"the library cannot be loaded: {error}")
    if functions.lm_ortho_abi() != ABI:
        return Absent(f"{path} belongs to another version; reinstall lm-ortho")
    widest = int(functions.lm_ortho_isa())
    return Library(path, functions, ISAS[min(widest, ISAS.index(asked)) if asked else widest])


def _declare(functions: ctypes.CDLL) -> None:
    """Types of the functions of ``api.cpp`` and ``pack.cpp``."""
    functions.lm_ortho_abi.argtypes = []
    functions.lm_ortho_isa.argtypes = []
    functions.lm_ortho_layer.argtypes = [_POINTER, _INT, _LONG, _POINTER, _POINTER]
    functions.lm_ortho_read_speed.argtypes = [_POINTER, _LONG]
    functions.lm_ortho_read_speed.restype = ctypes.c_double
    functions.lm_ortho_pack_base.argtypes = [_POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _POINTER]
    functions.lm_ortho_pack_base.restype = None
    functions.lm_ortho_make_sheets.argtypes = [_POINTER, _INT, _POINTER, _POINTER, _LONG, _POINTER]
    functions.lm_ortho_make_sheets.restype = _POINTER
    functions.lm_ortho_take_sheets.argtypes = [_POINTER, _POINTER]
    functions.lm_ortho_take_sheets.restype = None


def read_speed(megabytes: int = 256) -> float:
    """Bytes per second that one thread reads from memory, the best of five. Raises ``RuntimeError`` without library."""
    room = reserve(megabytes << 20).fill_(1)
    return max(_present().functions.lm_ortho_read_speed(room.data_ptr(), room.numel()) for _ in range(5))


def product_speed() -> float | None:
    """BF16 multiply-adds per second of one thread, the best of five; None without AVX-512 BF16."""
    found = _present()
    if found.isa != ISAS[2]:
        return None
    probe = found.functions.lm_ortho_product_speed
    probe.argtypes, probe.restype = [], ctypes.c_double
    return max(probe() for _ in range(5))


def _present() -> Library:
    found = find()
    if isinstance(found, Absent):
        raise RuntimeError(f"the CPU kernel is not there: {found.why}")
    return found
