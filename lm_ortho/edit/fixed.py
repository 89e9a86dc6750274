"""Edits without optimisation, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_ortho.edit.interface import EDITS, EditInput
from lm_ortho.errors import UserError
from lm_ortho.projection.lattice import expand_scales, round_to_codes, split_groups


@EDITS.register("none")
def none(inputs: EditInput) -> dict[str, Tensor]:
    """The codes of the projection: rounding alone. A baseline that forgets nothing."""
    return dict(inputs.codes)


@EDITS.register("zero")
def zero(inputs: EditInput) -> dict[str, Tensor]:
    """Zero on the support, as in pruning."""
    return {name: codes.masked_fill(inputs.support[name], 0) for name, codes in inputs.codes.items()}


@EDITS.register("mean")
def mean(inputs: EditInput) -> dict[str, Tensor]:
    """The code nearest to the mean weight of the group, on the support."""
    result = {}
    for name, codes in inputs.codes.items():
        weight = inputs.weights[name]
        width = weight.shape[1]
        counts = split_groups(torch.ones_like(weight), inputs.group_size).sum(-1)
        means = expand_scales(split_groups(weight, inputs.group_size).sum(-1) / counts, inputs.group_size, width)
        mean_codes = round_to_codes(means, inputs.scales[name], inputs.bits, inputs.group_size)
        result[name] = torch.where(inputs.support[name], mean_codes, codes)
    return result


@EDITS.register("w0")
def w0(inputs: EditInput) -> dict[str, Tensor]:
    """The code nearest to the weight before fine-tuning, on the support.

    Raises:
        UserError: when the model before fine-tuning is not known.
    """
    if inputs.base_weights is None:
        raise UserError("edit='w0' needs the model before fine-tuning; pass base= (or peft=, with base=auto)")
    result = {}
    for name, codes in inputs.codes.items():
        base_codes = round_to_codes(inputs.base_weights[name], inputs.scales[name], inputs.bits, inputs.group_size)
        result[name] = torch.where(inputs.support[name], base_codes, codes)
    return result
