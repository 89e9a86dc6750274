"""The GPU kernels as an ``Implementation`` for ``dispatch``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda import Prepared, layout, product
from .dispatch import ProductSpec, StoredBase, StoredOrtho

Words = tuple[Tensor, Tensor]
"""The words of ortho streams, and the index of the first word of each row of each stream."""


class GpuBase(NamedTuple):
    """The base stream of a layer, and the concatenated ortho streams of the set of memories used last."""

    prepared: Prepared
    concatenated: dict[tuple[int, ...], tuple[Words, Sequence[Words]]]


class Triton:
    """The Triton kernels: BF16 and FP16 on CUDA devices, without gradients. They keep no dense copy."""

    name = "triton"

    def refuses(self, spec: ProductSpec) -> str | None:
        """The reason why it cannot compute this product, or None."""
        if spec.autocast:
            return "autocast decides on the dtype"
        shape = (spec.out_features, spec.in_features)
        return product.refuses(
            spec.device, spec.dtype, shape, bits=spec.bits, group_size=spec.group_size, grad=spec.grad
        )

    def declines(self, spec: ProductSpec) -> str | None:
        """The reason why ``auto`` should not select it although it could, or None."""
        half = spec.dtype in (torch.bfloat16, torch.float16)
        if spec.device != "cuda" or not half or spec.bits == 16 or spec.grad or spec.autocast:
            return "not 16-bit inference on a CUDA device"
        return product.fuses(spec.bits, spec.group_size, spec.in_features)

    def base(self, stored: StoredBase, dtype: torch.dtype) -> GpuBase:
        """The codes repacked for tensor cores."""
        if stored.scales is None:
            raise ValueError("a base stream of 16 bits has no codes")
        prepared = layout.prepare(
            stored.qweight,
            stored.scales,
            in_features=stored.in_features,
            bits=stored.bits,
            group_size=stored.group_size,
        )
        return GpuBase(prepared, {})

    def ortho(self, stored: StoredOrtho, dtype: torch.dtype) -> Words:
        """One 32-bit word per value."""
        return layout.ortho_words([(stored.rowptr, stored.cols, stored.vals)], stored.in_features)

    def merge(self, base: StoredBase, terms: Sequence[tuple[StoredOrtho, float]], dtype: torch.dtype) -> None:
        return None

    def linear(
        self,
        x: Tensor,
        base: GpuBase,
        terms: Sequence[tuple[Words, float | Tensor]],
        bias: Tensor | None,
        spec: ProductSpec,
    ) -> Tensor:
        """The product, ``(..., out_features)`` in the dtype of ``x``; nothing waits for the device."""
        if not terms:
            return product.linear(x, base.prepared, None, bias)
        words, starts = _concatenate_streams(base, [operand for operand, _ in terms])
        alphas = _stack_alphas([alpha for _, alpha in terms], x)
        return product.linear(x, base.prepared._replace(ortho=words, rowptr=starts), alphas, bias)

    def bind(
        self, x: Tensor, base: GpuBase, terms: Sequence[tuple[Words, float]], bias: Tensor | None, spec: ProductSpec
    ) -> Callable[[Tensor], Tensor]:
        """``linear`` as a function of ``x`` alone."""
        return partial(self.linear, base=base, terms=terms, bias=bias, spec=spec)


def _concatenate_streams(base: GpuBase, streams: Sequence[Words]) -> Words:
    """The streams as one; the concatenation of several is cached in ``base``."""
    if len(streams) == 1:
        return streams[0]
    key = tuple(id(words) for words, _ in streams)
    if key not in base.concatenated:
        offset, starts = 0, []
        for words, stream_starts in streams:
            starts.append(stream_starts + offset)
            offset += words.numel()
        result = torch.cat([words for words, _ in streams]), torch.cat(starts)
        base.concatenated.clear()  # one set of memories at a time: a copy of the streams takes memory
        base.concatenated[key] = result, streams  # a reference to the streams, so that no other gets their ids
    return base.concatenated[key][0]


def _stack_alphas(alphas: Sequence[float | Tensor], x: Tensor) -> Tensor:
    """(memories,) float32 on the device of ``x``, or (memories, rows) where any of them differs by row."""
    if not any(isinstance(alpha, Tensor) for alpha in alphas):
        # A copy from the host would wait for the device; filling does not.
        return torch.cat([torch.full((1,), float(alpha), device=x.device) for alpha in alphas])
    rows = x.shape[0]
    return torch.stack(
        [
            alpha.to(x.device, torch.float32)
            if isinstance(alpha, Tensor)
            else torch.full((rows,), alpha, device=x.device)
            for alpha in alphas
        ]
    )
