"""Random layers to multiply with, several of each so that no weight is found in a cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lm_ortho.layer import OrthoLinear
from lm_ortho.streams import BaseStream, LayerStreams, OrthoStream

GROUP_SIZE = 64
BITS = 4
CACHE_BYTES = 96 * 2**20
"""What the copies of a low-bit layer take together: more than the last-level cache of common processors."""
MOST_COPIES = 12


@dataclass(frozen=True)
class Shape:
    """A linear layer: rows of its weight, columns, and where it comes from."""

    out_features: int
    in_features: int
    name: str = ""

    @property
    def weights(self) -> int:
        """Weights of the matrix."""
        return self.out_features * self.in_features

    @property
    def copies(self) -> int:
        """Layers to rotate through."""
        return min(MOST_COPIES, max(2, -(-CACHE_BYTES * 2 // self.weights)))


class Problem:
    """Layers of one shape: the same random codes in every copy, as values do not change the time."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self._random = torch.Generator().manual_seed(seed)
        self._size = (shape.out_features, shape.in_features)
        self.codes = torch.randint(-8, 8, self._size, dtype=torch.int8, generator=self._random)
        groups = -(-shape.in_features // GROUP_SIZE)
        self.scales = torch.rand(shape.out_features, groups, generator=self._random).add_(0.5).mul_(0.01).bfloat16()
        self._orthos: dict[float, OrthoStream] = {}

    @cached_property
    def base(self) -> BaseStream:
        """The base stream of all copies."""
        return BaseStream.from_codes(self.codes, self.scales, BITS, GROUP_SIZE)

    def ortho(self, density: float) -> OrthoStream:
        """A random support of exactly this density, rounded down to whole weights."""
        if density not in self._orthos:
            count = int(density * self.shape.weights)
            places = torch.randperm(self.shape.weights, generator=self._random)[:count].sort().values
            rows = torch.bincount(places // self.shape.in_features, minlength=self.shape.out_features)
            rowptr = torch.zeros(self.shape.out_features + 1, dtype=torch.int32)
            torch.cumsum(rows, 0, out=rowptr[1:])
            values = torch.randn(count, generator=self._random).mul_(0.02).bfloat16()
            cols = (places % self.shape.in_features).to(torch.int32)
            self._orthos[density] = OrthoStream(rowptr, cols, values, self._size)
        return self._orthos[density]

    def layers(self, density: float, kernel: str) -> list[OrthoLinear]:
        """A layer for each copy, with memory of its own; without an ortho stream at density 0."""
        made = []
        for _ in range(self.shape.copies):
            base = self.base
            assert base.qweight is not None
            assert base.scales is not None
            own = replace(base, qweight=base.qweight.clone(), scales=base.scales.clone())
            streams = LayerStreams(own, self.ortho(density) if density else None)
            layer = OrthoLinear.from_streams(streams, torch.bfloat16)
            layer.kernel = kernel
            made.append(layer.eval())
        return made

    def dense(self, dtype: torch.dtype) -> list[Tensor]:
        """The weight of each copy."""
        weight = self.base.dequantize(dtype)
        return [weight.clone() for _ in range(2)]

    def x(self, batch: int) -> Tensor:
        """``(batch, in_features)`` BF16."""
        return torch.randn(batch, self.shape.in_features, generator=self._random).bfloat16()
