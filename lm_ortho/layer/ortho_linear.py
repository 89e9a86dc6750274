"""The linear layer on two streams."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_ortho.errors import UserError
from lm_ortho.kernels import AUTO, Ask, Implementation, StoredBase, StoredOrtho, choose, dispatch
from lm_ortho.layer.alpha import Alpha, Dial, effective, rows_for
from lm_ortho.streams import UNNAMED, BaseStream, LayerStreams, OrthoStream

_BASE = ("qweight", "scales", "weight")
_ORTHO = ("ortho_rowptr", "ortho_cols", "ortho_vals")


def ortho_buffers(memory: str) -> tuple[str, str, str]:
    """Names of the buffers that hold the ortho stream of ``memory``: rowptr, cols, vals."""
    rowptr, cols, vals = (part if memory == UNNAMED else part.replace("_", f"_{memory}_", 1) for part in _ORTHO)
    return rowptr, cols, vals


def _memory_of(buffer: str) -> str | None:
    """The memory whose values are in a buffer of this name; None for every other buffer."""
    if buffer == _ORTHO[2]:
        return UNNAMED
    named = buffer.startswith("ortho_") and buffer.endswith("_vals")
    return buffer.removeprefix("ortho_").removesuffix("_vals") if named else None


class OrthoLinear(nn.Module):
    """``y = x W_base^T + bias + alpha * (x W_ortho^T)`` in the dtype of ``x``.

    With several memories there is one such ortho term for each. The streams are buffers under the names they have in
    a checkpoint; the ortho ones are None in a base-only layer. ``absent`` names memories that the checkpoint was
    made with and whose file was not there. The dtypes of streams are part of the format: ``.to(dtype)`` moves them
    but converts only the bias. What is made of them for speed is no part of the state and is left out of copies and
    pickles. ``kernel`` asks for an implementation of the product (``lm_ortho.kernels.KERNELS``).
    """

    qweight: Tensor | None
    scales: Tensor | None
    weight: Tensor | None
    ortho_rowptr: Tensor | None
    ortho_cols: Tensor | None
    ortho_vals: Tensor | None
    bias: Tensor | None
    origin: type[nn.Module] | None = None
    """The class of the ``Conv1D`` that the layer stands for."""
    kernel: str = AUTO
    _operands: dict[tuple[str, str | None], _Operand]
    _bound: dict[torch.Size, _Bound]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int = 4,
        group_size: int = 64,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A base-only layer of zeros, to be filled by a checkpoint; see ``from_streams``."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.dial = Dial()
        self.absent: tuple[str, ...] = ()
        for name, (kind, shape) in BaseStream.layout((out_features, in_features), bits, group_size).items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        for name in _ORTHO:
            self.register_buffer(name, None)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)
        self._forget_operands()

    @classmethod
    def from_streams(cls, streams: LayerStreams, dtype: torch.dtype = torch.float32) -> OrthoLinear:
        """A layer that holds ``streams``, with a bias in ``dtype``."""
        rows, width = streams.shape
        layer = cls(width, rows, streams.base.bits, streams.base.group_size, bias=False, device="meta")
        for name, tensor in streams.base.tensors().items():
            setattr(layer, name, tensor)
        if streams.bias is not None:
            layer.bias = streams.bias.to(dtype)
        for name, ortho in streams.memories.items():
            layer.set_ortho(ortho, name)
        return layer

    @property
    def has_ortho(self) -> bool:
        """Whether there is an ortho stream, be it an empty one."""
        return bool(self.memories)

    @property
    def memories(self) -> tuple[str, ...]:
        """The memories whose ortho streams are here."""
        found = [_memory_of(name) for name, held in self._buffers.items() if held is not None]
        return tuple(sorted(filter(None, found), key=lambda name: name != UNNAMED))

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    def set_ortho(self, ortho: OrthoStream | None, memory: str = UNNAMED) -> None:
        """Gives a memory another ortho stream, or none. Raises ``ValueError`` for another shape."""
        if ortho is not None and ortho.shape != self.shape:
            raise ValueError(f"ortho stream of shape {ortho.shape} for a layer of shape {self.shape}")
        tensors = dict.fromkeys(_ORTHO) if ortho is None else ortho.to(self._device()).tensors()
        for name, part in zip(ortho_buffers(memory), _ORTHO, strict=True):
            self.register_buffer(name, tensors[part])

    def streams(self) -> LayerStreams:
        """The streams the layer holds, checked. Raises ``ValueError`` if a tensor was damaged."""
        stored = {name: self._buffers[name] for name in _BASE if name in self._buffers}
        base = BaseStream(self.shape, self.bits, self.group_size, **stored)
        memories = {name: self._ortho(name) for name in self.memories}
        return LayerStreams(base, memories.pop(UNNAMED, None), self.bias, memories)

    def _ortho(self, memory: str) -> OrthoStream:
        rowptr, cols, vals = (self.get_buffer(name) for name in ortho_buffers(memory))
        return OrthoStream(rowptr, cols, vals, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., out_features)`` in the dtype of ``x`` (..., in_features)."""
        alpha = effective(self.dial)
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta:
            return self._product(x, alpha, Ask.of(x, self.out_features, self.bits, self.group_size))
        bound = self._bound.get(x.shape)
        if bound is not None and bound.fits(self, x, alpha):
            return bound.product(x)
        return self._first(x, alpha)

    def _product(self, x: Tensor, alpha: Alpha, ask: Ask) -> Tensor:
        kernel = choose(self.kernel, ask).implementation
        return kernel.linear(x, self._base_operand(kernel, x.dtype), self._terms(kernel, x, alpha), self._shift(x), ask)

    def _first(self, x: Tensor, alpha: Alpha) -> Tensor:
        """The product, ready to be repeated for tensors of this shape."""
        ask = Ask.of(x, self.out_features, self.bits, self.group_size)
        uncounted = self.bias is not None and self.bias.is_inference()  # nothing would tell that it was written to
        if ask.grad or ask.autocast or alpha.batch is not None or uncounted:
            return self._product(x, alpha, ask)
        buffers = tuple(self._buffers.values())  # taken first: what changes from here on is seen by the next call
        if any(not _same(kept.buffers, buffers) for kept in self._bound.values()):
            self._bound = {}  # or streams that were replaced would be kept alive there
        told = (alpha, self.kernel, x.dtype, x.device, dispatch.epoch, buffers, _versions(buffers))
        kernel = choose(self.kernel, ask).implementation
        terms = self._terms(kernel, x, alpha)
        with torch.inference_mode(False), torch.no_grad():
            product = kernel.bind(x, self._base_operand(kernel, x.dtype), terms, self._shift(x), ask)
        if len(self._bound) >= _MOST_SHAPES:
            self._bound = {}
        self._bound[x.shape] = _Bound(*told, product)
        return product(x)

    def _terms(self, kernel: Implementation, x: Tensor, alpha: Alpha) -> list[tuple[Any, Any]]:
        """Operands of the ortho streams that ``alpha`` reads, each with one number or one per row."""
        terms = list[tuple[Any, float | Tensor]]()
        if alpha.reads_ortho:
            memories = self.memories
            if alpha.named is not None or self.absent or not memories:  # else there is nothing to refuse
                self.check(alpha)
            for name in memories:
                part = alpha.of_memory(name)
                if part.reads_ortho:
                    factor = part.value if part.rows is None else rows_for(self.dial, part, x)
                    terms.append((self._ortho_operand(kernel, x.dtype, name), factor))
        return terms

    def _shift(self, x: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        counts = {name: self.get_buffer(ortho_buffers(name)[2]).numel() for name in self.memories}
        nnz = "+".join(f"{n}" if name == UNNAMED else f"{name}:{n}" for name, n in counts.items()) or "none"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, ortho={nnz}, bias={self.bias is not None}"
        )

    def check(self, alpha: Alpha) -> None:
        """Raises ``UserError`` if ``alpha`` names an unknown memory or needs an ortho stream that is not here."""
        known = (*self.memories, *self.absent)
        wanted = {name: alpha.of_memory(name) for name in alpha.named or known or (UNNAMED,)}
        for name, part in wanted.items():
            if known and name not in known:
                raise UserError(
                    f"alpha={name}:...: the model has no memory {name!r}; it has {', '.join(map(repr, known))}"
                )
            if not part.reads_ortho or name in self.memories:
                continue
            shown = " other than 0" if part.rows is not None else f"={part.value:g}"
            if name in self.absent:
                raise UserError(f"alpha{shown} of {name}: the file of this memory is not here, so 0 is all it can do")
            raise UserError(f"alpha{shown}: this model has only its base stream, so alpha=0 is all it can do")

    def _base_operand(self, kernel: Implementation, dtype: torch.dtype) -> Any:
        held = self._buffers
        stored = (held.get("qweight"), held.get("scales"), held.get("weight"))
        kept = self._operands.get((kernel.name, None))
        if kept is not None and kept.fits(dtype, stored):
            return kept.made
        codes = stored[0] if stored[2] is None else stored[2]
        assert codes is not None
        base = StoredBase(codes, stored[1], self.bits, self.group_size, self.in_features)
        return self._keep((kernel.name, None), lambda: kernel.base(base, dtype), dtype, stored)

    def _ortho_operand(self, kernel: Implementation, dtype: torch.dtype, memory: str) -> Any:
        stored = tuple(map(self.get_buffer, ortho_buffers(memory)))
        kept = self._operands.get((kernel.name, memory))
        if kept is not None and kept.fits(dtype, stored):
            return kept.made
        ortho = StoredOrtho(*stored, self.in_features)
        return self._keep((kernel.name, memory), lambda: kernel.ortho(ortho, dtype), dtype, stored)

    def _keep(
        self,
        key: tuple[str, str | None],
        make: Callable[[], Any],
        dtype: torch.dtype,
        stored: tuple[Tensor | None, ...],
    ) -> Any:
        # A tensor made in inference mode could never take part in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        self._operands[key] = _Operand(made, dtype, stored, _versions(stored))
        self._bound = {}  # or the operand before would be kept alive there
        return made

    def _forget_operands(self) -> None:
        self._operands, self._bound = {}, {}

    def _device(self) -> torch.device:
        return next(buffer.device for name, buffer in self.named_buffers() if name in _BASE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrthoLinear:
        fixed = {id(tensor) for name, tensor in self._buffers.items() if name != "bias"}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in fixed and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        super()._apply(moved, recurse)
        self._forget_operands()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Another decomposition of the same model has another number of non-zeros.
        for key, stored in state_dict.items():
            name = key.removeprefix(prefix)
            if not (key.startswith(f"{prefix}ortho_") and "." not in name and isinstance(stored, Tensor)):
                continue
            held = self._buffers.get(name)
            if held is None or held.shape != stored.shape:
                self.register_buffer(name, torch.zeros_like(stored, device=self._device()))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_operands()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_operands": {}, "_bound": {}}


_MOST_SHAPES = 16
"""Shapes of x for which a product is kept ready. Prompts have many lengths; tokens have one."""


def _versions(tensors: Iterable[Tensor | None]) -> tuple[tuple[Tensor, int], ...]:
    """Those tensors that count what is written to them, with their count; tensors of inference mode do not."""
    return tuple((t, t._version) for t in tensors if t is not None and not t.is_inference())


def _same(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


# What follows is asked at every product. `==` on tensors is not meant, and a generator would take twice the time.


@dataclass(frozen=True)
class _Operand:
    """Something made from stored tensors, good as long as these are the same and were not written to."""

    made: Any
    dtype: torch.dtype
    sources: tuple[Tensor | None, ...]
    watched: tuple[tuple[Tensor, int], ...]

    def fits(self, dtype: torch.dtype, sources: tuple[Tensor | None, ...]) -> bool:
        for kept, stored in zip(self.sources, sources, strict=True):
            if kept is not stored:
                return False
        for kept, version in self.watched:
            if kept._version != version:
                return False
        return dtype == self.dtype


@dataclass(frozen=True, slots=True)
class _Bound:
    """A product of which only x is open, good for x of one shape as long as nothing else has changed.

    What is written behind the back of autograd (``tensor.data``) goes unnoticed, as for operands.
    """

    alpha: Alpha
    kernel: str
    dtype: torch.dtype
    device: torch.device
    epoch: int
    buffers: tuple[Tensor | None, ...]
    watched: tuple[tuple[Tensor, int], ...]
    product: Callable[[Tensor], Tensor]

    def fits(self, layer: OrthoLinear, x: Tensor, alpha: Alpha) -> bool:
        held = layer._buffers
        if (
            alpha is not self.alpha
            or x.dtype is not self.dtype
            or x.device != self.device
            or layer.kernel != self.kernel
            or dispatch.epoch != self.epoch
            or len(held) != len(self.buffers)
            or (x.requires_grad and torch.is_grad_enabled())
            or torch.is_autocast_enabled(self.device.type)
        ):
            return False
        for kept, stored in zip(self.buffers, held.values(), strict=True):
            if kept is not stored:
                return False
        for kept, version in self.watched:  # noqa: SIM110
            if kept._version != version:
                return False
        return True
