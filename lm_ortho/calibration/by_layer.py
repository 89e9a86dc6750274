"""Tensors by layer name that are not all held at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lm_ortho.calibration.activations import input_moments
from lm_ortho.calibration.examples import Example

MOMENT_BYTES = 2**31
"""Second moments that are held at once, in bytes."""


class ByLayer(Mapping[str, Tensor]):
    """A mapping whose values are made each time they are asked for."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = tuple(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def snapshot(layers: Mapping[str, nn.Linear]) -> ByLayer:
    """The weights (out, in; float32) as they are now, on the CPU, held in BF16 where that changes nothing."""
    held = {name: _held(layer.weight.detach()) for name, layer in layers.items()}
    return ByLayer(list(held), lambda name: held[name].float())


def _held(weight: Tensor) -> Tensor:
    short = weight.bfloat16()
    return short.cpu() if torch.equal(short.to(weight.dtype), weight) else weight.cpu().clone()


class Moments(Mapping[str, Tensor]):
    """E[x x^T] (in, in) of the inputs of each layer, made for as many layers in one pass as ``MOMENT_BYTES`` hold.

    The last pass is kept. Read in the order of the layers, and at the weights they are meant for.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Linear], examples: Sequence[Example], limit: int = MOMENT_BYTES
    ) -> None:
        self._model, self._layers, self._examples = model, layers, examples
        self._part: dict[str, int] = {}
        self._held: dict[str, Tensor] = {}
        part, size = 0, 0
        for name, layer in layers.items():
            own = 4 * layer.in_features**2
            if size and size + own > limit:
                part, size = part + 1, 0
            self._part[name], size = part, size + own

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._held:
            part = self._part[name]
            self._held = {}  # before the next ones are made
            chosen = {other: self._layers[other] for other, number in self._part.items() if number == part}
            self._held = input_moments(self._model, chosen, self._examples)
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def passes(self) -> int:
        """How often the documents go through the model for all layers."""
        return 1 + max(self._part.values(), default=-1)
