"""Selection of the implementation of a product, with the reason for it.

An implementation is an object with the methods of ``Implementation``, registered under its name. ``auto`` selects the
first one that neither refuses nor declines, in the order of ``PREFERENCE``. A name selects that implementation, or
the reference kernel if it refuses, which is logged once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

AUTO = "auto"
REFERENCE = "reference"
PREFERENCE = ("triton", "cpu", REFERENCE)
KERNELS = (AUTO, REFERENCE, "cpu", "triton")
"""The values of ``kernel=``."""


class ProductSpec(NamedTuple):
    """Description of a product: all that the choice of an implementation may depend on.

    Attributes:
        device: device type of ``x``.
        dtype: dtype of ``x``.
        rows: rows of ``x``, flattened to a matrix.
        out_features: rows of the weight.
        in_features: columns of the weight.
        bits: bits of the base stream.
        group_size: weights per scale of the base stream.
        grad: whether the result must be differentiable.
        autocast: whether autocast is on for the device.
    """

    device: str
    dtype: torch.dtype
    rows: int
    out_features: int
    in_features: int
    bits: int
    group_size: int
    grad: bool = False
    autocast: bool = False

    @classmethod
    def from_input(cls, x: Tensor, out_features: int, bits: int, group_size: int) -> ProductSpec:
        """The description of the product of a layer with ``x`` (..., in_features)."""
        in_features = x.shape[-1]
        return cls(
            device=x.device.type,
            dtype=x.dtype,
            rows=x.numel() // max(1, in_features),
            out_features=out_features,
            in_features=in_features,
            bits=bits,
            group_size=group_size,
            grad=torch.is_grad_enabled() and x.requires_grad,
            autocast=not x.is_meta and torch.is_autocast_enabled(x.device.type),  # there is none for meta
        )


class StoredBase(NamedTuple):
    """The base stream as stored in a checkpoint; if ``scales`` is None, ``qweight`` is the BF16 matrix (16 bits)."""

    qweight: Tensor
    scales: Tensor | None
    bits: int
    group_size: int
    in_features: int


class StoredOrtho(NamedTuple):
    """One ortho stream as stored in a checkpoint, in CSR form."""

    rowptr: Tensor
    cols: Tensor
    vals: Tensor
    in_features: int


class Implementation(Protocol):
    """One way to compute the product. The layer makes operands once per dtype and caches them."""

    name: str

    def refuses(self, spec: ProductSpec) -> str | None:
        """The reason why it cannot compute this product, or None. Called once for each ``spec``; may compile."""

    def declines(self, spec: ProductSpec) -> str | None:
        """The reason why ``auto`` should not select it although it could, or None.

        Called before ``refuses``; compiles nothing.
        """

    def base(self, stored: StoredBase, dtype: torch.dtype) -> Any:
        """The operand of the base stream for ``x`` of ``dtype``."""

    def ortho(self, stored: StoredOrtho, dtype: torch.dtype) -> Any:
        """The operand of an ortho stream for ``x`` of ``dtype``."""

    def merge(self, base: StoredBase, terms: Sequence[tuple[StoredOrtho, float]], dtype: torch.dtype) -> Any | None:
        """The operand of W(alpha) as one matrix, which ``linear`` and ``bind`` take as ``base`` without ``terms``.

        None if the implementation reads the two streams in any case. The layer keeps one such operand, that of the
        alpha used last.
        """

    def linear(
        self, x: Tensor, base: Any, terms: Sequence[tuple[Any, float | Tensor]], bias: Tensor | None, spec: ProductSpec
    ) -> Tensor:
        """The product, ``(..., out_features)`` in the dtype of ``x``.

        ``terms`` are the ortho operands whose alpha is not 0, each with one number, or one per entry of the first
        dimension of ``x``. Without terms no sparse work is done.
        """

    def bind(
        self, x: Tensor, base: Any, terms: Sequence[tuple[Any, float]], bias: Tensor | None, spec: ProductSpec
    ) -> Callable[[Tensor], Tensor]:
        """``linear`` as a function of ``x`` alone, for tensors of the same shape, dtype and device; not for tracing."""


class Choice(NamedTuple):
    """The selected implementation, and the reason for it."""

    implementation: Implementation
    reason: str


_implementations: dict[str, Implementation] = {}
_logged_refusals: set[tuple[str, str]] = set()
_choices: dict[tuple[str, ProductSpec], Choice] = {}
_MAX_CHOICES = 4096
"""Prompts of many lengths lead to many choices; beyond this number they are dropped and made again."""
_lock = threading.Lock()
epoch = 0
"""Counts the times when earlier choices became invalid."""


def register(implementation: Implementation) -> None:
    """Registers an implementation. Raises ``ValueError`` for a name not in ``PREFERENCE`` or registered already."""
    name = implementation.name
    if name not in PREFERENCE:
        raise ValueError(f"kernel {name!r} has no place in the order {', '.join(PREFERENCE)}")
    if name in _implementations:
        raise ValueError(f"kernel {name!r} is registered already")
    _implementations[name] = implementation
    forget_choices()


def choose(kernel: str, spec: ProductSpec) -> Choice:
    """Selects the implementation of a product, once for each ``spec``.

    Raises:
        ValueError: for a name that is not in ``KERNELS``.
    """
    choice = _choices.get((kernel, spec))
    if choice is not None:
        return choice
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r} is unknown; known: {', '.join(KERNELS)}")
    if len(_choices) >= _MAX_CHOICES:
        _choices.clear()
    choice = _choices[kernel, spec] = _choose_uncached(kernel, spec)
    return choice


def _choose_uncached(kernel: str, spec: ProductSpec) -> Choice:
    if kernel == REFERENCE:
        return Choice(_implementations[REFERENCE], "as requested")
    return _choose_automatically(spec) if kernel == AUTO else _choose_by_name(kernel, spec)


def _choose_by_name(kernel: str, spec: ProductSpec) -> Choice:
    implementation = _implementations.get(kernel)
    refusal = "it is not installed" if implementation is None else implementation.refuses(spec)
    if implementation is not None and refusal is None:
        return Choice(implementation, "as requested")
    _log_once(kernel, refusal or "")
    return Choice(_implementations[REFERENCE], f"{kernel}: {refusal}")


def _choose_automatically(spec: ProductSpec) -> Choice:
    reasons: list[str] = []
    for name in PREFERENCE:
        implementation = _implementations.get(name)
        if implementation is None:
            continue
        objection = implementation.declines(spec)
        refusal = implementation.refuses(spec) if objection is None else None
        if objection is None and refusal is None:
            return Choice(implementation, "; ".join(reasons) or "the fastest here")
        if refusal is not None:
            _log_once(name, refusal)
        reasons.append(f"{name}: {objection or refusal}")
    raise LookupError("no implementation is registered")


def _log_once(name: str, refusal: str) -> None:
    """Logs a refusal, once per kernel and reason in a process."""
    with _lock:
        if (name, refusal) in _logged_refusals:
            return
        _logged_refusals.add((name, refusal))
    log.warning("kernel %s does not run here, the reference kernel (plain PyTorch) does: %s", name, refusal)


def forget_choices() -> None:
    """Drops all choices, and allows every refusal to be logged again."""
    global epoch
    with _lock:
        _logged_refusals.clear()
        _choices.clear()
        epoch += 1
