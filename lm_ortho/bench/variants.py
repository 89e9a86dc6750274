"""The variants of a layer that the benchmark compares."""

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
    """A way to compute the product.

    ``call(copy, x)`` computes it with one of ``copies`` copies of the weights. ``kernel`` names what runs; None stands
    for the kernel whose calls our counter counts.
    """

    name: str
    density: float
    alpha: float
    call: Callable[[int, Tensor], Tensor]
    copies: int
    kernel: str | None = None

    @property
    def label(self) -> tuple[str, float, float]:
        """The key of this variant among those of one shape."""
        return self.name, self.density, self.alpha


def make_baseline_variants(problem: Problem, densities: tuple[float, ...]) -> Iterator[Variant]:
    """Yields the baselines: dense BF16 and FP32, and torch's packed INT4 with a CSR product added."""
    bf16, fp32 = problem.make_dense_weights(torch.bfloat16), problem.make_dense_weights(torch.float32)
    kernel = "torch.linear"
    yield Variant("bf16", 0.0, 0.0, lambda i, x: functional.linear(x, bf16[i]), copies=len(bf16), kernel=kernel)
    yield Variant("fp32", 0.0, 0.0, lambda i, x: functional.linear(x.float(), fp32[i]), copies=len(fp32), kernel=kernel)
    if problem.shape.out_features % 16 == 0:  # the operator supports no other shapes
        yield from _make_int4pack_variants(problem, densities)


def _make_int4pack_variants(problem: Problem, densities: tuple[float, ...]) -> Iterator[Variant]:
    weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(problem.codes.to(torch.int32) + 8, INT4PACK_TILES)
    copies = [weight.clone() for _ in range(problem.shape.copies)]
    scales = torch.stack([problem.scales.t(), torch.zeros_like(problem.scales.t())], dim=-1).contiguous()

    def multiply_base(i: int, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, copies[i], GROUP_SIZE, scales)
        return y

    kernel = "torch._weight_int4pack_mm_for_cpu"
    yield Variant("int4pack_csr", 0.0, 0.0, multiply_base, copies=len(copies), kernel=kernel)
    for density in densities:
        ortho = problem.make_ortho(density)
        sparse = sparse_operand(ortho.rowptr, ortho.cols, ortho.vals, problem.shape.in_features).csr
        if sparse is None:
            return

        def multiply_both(i: int, x: Tensor, sparse: Tensor = sparse) -> Tensor:
            return multiply_base(i, x) + (sparse @ x.float().t()).t().bfloat16()

        yield Variant("int4pack_csr", density, 1.0, multiply_both, copies=len(copies), kernel=f"{kernel} + csr")


def make_ortho_variants(problem: Problem, densities: tuple[float, ...], kernel: str) -> Iterator[Variant]:
    """Yields ``OrthoLinear`` as a model calls it: without an ortho stream (density 0), or at alpha 0 and 1."""
    for density in (0.0, *densities):
        layers = problem.make_layers(density, kernel)
        for alpha in (0.0, 1.0) if density else (0.0,):
            copies = [fix_alpha(layer, alpha) for layer in layers]

            def multiply(i: int, x: Tensor, copies: list[OrthoLinear] = copies) -> Tensor:
                return copies[i](x)

            yield Variant("ours", density, alpha, multiply, copies=len(copies))


def fix_alpha(layer: OrthoLinear, alpha: float) -> OrthoLinear:
    """Returns the same layer with its own, constant alpha, because a model sets alpha once and not in every layer."""
    twin = copy.copy(layer)
    twin.dial = Dial(Alpha.parse(alpha))
    twin._cache.operands = layer._cache.operands
    return twin


def make_torchao_variants(problem: Problem) -> Iterator[Variant]:
    """Yields torchao's INT4 for CPUs (tested with 0.18), if it is installed."""
    try:
        from torchao.prototype.quantization.int4 import Int4OpaqueTensor
    except ImportError:
        return
    if problem.shape.out_features % 16:
        return
    weight = problem.base.dequantise(torch.bfloat16)
    copies = [Int4OpaqueTensor.from_hp(weight, [1, GROUP_SIZE]) for _ in range(problem.shape.copies)]

    def multiply(i: int, x: Tensor) -> Tensor:
        return functional.linear(x, copies[i])

    yield Variant("torchao_int4", 0.0, 0.0, multiply, copies=len(copies), kernel="torchao")
