"""Timing for benchmarks/gpu.py: random layers, rotated copies of them, CUDA graphs, paired medians.

Needs torch, triton and the folder ``kernels``, nothing else.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.cuda import Prepared, linear, prepare
from kernels.reference import base_operand

GROUP = 64
_MOST_COPIES = 1024
_COLD = 3
"""Size of all copies of a weight, in units of the level-2 cache."""
Call = Callable[[], Any]


@dataclass(frozen=True)
class Device:
    """Where things run. On the CPU (dry run) a replay is a loop and times mean nothing."""

    kind: str
    cache_bytes: int = 0

    @classmethod
    def here(cls, dry: bool) -> Device:
        if dry:
            return cls("cpu")
        properties = torch.cuda.get_device_properties(0)
        return cls("cuda", int(getattr(properties, "L2_cache_size", 0)) or 50 << 20)

    def copies(self, nbytes: int) -> int:
        """How many copies of ``nbytes`` are needed so that none is in the cache when its turn comes again."""
        return min(_MOST_COPIES, max(2, math.ceil(_COLD * self.cache_bytes / max(1, nbytes))))

    def graph(self, calls: Sequence[Call]) -> Call:
        """A function that runs all ``calls``: on a GPU as one CUDA graph, after each has run once outside."""
        if self.kind == "cpu":
            return lambda: [call() for call in calls]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def seconds(self, replay: Call) -> float:
        """Seconds of one replay."""
        if self.kind == "cpu":
            begin = time.perf_counter()
            replay()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@dataclass
class Stored:
    """A random layer as in a checkpoint, on the device."""

    shape: tuple[int, int]
    qweight: Tensor
    scales: Tensor
    csr: tuple[Tensor, Tensor, Tensor] | None

    def prepared(self) -> Prepared:
        memories = [] if self.csr is None else [self.csr]
        return prepare(self.qweight, self.scales, memories, in_features=self.shape[1], group_size=GROUP)

    def base(self, dtype: torch.dtype) -> Tensor:
        """W_base (out_features, in_features)."""
        return base_operand(self.qweight, self.scales, bits=4, group_size=GROUP, in_features=self.shape[1], dtype=dtype)

    def ortho(self, dtype: torch.dtype) -> Tensor:
        """W_ortho (out_features, in_features), dense."""
        dense = torch.zeros(self.shape, dtype=dtype, device=self.qweight.device)
        if self.csr is not None:
            rowptr, cols, vals = self.csr
            rows = torch.repeat_interleave(torch.arange(self.shape[0], device=cols.device), rowptr.diff().long())
            dense[rows, cols.long()] = vals.to(dtype)
        return dense


def stored_layer(shape: tuple[int, int], density: float, device: str, seed: int) -> Stored:
    """Random codes, scales and, at a density above 0, a random support."""
    draw = torch.Generator(device=device).manual_seed(seed)
    rows, width = shape
    groups = -(-width // GROUP)
    qweight = torch.randint(0, 256, (rows, groups * GROUP // 2), generator=draw, device=device, dtype=torch.uint8)
    scales = (torch.rand(rows, groups, generator=draw, device=device) * 0.02 + 0.001).bfloat16()
    if not density:
        return Stored(shape, qweight, scales, None)
    mask = torch.rand(shape, generator=draw, device=device) < density
    rowptr = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    rowptr[1:] = mask.sum(1).cumsum(0)
    cols = mask.nonzero()[:, 1].to(torch.int32)
    vals = (torch.randn(cols.numel(), generator=draw, device=device) * 0.05).bfloat16()
    return Stored(shape, qweight, scales, (rowptr, cols, vals))


def clones(device: Device, prepared: Prepared) -> list[Prepared]:
    """``prepared`` and copies of it elsewhere in memory, enough to be out of the cache when their turn comes."""
    count = device.copies(prepared.codes.nbytes + prepared.scales.nbytes)
    return [prepared, *(_clone(prepared) for _ in range(count - 1))]


def _clone(prepared: Prepared) -> Prepared:
    parts = (part.clone() if isinstance(part, Tensor) else part for part in prepared)
    return Prepared._make(parts)


@lru_cache(maxsize=64)
def rotated(device: Device, shape: tuple[int, int], density: float, seed: int) -> list[Prepared]:
    """Copies of a random layer; at density 0 without an ortho stream."""
    return clones(device, stored_layer(shape, density, device.kind, seed).prepared())


@lru_cache(maxsize=16)
def rotated_dense(device: Device, shape: tuple[int, int], seed: int) -> list[Tensor]:
    """Copies of a BF16 weight."""
    weight = stored_layer(shape, 0.0, device.kind, seed).base(torch.bfloat16)
    return [weight, *(weight.clone() for _ in range(device.copies(weight.nbytes) - 1))]


def our_calls(x: Tensor, layers: list[Prepared], alpha: float | None, path: Any = None) -> list[Call]:
    """One product per copy; ``alpha`` lies on the device."""
    alphas = None if alpha is None else torch.full((1,), alpha, device=x.device)
    return [partial(linear, x, layer, alphas, path=path) for layer in layers]


def dense_calls(x: Tensor, weights: list[Tensor]) -> list[Call]:
    """cuBLAS in BF16."""
    return [partial(functional.linear, x, weight) for weight in weights]


def int4pack_calls(x: Tensor, stored: Stored, device: Device) -> list[Call]:
    """torch's own INT4 product of a layer of this shape, with scales and zero points as it wants them."""
    rows, width = stored.shape
    packed = torch.ops.aten._convert_weight_to_int4pack(stored.qweight[:, : width // 2].contiguous(), 8)
    grid = torch.stack([stored.scales, torch.zeros_like(stored.scales)], dim=-1).transpose(0, 1).contiguous()
    product = torch.ops.aten._weight_int4pack_mm
    return [partial(product, x, packed.clone(), GROUP, grid.clone()) for _ in range(device.copies(rows * width // 2))]


@dataclass
class Timed:
    """Calls of one variant and their measured seconds."""

    calls: int
    replay: Call
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds per call."""
        return statistics.median(self.seconds) / self.calls


def capture(device: Device, calls: list[Call], least: int) -> Timed:
    """``calls`` as one replay of at least ``least`` calls."""
    repeated_calls = calls * math.ceil(least / len(calls))
    return Timed(len(repeated_calls), device.graph(repeated_calls))


def interleaved(device: Device, variants: Sequence[Timed], rounds: int) -> None:
    """Measures every variant once per round, after one round that does not count."""
    for number in range(rounds + 1):
        for variant in variants:
            seconds = device.seconds(variant.replay)
            if number:
                variant.seconds.append(seconds)


def paired_ratio(top: Timed, bottom: Timed, seed: int = 0) -> dict[str, float]:
    """The median of the ratios per round, with a 95 % bootstrap interval."""
    ratios = [a / top.calls / (b / bottom.calls) for a, b in zip(top.seconds, bottom.seconds, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    return {"ratio": statistics.median(ratios), "low": medians[25], "high": medians[974]}


def bandwidth(device: Device) -> dict[str, float]:
    """GB/s read, and read plus written, of large tensors; TFLOP/s of a large BF16 product."""
    cuda = device.kind == "cuda"
    big = torch.zeros(1 << (29 if cuda else 12), device=device.kind)
    twin = torch.empty_like(big)
    size = 8192 if cuda else 32
    square = torch.ones(size, size, device=device.kind, dtype=torch.bfloat16)
    read = capture(device, [lambda: big.sum()], 3)
    copied = capture(device, [lambda: twin.copy_(big)], 3)
    product = capture(device, [lambda: square @ square], 3)
    interleaved(device, [read, copied, product], 7)
    return {
        "read_gb_s": big.nbytes / read.median / 1e9,
        "copy_gb_s": 2 * big.nbytes / copied.median / 1e9,
        "bf16_tflop_s": 2 * size**3 / product.median / 1e12,
    }
