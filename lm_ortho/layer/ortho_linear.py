"""The linear layer on two streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lm_ortho.errors import UserError
from lm_ortho.kernels import AUTO, ProductSpec
from lm_ortho.layer.alpha import Alpha, Dial, current_alpha, running_call
from lm_ortho.layer.buffers import build_streams, list_memories, select_incoming
from lm_ortho.layer.operands import BASE_BUFFERS, ORTHO_BUFFERS, OperandCache, ortho_buffers
from lm_ortho.streams import DEFAULT_MEMORY, BaseStream, LayerStreams, OrthoStream


class OrthoLinear(nn.Module):
    """``y = x W_base^T + bias + alpha * (x W_ortho^T)`` in the dtype of ``x``.

    With several memories there is one such ortho term for each. The streams are buffers under the names they have in
    a checkpoint; the ortho ones are None in a base-only layer. ``absent`` names memories that the checkpoint was
    made with and whose file is missing. The dtypes of streams are part of the format: ``.to(dtype)`` moves them
    but converts only the bias. What is cached for speed (``OperandCache``) is not part of the state and is left out
    of copies and pickles. ``kernel`` selects an implementation of the product (``lm_ortho.kernels.KERNELS``).
    """

    qweight: Tensor | None
    scales: Tensor | None
    weight: Tensor | None
    ortho_rowptr: Tensor | None
    ortho_cols: Tensor | None
    ortho_vals: Tensor | None
    bias: Tensor | None
    origin: type[nn.Module] | None = None
    """The class of the ``Conv1D`` that the layer replaces."""
    kernel: str = AUTO

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
        """Creates a base-only layer of zeros, to be filled from a checkpoint; see ``from_streams``."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group_size = group_size
        self.dial = Dial()
        self.absent: tuple[str, ...] = ()
        self._cache = OperandCache()
        layout = BaseStream.layout((out_features, in_features), bits, group_size)
        for name, (buffer_dtype, shape) in layout.items():
            self.register_buffer(name, torch.zeros(shape, dtype=buffer_dtype, device=device))
        for name in ORTHO_BUFFERS:
            self.register_buffer(name, None)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_streams(cls, streams: LayerStreams, dtype: torch.dtype = torch.float32) -> OrthoLinear:
        """A layer that holds ``streams``, with a bias in ``dtype``."""
        out_features, in_features = streams.shape
        layer = cls(in_features, out_features, streams.base.bits, streams.base.group_size, bias=False, device="meta")
        for name, tensor in streams.base.tensors().items():
            setattr(layer, name, tensor)
        if streams.bias is not None:
            layer.bias = streams.bias.to(dtype)
        for name, ortho in streams.memories.items():
            layer.set_ortho(ortho, name)
        return layer

    @property
    def has_ortho(self) -> bool:
        """Whether the layer has an ortho stream; an empty one counts."""
        return bool(self.memories)

    @property
    def memories(self) -> tuple[str, ...]:
        """The memories whose ortho streams the layer holds."""
        return list_memories(self._buffers)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.out_features, self.in_features

    @property
    def device(self) -> torch.device:
        """The device of the base stream."""
        return next(buffer.device for name, buffer in self.named_buffers() if name in BASE_BUFFERS)

    def set_ortho(self, ortho: OrthoStream | None, memory: str = DEFAULT_MEMORY) -> None:
        """Replaces the ortho stream of ``memory``; None removes it.

        Raises:
            ValueError: for a stream of another shape, and one that shares a position with another memory.
        """
        if ortho is not None and ortho.shape != self.shape:
            raise ValueError(f"ortho stream of shape {ortho.shape} for a layer of shape {self.shape}")
        tensors: dict[str, Tensor | None] = dict.fromkeys(ORTHO_BUFFERS)
        tensors |= {} if ortho is None else ortho.to(self.device).tensors()
        changes = {name: tensors[part] for name, part in zip(ortho_buffers(memory), ORTHO_BUFFERS, strict=True)}
        if ortho is not None and set(self.memories) - {memory}:
            build_streams(self, {**self._buffers, **changes})
        for name, tensor in changes.items():
            self.register_buffer(name, tensor)

    def streams(self) -> LayerStreams:
        """The streams that the layer holds, checked.

        Raises:
            ValueError: if a tensor was damaged.
        """
        return build_streams(self, self._buffers)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., out_features)`` in the dtype of ``x`` (..., in_features)."""
        call = running_call(self.dial)
        alpha = current_alpha(self.dial) if call is None else call.alpha
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta:
            spec = ProductSpec.from_input(x, self.out_features, self.bits, self.group_size)
            return self._cache.trace(self, x, alpha, spec)
        bound = self._cache.products.get(x.shape)
        # The usual case in few steps: in a generation each costs a microsecond for every layer and token.
        if (
            bound is not None
            and call is not None
            and bound.checked_in is call.outermost
            and bound.dtype is x.dtype
            and not x.requires_grad
            and bound.device == x.device
            and not torch.is_autocast_enabled(bound.device.type)
        ):
            return bound.function(x)
        if bound is not None and bound.fits(self, x, alpha, call):
            return bound.function(x)
        spec = ProductSpec.from_input(x, self.out_features, self.bits, self.group_size)
        return self._cache.bind_and_multiply(self, x, alpha, spec)

    def extra_repr(self) -> str:
        counts = {name: self.get_buffer(ortho_buffers(name)[2]).numel() for name in self.memories}
        nnz = "+".join(f"{n}" if name == DEFAULT_MEMORY else f"{name}:{n}" for name, n in counts.items()) or "none"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, ortho={nnz}, bias={self.bias is not None}"
        )

    def check(self, alpha: Alpha) -> None:
        """Raises ``UserError`` if ``alpha`` names an unknown memory or needs an ortho stream that is missing."""
        names = (*self.memories, *self.absent)
        for name in alpha.named or names or (DEFAULT_MEMORY,):
            part = alpha.for_memory(name)
            if names and name not in names:
                raise UserError(
                    f"alpha={name}:...: the model has no memory {name!r}; it has {', '.join(map(repr, names))}"
                )
            if not part.reads_ortho or name in self.memories:
                continue
            value = " other than 0" if part.rows is not None else f"={part.value:g}"
            if name in self.absent:
                raise UserError(f"alpha{value} of {name}: the file of this memory is missing, so only alpha=0 works")
            raise UserError(f"alpha{value}: this model has only its base stream, so only alpha=0 works")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrthoLinear:
        stream_ids = {id(tensor) for name, tensor in self._buffers.items() if name != "bias"}

        def keep_stream_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in stream_ids and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        super()._apply(keep_stream_dtype, recurse)
        self._cache = OperandCache()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, tensor in select_incoming(self, state_dict, prefix).items():
            buffer = self._buffers.get(name)
            # Another decomposition of the same model has another number of non-zeros.
            fits = buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)
            if name.startswith("ortho_") and not fits:
                self.register_buffer(name, torch.zeros_like(tensor, device=self.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickles of older versions hold two empty caches under these names.
        super().__setstate__({name: value for name, value in state.items() if name not in ("_operands", "_bound")})
        self._cache = OperandCache()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cache"}
