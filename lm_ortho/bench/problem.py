"""Random layers to benchmark, with so many copies of each that no weight is in a cache when it is read."""

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
"""Size of all copies of a low-bit layer: more than the last-level cache of common processors."""
MAX_COPIES = 12


@dataclass(frozen=True)
class Shape:
    """A linear layer: rows and columns of its weight, and the model that has it."""

    out_features: int
    in_features: int
    name: str = ""

    @property
    def weights(self) -> int:
        """Number of weights of the matrix."""
        return self.out_features * self.in_features

    @property
    def copies(self) -> int:
        """Number of copies to rotate through."""
        return min(MAX_COPIES, max(2, -(-CACHE_BYTES * 2 // self.weights)))


class Problem:
    """Layers of one shape, all with the same random codes: the values do not change the time."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self._generator = torch.Generator().manual_seed(seed)
        self._size = (shape.out_features, shape.in_features)
        self.codes = torch.randint(-8, 8, self._size, dtype=torch.int8, generator=self._generator)
        groups = -(-shape.in_features // GROUP_SIZE)
        self.scales = torch.rand(shape.out_features, groups, generator=self._generator).add_(0.5).mul_(0.01).bfloat16()
        self._orthos: dict[float, OrthoStream] = {}

    @cached_property
    def base(self) -> BaseStream:
        """The base stream that all copies share."""
        return BaseStream.from_codes(self.codes, self.scales, BITS, GROUP_SIZE)

    def make_ortho(self, density: float) -> OrthoStream:
        """Returns an ortho stream on a random support of exactly this density, rounded down to full weights."""
        if density not in self._orthos:
            count = int(density * self.shape.weights)
            positions = torch.randperm(self.shape.weights, generator=self._generator)[:count].sort().values
            rows = torch.bincount(positions // self.shape.in_features, minlength=self.shape.out_features)
            rowptr = torch.zeros(self.shape.out_features + 1, dtype=torch.int32)
            torch.cumsum(rows, 0, out=rowptr[1:])
            values = torch.randn(count, generator=self._generator).mul_(0.02).bfloat16()
            cols = (positions % self.shape.in_features).to(torch.int32)
            self._orthos[density] = OrthoStream(rowptr, cols, values, self._size)
        return self._orthos[density]

    def make_layers(self, density: float, kernel: str) -> list[OrthoLinear]:
        """Returns one layer per copy, each with its own memory; without an ortho stream at density 0."""
        layers = []
        for _ in range(self.shape.copies):
            base = self.base
            assert base.qweight is not None
            assert base.scales is not None
            base_copy = replace(base, qweight=base.qweight.clone(), scales=base.scales.clone())
            streams = LayerStreams(base_copy, self.make_ortho(density) if density else None)
            layer = OrthoLinear.from_streams(streams, torch.bfloat16)
            layer.kernel = kernel
            layers.append(layer.eval())
        return layers

    def make_dense_weights(self, dtype: torch.dtype) -> list[Tensor]:
        """Returns the weights ``(out_features, in_features)`` of two copies."""
        weight = self.base.dequantise(dtype)
        return [weight.clone() for _ in range(2)]

    def draw_input(self, batch: int) -> Tensor:
        """Draws an input ``(batch, in_features)`` in BF16."""
        return torch.randn(batch, self.shape.in_features, generator=self._generator).bfloat16()
