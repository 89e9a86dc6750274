"""What a two-stream layer keeps between calls: the operands of its kernels and products bound to a shape of ``x``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lm_ortho.kernels import REFERENCE, Implementation, ProductSpec, StoredBase, StoredOrtho, choose, dispatch
from lm_ortho.layer.alpha import Alpha, Call, Dial, alpha_per_row
from lm_ortho.streams import DEFAULT_MEMORY

BASE_BUFFERS = ("qweight", "scales", "weight")
ORTHO_BUFFERS = ("ortho_rowptr", "ortho_cols", "ortho_vals")
_MAX_BOUND_PRODUCTS = 16
"""Shapes of ``x`` for which a product is kept ready. Prompts have many lengths; decoding has one."""


MergeKey = tuple[str, tuple[tuple[str, float | Tensor], ...]]
"""The name of a kernel, and the alpha of each memory that is read."""


def ortho_buffers(memory: str) -> tuple[str, str, str]:
    """Names of the buffers that hold the ortho stream of ``memory``: rowptr, cols, vals."""
    rowptr, cols, vals = (
        part if memory == DEFAULT_MEMORY else part.replace("_", f"_{memory}_", 1) for part in ORTHO_BUFFERS
    )
    return rowptr, cols, vals


def parse_memory_name(buffer: str) -> str | None:
    """The memory whose values are in a buffer of this name; None for every other buffer."""
    if buffer == ORTHO_BUFFERS[2]:
        return DEFAULT_MEMORY
    holds_values = buffer.startswith("ortho_") and buffer.endswith("_vals")
    return buffer.removeprefix("ortho_").removesuffix("_vals") if holds_values else None


class StreamLayer(Protocol):
    """What ``OperandCache`` reads of an ``OrthoLinear``; a class of its own, so that the two files need no circle."""

    in_features: int
    out_features: int
    bits: int
    group_size: int
    kernel: str
    dial: Dial
    absent: tuple[str, ...]
    bias: Tensor | None
    _buffers: dict[str, Tensor | None]

    @property
    def memories(self) -> tuple[str, ...]: ...

    def check(self, alpha: Alpha) -> None: ...


class OperandCache:
    """Kernel operands of one layer, made from its buffers at first use, and its bound products.

    Entries are checked against the buffers at every call, so a tensor that was replaced or written to is noticed.
    Nothing here is part of the layer's state. The layer is an argument of every method: a reference to it would be
    a cycle, which keeps the memory of a dropped model until the next garbage collection.

    Attributes:
        operands: (name of the kernel, memory or None for the base stream) -> operand.
        merged: the operand of the whole weight at the alpha that was used last, where the kernel multiplies by that.
        products: shape of ``x`` -> product.
    """

    __slots__ = ("merged", "operands", "products")

    def __init__(self) -> None:
        self.operands: dict[tuple[str, str | None], CachedOperand] = {}
        self.merged: tuple[MergeKey, CachedOperand] | None = None
        self.products: dict[torch.Size, BoundProduct] = {}

    def trace(self, layer: StreamLayer, x: Tensor, alpha: Alpha, spec: ProductSpec) -> Tensor:
        """``(..., out_features)``: the product of the layer with an ``x`` whose values cannot be read."""
        kernel = choose(layer.kernel, spec).implementation
        base = self.base_operand(layer, kernel, x.dtype)
        return kernel.linear(x, base, self.ortho_terms(layer, kernel, x, alpha), _cast_bias(layer, x.dtype), spec)

    def multiply(self, layer: StreamLayer, x: Tensor, alpha: Alpha, spec: ProductSpec) -> Tensor:
        """``(..., out_features)``: the product of the layer with ``x``, without binding it."""
        kernel = choose(layer.kernel, spec).implementation
        base, terms = self.select_operands(layer, kernel, x, alpha)
        return kernel.linear(x, base, terms, _cast_bias(layer, x.dtype), spec)

    def bind_and_multiply(self, layer: StreamLayer, x: Tensor, alpha: Alpha, spec: ProductSpec) -> Tensor:
        """The product of the layer with ``x``, kept ready for further tensors of this shape where that is possible."""
        # A write to a bias made in inference mode leaves no trace that a later call could check.
        has_untracked_bias = layer.bias is not None and layer.bias.is_inference()
        if spec.grad or spec.autocast or alpha.batch is not None or has_untracked_bias:
            return self.multiply(layer, x, alpha, spec)
        # Read before the operands are made: a change from here on is noticed by the next call.
        buffers = tuple(layer._buffers.values())
        if any(not _are_identical(product.buffers, buffers) for product in list(self.products.values())):
            self.products = {}  # they would keep streams alive that were replaced
        versions, epoch, kernel_name = _tensor_versions(buffers), dispatch.epoch, layer.kernel
        kernel = choose(kernel_name, spec).implementation
        with torch.inference_mode(False), torch.no_grad():
            base, terms = self.select_operands(layer, kernel, x, alpha)
            function = kernel.bind(x, base, terms, _cast_bias(layer, x.dtype), spec)
        if len(self.products) >= _MAX_BOUND_PRODUCTS:
            self.products = {}
        self.products[x.shape] = BoundProduct(
            alpha=alpha,
            kernel=kernel_name,
            dtype=x.dtype,
            device=x.device,
            epoch=epoch,
            buffers=buffers,
            versions=versions,
            function=function,
        )
        return function(x)

    def select_operands(
        self, layer: StreamLayer, kernel: Implementation, x: Tensor, alpha: Alpha
    ) -> tuple[Any, list[tuple[Any, Any]]]:
        """What ``kernel`` multiplies ``x`` by: a base operand and ortho terms, or a merged operand without terms.

        Raises:
            UserError: as ``ortho_terms``.
        """
        factors = self._read_factors(layer, alpha)
        if factors and not any(isinstance(factor, Tensor) for _, factor in factors):
            merged = self.merged_operand(layer, kernel, x.dtype, factors)
            if merged is not None:
                return merged, []
        return self.base_operand(layer, kernel, x.dtype), self.ortho_terms(layer, kernel, x, alpha)

    def forget_weights(self, alpha: Alpha) -> None:
        """Frees the dense copies that products at ``alpha`` do not read; they are made again where they are needed."""
        self.merged, self.products = None, {}
        if alpha.reads_ortho:
            self.operands.pop((REFERENCE, None), None)

    def ortho_terms(self, layer: StreamLayer, kernel: Implementation, x: Tensor, alpha: Alpha) -> list[tuple[Any, Any]]:
        """Operands of the ortho streams that ``alpha`` reads, each with one number or one per row.

        Raises:
            UserError: if ``alpha`` names an unknown memory or needs an ortho stream that the layer does not have.
        """
        return [
            (
                self.ortho_operand(layer, kernel, x.dtype, name),
                alpha_per_row(layer.dial, alpha.for_memory(name), x) if isinstance(factor, Tensor) else factor,
            )
            for name, factor in self._read_factors(layer, alpha)
        ]

    @staticmethod
    def _read_factors(layer: StreamLayer, alpha: Alpha) -> tuple[tuple[str, float | Tensor], ...]:
        """The memories that ``alpha`` reads, each with its number or numbers; ``UserError`` as ``ortho_terms``."""
        if not alpha.reads_ortho:
            return ()
        memories = layer.memories
        if alpha.named is not None or layer.absent or not memories:  # else there is nothing to refuse
            layer.check(alpha)
        parts = ((name, alpha.for_memory(name)) for name in memories)
        return tuple((name, part.value if part.rows is None else part.rows) for name, part in parts if part.reads_ortho)

    def merged_operand(
        self,
        layer: StreamLayer,
        kernel: Implementation,
        dtype: torch.dtype,
        factors: tuple[tuple[str, float | Tensor], ...],
    ) -> Any | None:
        """The weight at one alpha for each memory as ``kernel`` reads it; None if it reads the two streams."""
        key = (kernel.name, factors)
        tensors = _base_tensors(layer._buffers)
        orthos = [_ortho_tensors(layer._buffers, name) for name, _ in factors]
        sources = (*tensors, *(tensor for ortho in orthos for tensor in ortho))
        merged = self.merged  # read once: another thread may replace it by that of its own alpha at any moment
        if merged is not None and merged[0] == key and merged[1].fits(dtype, sources):
            return merged[1].value
        terms = [
            (StoredOrtho(*ortho, layer.in_features), float(factor))
            for ortho, (_, factor) in zip(orthos, factors, strict=True)
        ]
        with torch.inference_mode(False), torch.no_grad():
            value = kernel.merge(_stored_base(layer), terms, dtype)
        if value is not None:
            self.merged = key, CachedOperand(value, dtype, sources, _tensor_versions(sources))
            self.products = {}  # they would keep the previous operand alive
        return value

    def base_operand(self, layer: StreamLayer, kernel: Implementation, dtype: torch.dtype) -> Any:
        """The base stream as ``kernel`` reads it for ``x`` of ``dtype``."""
        tensors = _base_tensors(layer._buffers)
        operand = self.operands.get((kernel.name, None))
        if operand is not None and operand.fits(dtype, tensors):
            return operand.value
        stored = _stored_base(layer)
        return self._store((kernel.name, None), lambda: kernel.base(stored, dtype), dtype, tensors)

    def ortho_operand(self, layer: StreamLayer, kernel: Implementation, dtype: torch.dtype, memory: str) -> Any:
        """The ortho stream of ``memory`` as ``kernel`` reads it for ``x`` of ``dtype``."""
        tensors = _ortho_tensors(layer._buffers, memory)
        operand = self.operands.get((kernel.name, memory))
        if operand is not None and operand.fits(dtype, tensors):
            return operand.value
        rowptr, cols, vals = tensors
        stored = StoredOrtho(rowptr, cols, vals, layer.in_features)
        return self._store((kernel.name, memory), lambda: kernel.ortho(stored, dtype), dtype, tensors)

    def _store(
        self,
        key: tuple[str, str | None],
        make_operand: Callable[[], Any],
        dtype: torch.dtype,
        sources: tuple[Tensor | None, ...],
    ) -> Any:
        # A tensor made in inference mode could never take part in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            value = make_operand()
        self.operands[key] = CachedOperand(value, dtype, sources, _tensor_versions(sources))
        self.products = {}  # they would keep the previous operand alive
        return value


def _base_tensors(buffers: Mapping[str, Tensor | None]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return buffers.get("qweight"), buffers.get("scales"), buffers.get("weight")


def _stored_base(layer: StreamLayer) -> StoredBase:
    codes, scales, weight = _base_tensors(layer._buffers)
    stored = codes if weight is None else weight
    assert stored is not None
    return StoredBase(stored, scales, layer.bits, layer.group_size, layer.in_features)


def _ortho_tensors(buffers: Mapping[str, Tensor | None], memory: str) -> tuple[Tensor, Tensor, Tensor]:
    rowptr, cols, vals = (buffers[name] for name in ortho_buffers(memory))
    assert rowptr is not None
    assert cols is not None
    assert vals is not None
    return rowptr, cols, vals


def _cast_bias(layer: StreamLayer, dtype: torch.dtype) -> Tensor | None:
    return None if layer.bias is None else layer.bias.to(dtype)


def _tensor_versions(tensors: Iterable[Tensor | None]) -> tuple[tuple[Tensor, int], ...]:
    """Each tensor that counts its in-place writes, with the count; tensors of inference mode do not count."""
    return tuple((t, t._version) for t in tensors if t is not None and not t.is_inference())


def _are_identical(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))


# The checks below run at every product. They compare tensors by identity, because `==` would compare their values,
# and in plain loops, because a generator would take twice the time.


@dataclass(frozen=True)
class CachedOperand:
    """An operand made from stored tensors, valid as long as these are the same objects and were not written to."""

    value: Any
    dtype: torch.dtype
    sources: tuple[Tensor | None, ...]
    versions: tuple[tuple[Tensor, int], ...]

    def fits(self, dtype: torch.dtype, sources: tuple[Tensor | None, ...]) -> bool:
        """Whether the operand serves ``x`` of ``dtype`` in a layer that now holds ``sources``."""
        for source, current in zip(self.sources, sources, strict=True):
            if source is not current:
                return False
        for source, version in self.versions:
            if source._version != version:
                return False
        return dtype == self.dtype


@dataclass(slots=True)
class BoundProduct:
    """A product as a function of ``x`` alone, valid for one shape of ``x`` as long as nothing else has changed.

    Writes that autograd does not see (``tensor.data``) go unnoticed, as for operands. Streams are looked at once in a
    call of the model: like alpha, they do not change in the middle of one. Looking at every step of a generation took
    a tenth of its time, because these objects have left the caches whenever a layer has read its weights through them.

    Attributes:
        checked_in: ``Call.outermost`` of the call in which the streams were looked at last.
    """

    alpha: Alpha
    kernel: str
    dtype: torch.dtype
    device: torch.device
    epoch: int
    buffers: tuple[Tensor | None, ...]
    versions: tuple[tuple[Tensor, int], ...]
    function: Callable[[Tensor], Tensor]
    checked_in: object | None = None

    def fits(self, layer: StreamLayer, x: Tensor, alpha: Alpha, call: Call | None) -> bool:
        """Whether the product is that of ``layer`` with ``x`` at ``alpha`` now; the shape of ``x`` is not checked."""
        if (
            alpha is not self.alpha
            or x.dtype is not self.dtype
            or x.device != self.device
            or (x.requires_grad and torch.is_grad_enabled())
            or torch.is_autocast_enabled(self.device.type)
        ):
            return False
        current_buffers = layer._buffers
        if layer.kernel != self.kernel or dispatch.epoch != self.epoch or len(current_buffers) != len(self.buffers):
            return False
        for buffer, current in zip(self.buffers, current_buffers.values(), strict=True):
            if buffer is not current:
                return False
        for buffer, version in self.versions:
            if buffer._version != version:
                return False
        self.checked_in = None if call is None else call.outermost
        return True
