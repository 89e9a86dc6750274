"""Which implementation runs a product, and why.

An implementation is an object with the methods of ``Implementation``, registered under its name. ``auto`` takes the
first that neither refuses nor declines, in the order of ``PREFERENCE``; a name takes that one, or the reference where
it refuses, which is said once.
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
"""What ``kernel=`` may be."""


class Ask(NamedTuple):
    """What is to be multiplied: all that an implementation may base its refusal on.

    ``rows`` are those of x flattened to a matrix, ``bits`` and ``group_size`` those of the base stream, ``dtype`` that
    of x. ``grad``: the result has to be differentiable.
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
    def of(cls, x: Tensor, out_features: int, bits: int, group_size: int) -> Ask:
        """The question that ``x`` (..., in_features) puts to a layer."""
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
            autocast=not x.is_meta and torch.is_autocast_enabled(x.device.type),  # meta has none to ask about
        )


class StoredBase(NamedTuple):
    """The base stream as a checkpoint has it; ``scales`` None: ``qweight`` is the BF16 matrix itself (16 bits)."""

    qweight: Tensor
    scales: Tensor | None
    bits: int
    group_size: int
    in_features: int


class StoredOrtho(NamedTuple):
    """One ortho stream as a checkpoint has it, CSR."""

    rowptr: Tensor
    cols: Tensor
    vals: Tensor
    in_features: int


class Implementation(Protocol):
    """One way to compute the product. Operands are made once per layer and dtype, and kept by the layer."""

    name: str

    def refuses(self, ask: Ask) -> str | None:
        """Why it cannot do this, or None. Asked once for each question; may compile."""

    def declines(self, ask: Ask) -> str | None:
        """Why ``auto`` should not pick it although it could, or None. Asked before ``refuses``; compiles nothing."""

    def base(self, stored: StoredBase, dtype: torch.dtype) -> Any:
        """The base stream made ready for x of ``dtype``."""

    def ortho(self, stored: StoredOrtho, dtype: torch.dtype) -> Any:
        """An ortho stream made ready for x of ``dtype``."""

    def linear(
        self, x: Tensor, base: Any, terms: Sequence[tuple[Any, float | Tensor]], bias: Tensor | None, ask: Ask
    ) -> Tensor:
        """``(..., out_features)`` in the dtype of x.

        ``terms``: ortho operands whose alpha is not 0, each with one number, or one per entry of the first dimension
        of x. No terms: no sparse work at all.
        """

    def bind(
        self, x: Tensor, base: Any, terms: Sequence[tuple[Any, float]], bias: Tensor | None, ask: Ask
    ) -> Callable[[Tensor], Tensor]:
        """``linear`` as a function of x alone, for further x of the same shape, dtype and device; not for tracing."""


class Choice(NamedTuple):
    """The implementation that runs, and why it and no other."""

    implementation: Implementation
    reason: str


_known: dict[str, Implementation] = {}
_said: set[tuple[str, str]] = set()
_decided: dict[tuple[str, Ask], Choice] = {}
_MOST_DECISIONS = 4096
"""Prompts of many lengths ask many questions; past so many the answers are found again."""
_lock = threading.Lock()
epoch = 0
"""Grows when decisions made so far may not hold any more."""


def register(implementation: Implementation) -> None:
    """Makes an implementation known. Raises ``ValueError`` for a name that is not in ``PREFERENCE`` or is taken."""
    name = implementation.name
    if name not in PREFERENCE:
        raise ValueError(f"kernel {name!r} has no place in the order {', '.join(PREFERENCE)}")
    if name in _known:
        raise ValueError(f"kernel {name!r} is registered already")
    _known[name] = implementation
    forget_decisions()


def choose(wanted: str, ask: Ask) -> Choice:
    """What runs ``ask``; decided once. Raises ``ValueError`` for a name that is not in ``KERNELS``."""
    decided = _decided.get((wanted, ask))
    if decided is not None:
        return decided
    if wanted not in KERNELS:
        raise ValueError(f"kernel={wanted!r} is unknown; known: {', '.join(KERNELS)}")
    if len(_decided) >= _MOST_DECISIONS:
        _decided.clear()
    made = _decided[wanted, ask] = _decide(wanted, ask)
    return made


def _decide(wanted: str, ask: Ask) -> Choice:
    if wanted == REFERENCE:
        return Choice(_known[REFERENCE], "as asked")
    return _automatic(ask) if wanted == AUTO else _named(wanted, ask)


def _named(wanted: str, ask: Ask) -> Choice:
    implementation = _known.get(wanted)
    refusal = "it is not installed" if implementation is None else implementation.refuses(ask)
    if implementation is not None and refusal is None:
        return Choice(implementation, "as asked")
    _say_once(wanted, refusal or "")
    return Choice(_known[REFERENCE], f"{wanted}: {refusal}")


def _automatic(ask: Ask) -> Choice:
    reasons: list[str] = []
    for name in PREFERENCE:
        implementation = _known.get(name)
        if implementation is None:
            continue
        declined = implementation.declines(ask)
        refused = implementation.refuses(ask) if declined is None else None
        if declined is None and refused is None:
            return Choice(implementation, "; ".join(reasons) or "the fastest here")
        if refused is not None:
            _say_once(name, refused)
        reasons.append(f"{name}: {declined or refused}")
    raise LookupError("no implementation is registered")


def _say_once(name: str, refusal: str) -> None:
    """One line per kernel and reason in the life of a process."""
    with _lock:
        if (name, refusal) in _said:
            return
        _said.add((name, refusal))
    log.warning("kernel %s does not run here, plain PyTorch does: %s", name, refusal)


def forget_decisions() -> None:
    """Every question is decided, and every refusal told, again."""
    global epoch
    with _lock:
        _said.clear()
        _decided.clear()
        epoch += 1
