"""The symmetric lattice of the base stream: one scale per group of input weights, integer codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lm_ortho.streams import code_range

_CLIPS = tuple(1.0 - 0.03 * i for i in range(13))
"""Factors 1.00, 0.97, ..., 0.64 of the largest weight of a group that are tried as the largest value of its codes."""
MAX_UNIT_RATIO = 2.0
"""Largest ratio between the step unit of a layer and its own mean step; all embedded layers are within it."""


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """Reshapes (out_features, in_features) to (out_features, groups, group_size), zeros padding the last group."""
    out, width = weight.shape
    padding = -width % group_size
    return torch.nn.functional.pad(weight, (0, padding)).reshape(out, -1, group_size)


def compute_scales(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Scales (out_features, groups) of the least squared rounding error per group: BF16 values in float32.

    The largest weight of a group is clipped by up to 36 %, by the best of 13 factors. Without clipping one large
    weight would leave few codes for the rest of the group.
    """
    low, high = code_range(bits)
    groups = split_groups(weight.float(), group_size)
    top = groups.abs().amax(-1)
    best = torch.full_like(top, torch.inf)
    scales = torch.ones_like(top)
    for clip in _CLIPS:
        scale = (top * clip / high).bfloat16().float().clamp_min(2.0**-120)
        codes = (groups / scale[..., None]).round().clamp(low, high)
        error = (codes * scale[..., None] - groups).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
    return scales


def expand_scales(scales: Tensor, group_size: int, width: int) -> Tensor:
    """Scales (out_features, groups) as one scale per weight (out_features, in_features)."""
    return scales.repeat_interleave(group_size, dim=1)[:, :width]


def layer_units(scales: Mapping[str, Tensor]) -> dict[str, float]:
    """The step unit of each layer, in which its learning rates are given, from scales (out_features, groups) by layer.

    It is the mean lattice step of all layers, limited to between half and twice the layer's own mean step. Without
    these limits one update would be many steps in a layer whose weights are much smaller than those of the others.
    """
    mean = float(torch.cat([layer_scales.flatten() for layer_scales in scales.values()]).mean())
    layer_means = {name: float(layer_scales.mean()) for name, layer_scales in scales.items()}
    return {name: min(max(mean, step / MAX_UNIT_RATIO), step * MAX_UNIT_RATIO) for name, step in layer_means.items()}


def round_to_codes(weight: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes (out_features, in_features) int8 nearest to ``weight``."""
    low, high = code_range(bits)
    per_weight = expand_scales(scales, group_size, weight.shape[1])
    return (weight.float() / per_weight).round().clamp(low, high).to(torch.int8)


def dequantise(codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Weights (out_features, in_features) in float32 that the codes represent."""
    return codes.float() * expand_scales(scales, group_size, codes.shape[1])
