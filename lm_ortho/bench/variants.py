"""What is timed side by side: a name, what it stands for, and a call for each copy of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lm_ortho.bench.problem import GROUP_SIZE, Problem
from lm_ortho.kernels import sparse_operand
from lm_ortho.layer import OrthoLinear
from lm_ortho.layer.alpha import Alpha, Dial

INT4PACK_TILES = 2
"""innerKTiles of torch's packing; the CPU operator takes any."""


@dataclass(frozen=True)
class Variant:
    """``call(copy, x)`` computes the product with one copy. ``kernel`` None: what our counter says ran."""

    name: str
    density: float
    alpha: float
    call: Callable[[int, Tensor], Tensor]
    copies: int
    kernel: str | None = None

    @property
    def label(self) -> tuple[str, float, float]:
        """What tells the variants of one shape apart."""
        return self.name, self.density, self.alpha


def peers(problem: Problem, densities: tuple[float, ...]) -> Iterator[Variant]:
    """What one would use without us: dense BF16 and FP32, and torch's packed INT4 with a CSR product beside it."""
    bf16, fp32 = problem.dense(torch.bfloat16), problem.dense(torch.float32)
    yield Variant("bf16", 0.0, 0.0, lambda i, x: functional.linear(x, bf16[i]), len(bf16), "torch.linear")
    yield Variant("fp32", 0.0, 0.0, lambda i, x: functional.linear(x.float(), fp32[i]), len(fp32), "torch.linear")
    if problem.shape.out_features % 16 == 0:  # what the operator asks for
        yield from _int4pack(problem, densities)


def _int4pack(problem: Problem, densities: tuple[float, ...]) -> Iterator[Variant]:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(problem.codes.to(torch.int32) + 8, INT4PACK_TILES)
    copies = [packed.clone() for _ in range(problem.shape.copies)]
    scales = torch.stack([problem.scales.t(), torch.zeros_like(problem.scales.t())], dim=-1).contiguous()

    def base(i: int, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, copies[i], GROUP_SIZE, scales)
        return y

    yield Variant("int4pack_csr", 0.0, 0.0, base, len(copies), "torch._weight_int4pack_mm_for_cpu")
    for density in densities:
        ortho = problem.ortho(density)
        sparse = sparse_operand(ortho.rowptr, ortho.cols, ortho.vals, problem.shape.in_features).csr
        if sparse is None:
            return

        def both(i: int, x: Tensor, sparse: Tensor = sparse) -> Tensor:
            return base(i, x) + (sparse @ x.float().t()).t().bfloat16()

        name = "torch._weight_int4pack_mm_for_cpu + csr"
        yield Variant("int4pack_csr", density, 1.0, both, len(copies), name)


def ours(problem: Problem, densities: tuple[float, ...], kernel: str) -> Iterator[Variant]:
    """``OrthoLinear`` as a model calls it: without an ortho stream (density 0), and at alpha 0 and 1 with one."""
    for density in (0.0, *densities):
        layers = problem.layers(density, kernel)
        for alpha in (0.0, 1.0) if density else (0.0,):
            turned = [at_alpha(layer, alpha) for layer in layers]
            yield Variant("ours", density, alpha, lambda i, x, turned=turned: turned[i](x), len(turned))  # type: ignore[misc]


def at_alpha(layer: OrthoLinear, alpha: float) -> OrthoLinear:
    """The same layer behind a dial of its own, because a model decides on alpha once and not in every layer."""
    twin = copy.copy(layer)
    twin.dial = Dial(Alpha.of(alpha))
    twin._operands = layer._operands
    return twin


def torchao_int4(problem: Problem) -> Iterator[Variant]:
    """torchao's INT4 for CPUs (tried: 0.18), where it is installed."""
    try:
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    except ImportError:
        return
    if problem.shape.out_features % 16:
        return
    weight = problem.base.dequantize(torch.bfloat16)
    copies = [Int4OpaqueTensor.from_hp(weight, [1, GROUP_SIZE]) for _ in range(problem.shape.copies)]
    yield Variant("torchao_int4", 0.0, 0.0, lambda i, x: functional.linear(x, copies[i]), len(copies), "torchao")
