"""Tensors by layer name that are not all held at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lm_ortho.calibration.activations import BlockMoments, input_moments
from lm_ortho.calibration.by_block import goes_by_block
from lm_ortho.data.encoding import Example
from lm_ortho.runtime.precision import transformer_blocks

MOMENT_BYTES = 2**31
"""Second moments that are held at once, in bytes."""


class LayerTensors(Mapping[str, Tensor]):
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


def snapshot_weights(layers: Mapping[str, nn.Linear]) -> LayerTensors:
    """The weights (out, in; float32) as they are now, on the CPU, held in BF16 where that changes nothing."""
    held = {name: _held(layer.weight.detach()) for name, layer in layers.items()}
    return LayerTensors(list(held), lambda name: held[name].float())


def _held(weight: Tensor) -> Tensor:
    short = weight.bfloat16()
    return short.cpu() if torch.equal(short.to(weight.dtype), weight) else weight.cpu().clone()


class InputMoments(Mapping[str, Tensor]):
    """E[x x^T] (in, in) of the inputs of each layer, of which ``limit`` bytes, or those of one block, are held at once.

    Where they are more, the documents are taken through the model one block at a time, if it is a model that can be
    gone through like that; else as often as it takes, each time for as many layers as ``limit`` holds. The last ones
    are kept. Read in the order of the layers, and at the weights they are meant for.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Linear], examples: Sequence[Example], limit: int = MOMENT_BYTES
    ) -> None:
        self._model, self._layers, self._examples = model, layers, examples
        self._held: dict[str, Tensor] = {}
        self._part, self._block = _cut(layers, list(layers), limit), dict[str, int]()
        if self.passes == 1:
            return
        blocks = transformer_blocks(model)
        if blocks and goes_by_block(model, blocks, examples):
            self._by_block = BlockMoments(model, blocks, examples)
            own = _owners(model, blocks)
            self._block = {name: own[id(layer)] for name, layer in layers.items() if id(layer) in own}
            self._part = _cut(layers, [name for name in layers if name not in self._block], limit)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._held:
            among = self._block if name in self._block else self._part
            self._held = {}  # before the next ones are made
            chosen = {other: self._layers[other] for other, number in among.items() if number == among[name]}
            self._held = (
                self._by_block.of(among[name], chosen)
                if among is self._block
                else input_moments(self._model, chosen, self._examples)
            )
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def passes(self) -> int:
        """How often the documents go through the model for all layers."""
        return len(set(self._part.values())) + bool(self._block)


def _owners(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[int, int]:
    """The number of its block for each module that one block has to itself, by id."""
    places = Counter(id(part) for _, part in model.named_modules(remove_duplicate=False))
    found = dict[int, int]()
    for number, block in enumerate(blocks):
        inside = Counter(id(part) for _, part in block.named_modules(remove_duplicate=False))
        found |= {key: number for key, count in inside.items() if count == places[key]}
    return found


def _cut(layers: Mapping[str, nn.Linear], names: Sequence[str], limit: int) -> dict[str, int]:
    """A number for each name, the same for neighbours whose moments ``limit`` bytes hold."""
    parts, part, size = dict[str, int](), 0, 0
    for name in names:
        own = 4 * layers[name].in_features ** 2
        if size and size + own > limit:
            part, size = part + 1, 0
        parts[name], size = part, size + own
    return parts
