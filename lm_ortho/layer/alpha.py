"""Alpha as a property of a request: a default per model, scopes over it, one value while a call runs.

Three places hold an alpha, the later ones win:

1. the ``Dial`` all layers of one model share: ``set_alpha`` turns it;
2. a context variable that ``alpha_scope`` sets, for this thread or task only;
3. a context variable with the alpha of the model call that is running. It is read from 1 or 2 once, when
   ``forward`` or ``generate`` is entered, and the layers look here first, so that a change made elsewhere
   meanwhile is seen by the next call and never by half of this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NoReturn

import torch
from torch import Tensor

from lm_ortho.errors import UserError

Number = float | Sequence[float] | Tensor
"""What one dial is set to: a number, or one per row of the batch."""


@dataclass(frozen=True, eq=False)
class Alpha:
    """One alpha for all rows of a batch (``rows`` None), or one for each; all in [0, 1].

    ``batch`` is the number of rows asked for, also when they all ask for the same value. ``named`` sets each of
    several memories by itself; those it does not name stay at 0. Without it every memory has the same alpha.
    """

    value: float
    rows: Tensor | None = None
    batch: int | None = None
    named: Mapping[str, Alpha] | None = None

    @classmethod
    def of(cls, value: Number | Mapping[str, Number]) -> Alpha:
        """A checked copy of ``value``: a number, one number per row, or either by memory. Raises ``UserError``."""
        if isinstance(value, Mapping):
            return cls._by_memory(value)
        if not isinstance(value, Tensor | list | tuple):
            return cls(_number(value))
        try:
            rows = torch.as_tensor(value).detach().to("cpu", torch.float32, copy=True)
        except (TypeError, ValueError, RuntimeError):
            _refuse(value)
        if rows.dim() == 0:
            return cls(_number(float(rows)))
        if rows.dim() != 1 or rows.numel() == 0:
            raise UserError(f"alpha of shape {tuple(rows.shape)}: need one number, or one per row of the batch")
        for entry in rows.tolist():
            _number(entry)
        if bool((rows == rows[0]).all()):
            return cls(float(rows[0]), batch=rows.numel())
        return cls(math.nan, rows, rows.numel())

    @classmethod
    def _by_memory(cls, value: Mapping[str, Number]) -> Alpha:
        if not value:
            raise UserError("alpha={} names no memory; give a number, or name:number for each memory")
        if any(isinstance(part, Mapping) for part in value.values()):
            raise UserError("alpha: the alpha of a memory is a number, or one for each row, not another mapping")
        named = {str(name): cls.of(part) for name, part in value.items()}
        batches = {part.batch for part in named.values() if part.batch is not None}
        if len(batches) > 1:
            raise UserError(f"alpha per row: the memories have different numbers of rows, {sorted(batches)}")
        return cls(math.nan, batch=next(iter(batches), None), named=named)

    def of_memory(self, name: str) -> Alpha:
        """The alpha of one memory."""
        return self if self.named is None else self.named.get(name, ZERO)

    @property
    def reads_ortho(self) -> bool:
        """Whether any row needs an ortho stream."""
        if self.named is not None:
            return any(part.reads_ortho for part in self.named.values())
        return self.rows is not None or self.value != 0.0

    def factors(self) -> float | dict[str, float]:
        """One number for all memories, or one by name. Raises ``UserError`` for one per row."""
        parts = [self] if self.named is None else list(self.named.values())
        if any(part.batch is not None for part in parts):
            raise UserError("alpha per row: weights have one alpha; give one number, or one for each memory")
        return self.value if self.named is None else {name: part.value for name, part in self.named.items()}

    def plain(self) -> float | Tensor | dict[str, float | Tensor]:
        """What was asked for, as numbers."""
        if self.named is not None:
            return {name: part.value if part.rows is None else part.rows.clone() for name, part in self.named.items()}
        return self.value if self.rows is None else self.rows.clone()


ZERO = Alpha(0.0)


@dataclass(eq=False)
class Dial:
    """What the layers of one model share: the alpha of calls that no scope decides."""

    default: Alpha = field(default_factory=lambda: ZERO)


@dataclass(frozen=True)
class Call:
    """A running call of a model: its alpha, the scope it was taken from, and the shape of its input.

    ``shape`` is (batch, positions in the batch), or None where the input was not recognised.
    """

    alpha: Alpha
    asked: Alpha | None
    shape: tuple[int, int] | None


_asked: ContextVar[Alpha | None] = ContextVar("lm_ortho_asked", default=None)
_running: ContextVar[Mapping[Dial, Call]] = ContextVar("lm_ortho_running", default=MappingProxyType({}))


@contextmanager
def alpha_scope(alpha: Number | Mapping[str, Number]) -> Iterator[None]:
    """Model calls made inside, in this thread or task, run with ``alpha``.

    A number, or one per row of the batch (``(batch,)``; beams and returned sequences inherit their row's). With
    several memories a mapping sets each by name, and those it leaves out are at 0.
    Threads started inside do not inherit the scope: they see the default of the model.
    """
    token = _asked.set(Alpha.of(alpha))
    try:
        yield
    finally:
        _asked.reset(token)


@contextmanager
def running(dial: Dial, shape: tuple[int, int] | None) -> Iterator[None]:
    """The layers of ``dial`` keep one alpha inside: the outer running call's, if there is one.

    A scope opened *inside* a running call (say in a logits processor that asks the same model again) is an
    explicit wish and holds for the calls made in it.
    """
    calls = _running.get()
    outer = calls.get(dial)
    asked = _asked.get()
    if outer is not None and outer.asked is asked:
        alpha = outer.alpha
        fits = shape is None or alpha.batch is None or shape[0] % alpha.batch == 0
    else:
        alpha = asked if asked is not None else dial.default
        fits = shape is None or alpha.batch in (None, shape[0])
    if not fits:
        raise UserError(f"alpha has {alpha.batch} rows but the batch has {shape[0] if shape else 0}")
    token = _running.set({**calls, dial: Call(alpha, asked, shape)})
    try:
        yield
    finally:
        _running.reset(token)


def effective(dial: Dial) -> Alpha:
    """The alpha a layer uses at this moment."""
    call = _running.get().get(dial)
    if call is not None:
        return call.alpha
    asked = _asked.get()
    return asked if asked is not None else dial.default


def rows_for(dial: Dial, alpha: Alpha, x: Tensor) -> Tensor:
    """``(x.shape[0],)``: the alpha of each entry of the first dimension of ``x``, on its device.

    ``x`` has the rows of the batch first, or (as a matrix) all positions of the batch in order. Raises
    ``UserError`` where the rows cannot be told apart, as in a layer that sees only some of the positions.
    """
    if alpha.rows is None or alpha.batch is None:
        return torch.full(x.shape[:1], alpha.value, device=x.device)
    call = _running.get().get(dial)
    known = call.shape if call is not None else None
    sizes = (alpha.batch,) if known is None else known[:1] if x.dim() > 2 else known
    if x.dim() < 2 or x.shape[0] not in sizes or x.shape[0] % alpha.batch:
        raise UserError(
            f"alpha per row: a layer got x of shape {tuple(x.shape)}, whose rows are not those of the batch "
            f"({alpha.batch} alphas); use one alpha for the whole batch"
        )
    return alpha.rows.repeat_interleave(x.shape[0] // alpha.batch).to(x.device)


def _number(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        _refuse(value)
    if not 0.0 <= number <= 1.0:
        _refuse(value)
    return number


def _refuse(value: object) -> NoReturn:
    raise UserError(f"alpha={value!r} must be a number between 0 (forget) and 1 (remember)")
