"""Mappings from layer names to tensors that are not all in memory at the same time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lm_ortho.calibration.activations import BlockMoments, input_moments
from lm_ortho.calibration.by_block import supports_blockwise
from lm_ortho.data.encoding import Example
from lm_ortho.runtime.precision import transformer_blocks

MOMENT_BYTES = 2**31
"""Memory limit in bytes for the second moments that are stored at the same time."""


SMALL_MOMENT_BYTES = 2**26
"""Memory in bytes up to which second moments stay in memory after the projection."""


class LayerTensors(Mapping[str, Tensor]):
    """A mapping that computes a value at each access, by calling ``make`` with the name."""

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
    """Returns copies of the present weights (out_features, in_features), float32, on the CPU.

    They are stored in BF16 where that is lossless.
    """
    copies = {name: _copy_to_cpu(layer.weight.detach()) for name, layer in layers.items()}
    return LayerTensors(list(copies), lambda name: copies[name].float())


def _copy_to_cpu(weight: Tensor) -> Tensor:
    bf16_weight = weight.bfloat16()
    return bf16_weight.cpu() if torch.equal(bf16_weight.to(weight.dtype), weight) else weight.cpu().clone()


class InputMoments(Mapping[str, Tensor]):
    """E[x x^T] (in_features, in_features) of the inputs of each layer, computed group by group of layers.

    At most ``limit`` bytes of moments, or those of one block, are stored at the same time: the group accessed last.
    If all fit, one pass of the documents through the model computes them. If not, the documents go through the model
    one block at a time, where the model supports that; else one pass is made for every group of layers whose moments
    fit into ``limit``. Access the layers in their order, and while the model has the weights that the moments are for.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Linear], examples: Sequence[Example], limit: int = MOMENT_BYTES
    ) -> None:
        self._model, self._layers, self._examples = model, layers, examples
        self._moments: dict[str, Tensor] = {}
        self._block_moments: BlockMoments | None = None
        self._group_by_layer, self._block_by_layer = _group_layers(layers, list(layers), limit), dict[str, int]()
        if self.passes == 1:
            return
        blocks = transformer_blocks(model)
        if blocks and supports_blockwise(model, blocks, examples):
            self._block_moments = BlockMoments(model, blocks, examples)
            block_by_module = _exclusive_blocks(model, blocks)
            self._block_by_layer = {
                name: block_by_module[id(layer)] for name, layer in layers.items() if id(layer) in block_by_module
            }
            outside_blocks = [name for name in layers if name not in self._block_by_layer]
            self._group_by_layer = _group_layers(layers, outside_blocks, limit)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._moments:
            self._moments = {}  # free the old moments before the new ones are computed
            self._moments = self._compute_group(name)
        return self._moments[name]

    @property
    def are_small(self) -> bool:
        """Whether the moments of all layers have ``SMALL_MOMENT_BYTES`` at most, if no two layers share an input."""
        return sum(4 * layer.in_features**2 for layer in self._layers.values()) <= SMALL_MOMENT_BYTES

    def release(self) -> None:
        """Frees moments that are not small, and inputs of blocks; a later access computes them again."""
        if not self.are_small:
            self._moments = {}
        if self._block_moments is not None:
            self._block_moments.release()

    def _compute_group(self, name: str) -> dict[str, Tensor]:
        """Computes the moments of the layers that are in the same block or group as ``name``."""
        in_block = name in self._block_by_layer
        groups = self._block_by_layer if in_block else self._group_by_layer
        layers = {other: self._layers[other] for other, number in groups.items() if number == groups[name]}
        if in_block and self._block_moments is not None:
            return self._block_moments.compute(groups[name], layers)
        return input_moments(self._model, layers, self._examples)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def passes(self) -> int:
        """Number of passes of the documents through the model that all layers together need."""
        return len(set(self._group_by_layer.values())) + bool(self._block_by_layer)


def _exclusive_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[int, int]:
    """Returns the block index of every module that occurs in one block only, by the id of the module."""
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    block_by_module = dict[int, int]()
    for number, block in enumerate(blocks):
        uses_inside = Counter(id(module) for _, module in block.named_modules(remove_duplicate=False))
        block_by_module |= {key: number for key, count in uses_inside.items() if count == uses[key]}
    return block_by_module


def _group_layers(layers: Mapping[str, nn.Linear], names: Sequence[str], limit: int) -> dict[str, int]:
    """Returns a group number for each name; neighbours share one while their moments fit into ``limit`` bytes."""
    groups, group, group_bytes = dict[str, int](), 0, 0
    for name in names:
        moment_bytes = 4 * layers[name].in_features ** 2
        if group_bytes and group_bytes + moment_bytes > limit:
            group, group_bytes = group + 1, 0
        groups[name], group_bytes = group, group_bytes + moment_bytes
    return groups
