"""Edits without optimisation."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_ortho.edit.interface import EDITS, EditInput
from lm_ortho.errors import UserError
from lm_ortho.projection.lattice import expand_scales, round_to_codes, split_groups


@EDITS.register("none")
def none(given: EditInput) -> dict[str, Tensor]:
    """The codes of W: rounding alone. Forgets nothing; a baseline."""
    return dict(given.codes)


@EDITS.register("zero")
def zero(given: EditInput) -> dict[str, Tensor]:
    """Zero on the support, as pruning does."""
    return {name: codes.masked_fill(given.support[name], 0) for name, codes in given.codes.items()}


@EDITS.register("mean")
def mean(given: EditInput) -> dict[str, Tensor]:
    """The code nearest to the mean weight of the group."""
    result = {}
    for name, codes in given.codes.items():
        weight = given.weights[name]
        width = weight.shape[1]
        counts = split_groups(torch.ones_like(weight), given.group_size).sum(-1)
        means = expand_scales(split_groups(weight, given.group_size).sum(-1) / counts, given.group_size, width)
        mean_codes = round_to_codes(means, given.scales[name], given.bits, given.group_size)
        result[name] = torch.where(given.support[name], mean_codes, codes)
    return result


@EDITS.register("w0")
def w0(given: EditInput) -> dict[str, Tensor]:
    """The quantised weights before fine-tuning. Raises ``UserError`` when they are not known."""
    if given.base_weights is None:
        raise UserError("edit='w0' needs the model before fine-tuning; pass base= (or peft=, with base=auto)")
    result = {}
    for name, codes in given.codes.items():
        before = round_to_codes(given.base_weights[name], given.scales[name], given.bits, given.group_size)
        result[name] = torch.where(given.support[name], before, codes)
    return result
