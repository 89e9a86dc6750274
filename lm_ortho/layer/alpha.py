"""Alpha of a request: a default per model, scopes that override it, and one fixed value while a call runs.

An alpha can be set in three places; a later one overrides an earlier one:

1. the ``Dial`` that all layers of one model share, set by ``set_alpha``;
2. a context variable set by ``alpha_scope``, for this thread or task only;
3. a context variable with the alpha of the model call that is running. It is copied from 1 or 2 once, when
   ``forward`` or ``generate`` is entered, and layers read it first. So a change that is made during a call takes
   effect at the next call, never in the middle of this one.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lm_ortho.dial import check_alpha_value
from lm_ortho.errors import UserError

Number = float | Sequence[float] | Tensor
"""The alpha of one memory: a number, or one per row of the batch."""


@dataclass(frozen=True, eq=False)
class Alpha:
    """One alpha for all rows of a batch, or one per row; all in [0, 1].

    Attributes:
        value: the alpha of all rows; NaN where ``rows`` or ``named`` holds the values.
        rows: (batch,) float32, None where all rows have the same alpha.
        batch: the number of rows that were given, also when all have the same value.
        named: the alpha of each of several memories; those without an entry are at 0. None: all have the same.
    """

    value: float
    rows: Tensor | None = None
    batch: int | None = None
    named: Mapping[str, Alpha] | None = None

    @classmethod
    def parse(cls, value: Number | Mapping[str, Number]) -> Alpha:
        """A checked copy of ``value``: a number, one number per row, or either by memory.

        Raises:
            UserError: for anything else, and for a number outside [0, 1].
        """
        if isinstance(value, Mapping):
            return cls._parse_mapping(value)
        if not isinstance(value, Tensor | list | tuple):
            return cls(_check_number(value))
        try:
            tensor = torch.as_tensor(value).detach()
            has_bool = not isinstance(value, Tensor) and any(isinstance(entry, bool) for entry in value)
            if has_bool or tensor.dtype == torch.bool or tensor.is_complex():
                raise TypeError
            rows = tensor.to("cpu", torch.float32, copy=True)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # also strings, huge numbers, the meta device
            raise _refuse(value) from None
        if rows.dim() == 0:
            return cls(_check_number(float(rows)))
        if rows.dim() != 1 or rows.numel() == 0:
            raise UserError(f"alpha of shape {tuple(rows.shape)}: need one number, or one per row of the batch")
        for row, entry in enumerate(rows.tolist()):
            check_alpha_value(entry, f"alpha of row {row}")
        if bool((rows == rows[0]).all()):
            return cls(float(rows[0]), batch=rows.numel())
        return cls(math.nan, rows, rows.numel())

    @classmethod
    def _parse_mapping(cls, value: Mapping[str, Number]) -> Alpha:
        if not value:
            raise UserError("alpha={} names no memory; give a number, or name:number for each memory")
        if any(isinstance(part, Mapping) for part in value.values()):
            raise UserError("alpha: the alpha of a memory is a number, or one for each row, not another mapping")
        named = {str(name): cls.parse(part) for name, part in value.items()}
        batches = {part.batch for part in named.values() if part.batch is not None}
        if len(batches) > 1:
            raise UserError(f"alpha per row: the memories have different numbers of rows, {sorted(batches)}")
        return cls(math.nan, batch=next(iter(batches), None), named=named)

    def for_memory(self, name: str) -> Alpha:
        """The alpha of one memory."""
        return self if self.named is None else self.named.get(name, ZERO)

    @property
    def reads_ortho(self) -> bool:
        """Whether any row needs an ortho stream."""
        if self.named is not None:
            return any(part.reads_ortho for part in self.named.values())
        return self.rows is not None or self.value != 0.0

    def to_factors(self) -> float | dict[str, float]:
        """One number for all memories, or one for each by name. Raises ``UserError`` for one per row."""
        parts = [self] if self.named is None else list(self.named.values())
        if any(part.batch is not None for part in parts):
            raise UserError("alpha per row: weights have one alpha; give one number, or one for each memory")
        return self.value if self.named is None else {name: part.value for name, part in self.named.items()}

    def to_numbers(self) -> float | Tensor | dict[str, float | Tensor]:
        """The value in the form that ``parse`` accepts: a number, one per row, or either by memory."""
        if self.named is not None:
            return {name: part.value if part.rows is None else part.rows.clone() for name, part in self.named.items()}
        return self.value if self.rows is None else self.rows.clone()


def _check_number(value: Any) -> float:
    """The value as a float. Text and truth values are refused: they would stand for numbers that nobody wrote."""
    try:
        return check_alpha_value(math.nan if isinstance(value, str | bytes | bool) else value)
    except (UserError, OverflowError):
        raise _refuse(value) from None


def _refuse(value: Any) -> UserError:
    return UserError(f"alpha={reprlib.repr(value)} must be a number between 0 (forget) and 1 (remember)")


ZERO = Alpha(0.0)


@dataclass(eq=False)
class Dial:
    """The default alpha that all layers of one model share: that of calls outside any ``alpha_scope``."""

    default: Alpha = field(default_factory=lambda: ZERO)


@dataclass(frozen=True)
class Call:
    """A running call of a model.

    Attributes:
        alpha: the alpha of the whole call.
        scope_alpha: the alpha of the scope in which the call was made, None outside any scope.
        shape: (batch, positions in the batch) of the input, or None where it was not recognised.
        outermost: an object that the calls inside a call share with it, such as the steps of a generation.
    """

    alpha: Alpha
    scope_alpha: Alpha | None
    shape: tuple[int, int] | None
    outermost: object = field(default_factory=object)


_scope_alpha: ContextVar[Alpha | None] = ContextVar("lm_ortho_scope_alpha", default=None)
_running_calls: ContextVar[Mapping[Dial, Call]] = ContextVar("lm_ortho_running_calls", default=MappingProxyType({}))


@contextmanager
def alpha_scope(alpha: Number | Mapping[str, Number]) -> Iterator[None]:
    """Runs the model calls inside the ``with`` block, in this thread or task, with ``alpha``.

    ``alpha`` is a number, or one per row of the batch (``(batch,)``; beams and returned sequences inherit that of
    their row). With several memories a mapping sets each by name, and those it leaves out are at 0.
    Threads started inside do not inherit the scope: they use the default of the model.
    """
    token = _scope_alpha.set(Alpha.parse(alpha))
    try:
        yield
    finally:
        _scope_alpha.reset(token)


@contextmanager
def hold_alpha(dial: Dial, shape: tuple[int, int] | None) -> Iterator[None]:
    """Fixes the alpha of the layers that share ``dial`` while a model call runs.

    A call inside another call of the same model has the alpha of the outer one, unless a scope was opened in
    between (say in a logits processor that calls the same model again): that scope then decides.

    Raises:
        UserError: if alpha has one value per row and the batch has another number of rows.
    """
    calls = _running_calls.get()
    outer = calls.get(dial)
    scope_alpha = _scope_alpha.get()
    if outer is not None and outer.scope_alpha is scope_alpha:
        alpha = outer.alpha
        # Beams and returned sequences repeat the rows of the outer call.
        fits = shape is None or alpha.batch is None or shape[0] % alpha.batch == 0
    else:
        alpha = scope_alpha if scope_alpha is not None else dial.default
        fits = shape is None or alpha.batch in (None, shape[0])
    if not fits:
        raise UserError(f"alpha has {alpha.batch} rows but the batch has {shape[0] if shape else 0}")
    call = Call(alpha, scope_alpha, shape)
    if outer is not None and outer.alpha is alpha:
        call = Call(alpha, scope_alpha, shape, outer.outermost)
    token = _running_calls.set({**calls, dial: call})
    try:
        yield
    finally:
        _running_calls.reset(token)


def bind_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which runs at the alpha of the call that is running now, whenever and in whichever thread it runs.

    Gradient checkpointing computes a part of a forward pass again during the backward pass, when the call and its scope
    have ended; without this, the gradients would be those of another alpha.
    """
    calls = _running_calls.get()

    def run(*args: Any, **kwargs: Any) -> Any:
        token = _running_calls.set(calls)
        try:
            return function(*args, **kwargs)
        finally:
            _running_calls.reset(token)

    return run


