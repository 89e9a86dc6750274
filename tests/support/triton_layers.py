"""Random layers for the tests of the GPU kernels, and their exact products in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lm_ortho.kernels import pack_codes
from lm_ortho.kernels.cuda import Csr, Prepared, prepare

ERROR = 1e-5
"""Largest error of an FP32 sum before the last rounding, relative to the sum of |w| |x|."""


@dataclass
class Layer:
    """A layer as it is stored, and as a float64 matrix per stream."""

    qweight: Tensor
    scales: Tensor
    memories: list[Csr]
    bias: Tensor | None
    shape: tuple[int, int]
    bits: int
    group_size: int
    base: Tensor
    ortho: list[Tensor] = field(default_factory=list)

    def prepare(self, device: str = "cpu", ortho: bool = True) -> Prepared:
        memories = [tuple(part.to(device) for part in memory) for memory in self.memories] if ortho else []
        return prepare(
            self.qweight.to(device),
            self.scales.to(device),
            memories,
            in_features=self.shape[1],
            bits=self.bits,
            group_size=self.group_size,
        )

    def exact_product(self, x: Tensor, alphas: Tensor | None) -> Tensor:
        """float64 product; a memory takes part in the rows whose alpha is not 0."""
        x = x.double().cpu()
        y = x @ self.base.t()
        for index, ortho in enumerate(self.ortho if alphas is not None else []):
            alpha = alphas[index].double().cpu().expand(x.shape[0])
            active = alpha != 0
            y[active] += alpha[active].unsqueeze(1) * (x[active] @ ortho.t())
        return y if self.bias is None else y + self.bias.double()

    def magnitude(self, x: Tensor) -> Tensor:
        """Sum of |w| |x| over both streams."""
        weight = self.base.abs() + sum(ortho.abs() for ortho in self.ortho)
        return x.double().cpu().abs() @ weight.t()


def random_layer(
    out_features: int,
    in_features: int,
    *,
    bits: int = 4,
    group_size: int = 64,
    support: Tensor | float = 0.05,
    memories: int = 1,
    bias: bool = True,
    seed: int = 0,
) -> Layer:
    """A layer with ``support`` (a density, or a mask) distributed among ``memories``."""
    draw = torch.Generator().manual_seed(seed)
    low = 1 << (bits - 1)
    groups = -(-in_features // group_size)
    codes = torch.zeros(out_features, groups * group_size, dtype=torch.int64)
    codes[:, :in_features] = torch.randint(-low, low, (out_features, in_features), generator=draw)
    scales = (torch.rand(out_features, groups, generator=draw) * 0.1 + 0.01).bfloat16()
    base = (codes.view(out_features, groups, -1) * scales.double().unsqueeze(-1)).flatten(1)[:, :in_features]
    if isinstance(support, float):
        support = torch.rand(out_features, in_features, generator=draw) < support
    owner = torch.randint(0, max(1, memories), support.shape, generator=draw)
    layer = Layer(
        qweight=pack_codes(codes, bits),
        scales=scales,
        memories=[],
        bias=None,
        shape=(out_features, in_features),
        bits=bits,
        group_size=group_size,
        base=base.contiguous(),
    )
    for memory in range(memories):
        mask = support & (owner == memory)
        values = torch.randn(mask.shape, generator=draw).bfloat16()
        rowptr = torch.zeros(out_features + 1, dtype=torch.int32)
        rowptr[1:] = mask.sum(1).cumsum(0)
        layer.memories.append((rowptr, mask.nonzero()[:, 1].to(torch.int32), values[mask]))
        layer.ortho.append(values.double() * mask)
    if bias:
        layer.bias = torch.randn(out_features, generator=draw).bfloat16()
    return layer


def random_x(rows: int, in_features: int, seed: int = 1) -> Tensor:
    """BF16 activations."""
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed)).bfloat16()


def eighths(rows: int, in_features: int, seed: int = 1) -> Tensor:
    """BF16 multiples of 1/8 up to 8: the sum of a plane is exact, in whatever order it is taken."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randint(-64, 65, (rows, in_features), generator=draw) / 8).bfloat16()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit patterns, the sign of zero and NaN included."""
    integer_dtype = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(integer_dtype), b.contiguous().view(integer_dtype))
