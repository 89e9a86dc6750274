"""The GPU kernels as ``dispatch`` knows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .cuda import Prepared, layout, product
from .dispatch import Ask, StoredBase, StoredOrtho

Words = tuple[Tensor, Tensor]
"""The words of ortho streams, and where each row of each stream begins in them."""


class GpuBase(NamedTuple):
    """The base stream of a layer, and its ortho streams put together for each set of memories that was asked for."""

    prepared: Prepared
    joined: dict[tuple[int, ...], tuple[Words, Sequence[Words]]]


class Triton:
    """The Triton kernels: BF16 and FP16 on CUDA devices, without gradients. Keep no dense copy."""

    name = "triton"

    def refuses(self, ask: Ask) -> str | None:
        """Why it cannot do this, or None."""
        if ask.autocast:
            return "autocast decides on the dtype"
        shape = (ask.out_features, ask.in_features)
        return product.refuses(ask.device, ask.dtype, shape, bits=ask.bits, group_size=ask.group_size, grad=ask.grad)

    def declines(self, ask: Ask) -> str | None:
        """Why ``auto`` should not pick it although it could, or None."""
        half = ask.dtype in (torch.bfloat16, torch.float16)
        if ask.device != "cuda" or not half or ask.bits == 16 or ask.grad or ask.autocast:
            return "not 16-bit inference on a CUDA device"
        return product.fuses(ask.bits, ask.group_size, ask.in_features)

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

    def linear(
        self, x: Tensor, base: GpuBase, terms: Sequence[tuple[Words, float | Tensor]], bias: Tensor | None, ask: Ask
    ) -> Tensor:
        """``(..., out_features)`` in the dtype of ``x``; nothing waits for the device."""
        if not terms:
            return product.linear(x, base.prepared, None, bias)
        words, starts = _joined(base, [operand for operand, _ in terms])
        alphas = _alphas([alpha for _, alpha in terms], x)
        return product.linear(x, base.prepared._replace(ortho=words, rowptr=starts), alphas, bias)

    def bind(
        self, x: Tensor, base: GpuBase, terms: Sequence[tuple[Words, float]], bias: Tensor | None, ask: Ask
    ) -> Callable[[Tensor], Tensor]:
        """``linear`` as a function of ``x`` alone."""
        return partial(self.linear, base=base, terms=terms, bias=bias, ask=ask)


def _joined(base: GpuBase, streams: Sequence[Words]) -> Words:
    """The streams as one; several are put together once."""
    if len(streams) == 1:
        return streams[0]
    key = tuple(id(words) for words, _ in streams)
    if key not in base.joined:
        before, starts = 0, []
        for words, own in streams:
            starts.append(own + before)
            before += words.numel()
        whole = torch.cat([words for words, _ in streams]), torch.cat(starts)
        base.joined.clear()  # one set of memories at a time: a copy of the streams is not free
        base.joined[key] = whole, streams  # kept alive, so that no other stream gets their ids
    return base.joined[key][0]


def _alphas(alphas: Sequence[float | Tensor], x: Tensor) -> Tensor:
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
