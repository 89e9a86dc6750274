"""The linear layer on two streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lm_ortho.errors import UserError
from lm_ortho.kernels import SparseOperand, base_operand, prepared_linear, sparse_operand
from lm_ortho.layer.alpha import Alpha, Dial, effective, rows_for
from lm_ortho.streams import BaseStream, LayerStreams, OrthoStream

T = TypeVar("T")
_BASE = ("qweight", "scales", "weight")
_ORTHO = ("ortho_rowptr", "ortho_cols", "ortho_vals")


class OrthoLinear(nn.Module):
    """``y = x W_base^T + bias + alpha * (x W_ortho^T)`` in the dtype of ``x``.

    The streams are buffers under the names they have in a checkpoint; the ortho ones are None in a base-only
    layer. Their dtypes are part of the format: ``.to(dtype)`` moves them but converts only the bias. Dense
    copies made for speed are no part of the state and are left out of copies and pickles.
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
    _dense: _Operand[Tensor] | None
    _sparse: _Operand[SparseOperand] | None

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
        layer.set_ortho(streams.ortho)
        return layer

    @property
    def has_ortho(self) -> bool:
        """Whether there is an ortho stream, be it an empty one."""
        return self.ortho_vals is not None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    def set_ortho(self, ortho: OrthoStream | None) -> None:
        """Gives the layer another ortho stream, or none. Raises ``ValueError`` for another shape."""
        if ortho is not None and ortho.shape != self.shape:
            raise ValueError(f"ortho stream of shape {ortho.shape} for a layer of shape {self.shape}")
        tensors = dict.fromkeys(_ORTHO) if ortho is None else ortho.to(self._device()).tensors()
        for name in _ORTHO:
            setattr(self, name, tensors[name])

    def streams(self) -> LayerStreams:
        """The streams the layer holds, checked. Raises ``ValueError`` if a tensor was damaged."""
        stored = {name: self._buffers[name] for name in _BASE if name in self._buffers}
        base = BaseStream(self.shape, self.bits, self.group_size, **stored)
        ortho = None
        if self.ortho_rowptr is not None and self.ortho_cols is not None and self.ortho_vals is not None:
            ortho = OrthoStream(self.ortho_rowptr, self.ortho_cols, self.ortho_vals, self.shape)
        return LayerStreams(base, ortho, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., out_features)`` in the dtype of ``x`` (..., in_features)."""
        alpha = effective(self.dial)
        weight = self._base_operand(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not alpha.reads_ortho:
            return prepared_linear(x, weight, None, bias)
        self.check(alpha)
        sparse = self._sparse_operand(x.dtype)
        factor = alpha.value if alpha.rows is None else rows_for(self.dial, alpha, x)
        return prepared_linear(x, weight, sparse, bias, factor)

    def extra_repr(self) -> str:
        nnz = "none" if self.ortho_vals is None else f"{self.ortho_vals.numel()}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, ortho={nnz}, bias={self.bias is not None}"
        )

    def check(self, alpha: Alpha) -> None:
        """Raises ``UserError`` if ``alpha`` needs an ortho stream the layer does not have."""
        if alpha.reads_ortho and not self.has_ortho:
            shown = " other than 0" if alpha.rows is not None else f"={alpha.value:g}"
            raise UserError(f"alpha{shown}: this model has only its base stream, so alpha=0 is all it can do")

    def _base_operand(self, dtype: torch.dtype) -> Tensor:
        stored = [self._buffers.get(name) for name in _BASE]
        if self._dense is None or not self._dense.fits(dtype, stored):
            # A tensor made in inference mode could never take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                dense = base_operand(
                    stored[0] if stored[2] is None else stored[2],
                    stored[1],
                    bits=self.bits,
                    group_size=self.group_size,
                    in_features=self.in_features,
                    dtype=dtype,
                )
            self._dense = _Operand.of(dense, dtype, stored)
        return self._dense.made

    def _sparse_operand(self, dtype: torch.dtype) -> SparseOperand:
        stored = [self._buffers[name] for name in _ORTHO]
        if self._sparse is None or not self._sparse.fits(dtype, stored):
            with torch.inference_mode(False), torch.no_grad():
                sparse = sparse_operand(*stored, self.in_features, dtype)
            self._sparse = _Operand.of(sparse, dtype, stored)
        return self._sparse.made

    def _forget_operands(self) -> None:
        self._dense = None
        self._sparse = None

    def _device(self) -> torch.device:
        return next(buffer.device for name, buffer in self.named_buffers() if name in _BASE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrthoLinear:
        fixed = {id(self._buffers.get(name)) for name in (*_BASE, *_ORTHO)}

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
        for name in _ORTHO:
            stored = state_dict.get(prefix + name)
            held = self._buffers[name]
            if isinstance(stored, Tensor) and (held is None or held.shape != stored.shape):
                setattr(self, name, torch.zeros_like(stored, device=self._device()))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dense": None, "_sparse": None}


@dataclass(frozen=True)
class _Operand(Generic[T]):
    """Something made from stored tensors, good as long as these are the same and were not written to."""

    made: T
    dtype: torch.dtype
    sources: tuple[Tensor | None, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, made: T, dtype: torch.dtype, sources: Sequence[Tensor | None]) -> _Operand[T]:
        return cls(made, dtype, tuple(sources), _versions(sources))

    def fits(self, dtype: torch.dtype, sources: Sequence[Tensor | None]) -> bool:
        same = all(kept is stored for kept, stored in zip(self.sources, sources, strict=True))
        return same and dtype == self.dtype and self.versions == _versions(sources)


def _versions(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(t._version for t in tensors if t is not None and not t.is_inference())
