"""How far the outputs of the layers move with their weights, which makes learning rates of models comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lm_ortho.data.encoding import Example, pad_batch
from lm_ortho.data.logits import first_logits_only
from lm_ortho.runtime.progress import ProgressCallback

MAX_RATE = 0.5
"""The largest learning rate in the step unit of a layer (``projection.lattice.layer_units``)."""


@torch.no_grad()
def measure_output_changes(
    model: nn.Module, layers: Mapping[str, nn.Linear], examples: Sequence[Example], progress: ProgressCallback
) -> dict[str, float]:
    """Returns the change of each layer's outputs, as a share of them, when all its weights move by 1; both RMS.

    It is (out_features E|x|^2 / E|W x|^2)^(1/2) over the tokens of the ``examples``: the signs of the movements count
    as independent. A layer without inputs (an expert that no token of the examples goes to), or whose outputs are
    zero, has 0.

    Raises:
        ValueError: without examples.
    """
    if not examples:
        raise ValueError("examples: at least one is needed")
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in layers}

    def add(name: str, layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        product = output if layer.bias is None else output - layer.bias
        sums[name] += torch.stack([inputs[0].float().square().sum(), product.float().square().sum()]).double().cpu()

    handles = [layer.register_forward_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        with first_logits_only(model):
            for number, example in enumerate(examples, start=1):  # one by one, so that nothing is padding
                model(input_ids=pad_batch([example], next(model.parameters()).device)[0], use_cache=False)
                progress("outputs", number, len(examples), "")
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: float(layer.out_features * inputs / outputs) ** 0.5 if outputs > 0 else 0.0
        for (name, layer), (inputs, outputs) in zip(layers.items(), sums.values(), strict=True)
    }


def peak_rates(lr: float, changes: Mapping[str, float], step_units: Mapping[str, float]) -> dict[str, float]:
    """Returns the peak learning rate of each layer, with which the outputs of all together change by ``lr``.

    It is the same for all layers in their step units. ``changes`` are those of the outputs by a step of 1 in everything
    that moves. They count as independent: their squares add up over the layers; a layer with 0 moves at the common
    rate. So ``lr`` means the same for models of any depth and width.
    """
    change = sum((unit * changes[name]) ** 2 for name, unit in step_units.items()) ** 0.5
    rate = min(MAX_RATE, lr / change) if change > 0 else MAX_RATE
    return {name: rate * unit for name, unit in step_units.items()}
