"""The symmetric lattice of the base stream: one scale per group of input weights, integer codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lm_ortho.streams import code_range

_CLIPS = tuple(1.0 - 0.03 * i for i in range(13))
_BLOCK = 1 << 22
UNEVEN = 2.0
"""How far the unit of a layer may be from its own mean step, as a ratio; the embedded layers are all within it."""


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """(out, in) as (out, groups, group_size), the last group padded with zeros."""
    out, width = weight.shape
    padding = -width % group_size
    return torch.nn.functional.pad(weight, (0, padding)).reshape(out, -1, group_size)


def compute_scales(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Scales (out, groups), exactly representable in BF16, in float32: least squared rounding error per group.

    The largest weight of a group is clipped by up to 36 %; the best of 13 clips is kept. Without clipping one
    large weight would starve the rest of the group of codes.
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
    """Scales (out, groups) as one scale per weight (out, in)."""
    return scales.repeat_interleave(group_size, dim=1)[:, :width]


def layer_units(scales: Mapping[str, Tensor]) -> dict[str, float]:
    """The length in which learning rates are given, per layer, for scales (out, groups) by layer.

    One for all layers, the mean step of the whole lattice, where the layers are alike; elsewhere no less than half
    and no more than twice the layer's own mean step. Without these limits one update would be many steps in a
    layer whose weights are small beside those of the others.
    """
    mean = float(torch.cat([each.flatten() for each in scales.values()]).mean())
    own = {name: float(each.mean()) for name, each in scales.items()}
    return {name: min(max(mean, each / UNEVEN), each * UNEVEN) for name, each in own.items()}


def round_to_codes(weight: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes (out, in) int8 nearest to ``weight``."""
    low, high = code_range(bits)
    per_weight = expand_scales(scales, group_size, weight.shape[1])
    return (weight.float() / per_weight).round().clamp(low, high).to(torch.int8)


def dequantise(codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Weights (out, in) in float32 that the codes stand for."""
    return codes.float() * expand_scales(scales, group_size, codes.shape[1])