def running_call(dial: Dial) -> Call | None:
    """The call that is running now of the model whose layers share ``dial``."""
    return _running_calls.get().get(dial)


def current_alpha(dial: Dial) -> Alpha:
    """The alpha that a layer with this dial uses now."""
    call = _running_calls.get().get(dial)
    if call is not None:
        return call.alpha
    scope_alpha = _scope_alpha.get()
    return scope_alpha if scope_alpha is not None else dial.default


def alpha_per_row(dial: Dial, alpha: Alpha, x: Tensor) -> Tensor:
    """``(x.shape[0],)``: the alpha of each entry of the first dimension of ``x``, on its device.

    The first dimension of ``x`` is the batch, or, if ``x`` is a matrix, all positions of the batch in order.

    Raises:
        UserError: where the rows cannot be told apart, as in a layer that receives only some of the positions.
    """
    if alpha.rows is None or alpha.batch is None:
        return torch.full(x.shape[:1], alpha.value, device=x.device)
    call = _running_calls.get().get(dial)
    if call is None or call.shape is None:
        sizes: tuple[int, ...] = (alpha.batch,)
    else:
        sizes = call.shape[:1] if x.dim() > 2 else call.shape
    if x.dim() < 2 or x.shape[0] not in sizes or x.shape[0] % alpha.batch:
        raise UserError(
            f"alpha per row: a layer got x of shape {tuple(x.shape)}, whose rows are not those of the batch "
            f"({alpha.batch} alphas); use one alpha for the whole batch"
        )
    return alpha.rows.repeat_interleave(x.shape[0] // alpha.batch).to(x.device)
