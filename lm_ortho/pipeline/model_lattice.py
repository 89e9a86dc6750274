"""The lattice of a whole model: scales and codes by layer, and the streams made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lm_ortho.calibration.by_layer import LayerTensors
from lm_ortho.config import Recipe
from lm_ortho.projection import PROJECTIONS
from lm_ortho.projection.lattice import compute_scales, dequantise
from lm_ortho.runtime.progress import ProgressCallback, no_progress
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder
from lm_ortho.streams import BaseStream, LayerStreams, OrthoStream


class Lattice(NamedTuple):
    """Scales (out_features, groups) float32 and codes (out_features, in_features) int8 by layer name.

    Both are empty for 16 bits.
    """

    scales: dict[str, Tensor]
    codes: dict[str, Tensor]


def project_layers(
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    progress: ProgressCallback = no_progress,
    device: str = "cpu",
) -> Lattice:
    """The lattice of these weights, computed on ``device`` and held on the CPU."""
    projection, lattice = PROJECTIONS.get(recipe.projection), Lattice({}, {})
    if recipe.bits == 16:
        return lattice
    for number, (name, weight) in enumerate(weights.items(), 1):
        scales = compute_scales(weight, recipe.bits, recipe.group_size)
        codes = projection(
            weight.to(device),
            scales.to(device),
            moments[name].to(device),
            recipe.bits,
            recipe.group_size,
        )
        lattice.scales[name], lattice.codes[name] = scales, codes.cpu()
        progress("projection", number, len(weights), name)
    return lattice


def project_blocks(
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    progress: ProgressCallback,
    device: str = "cpu",
    resume: ResumeFolder = NO_RESUME,
) -> Lattice:
    """``project_layers`` by transformer block; a block whose state is in ``resume`` is not computed again."""
    lattice = Lattice({}, {})
    for block, names in group_by_block(list(weights)).items():
        state = resume.load(f"lattice-{block}")
        if state is None:
            state = project_layers(
                LayerTensors(names, weights.__getitem__),
                moments,
                recipe,
                progress=_with_offset(progress, len(lattice.codes), len(weights)),
                device=device,
            )
            resume.save(f"lattice-{block}", tuple(state))
        lattice.scales.update(state[0])
        lattice.codes.update(state[1])
    return lattice


def _with_offset(progress: ProgressCallback, offset: int, total: int) -> ProgressCallback:
    return lambda stage, step, _, text: progress(stage, offset + step, total, text)


def group_by_block(names: Sequence[str]) -> dict[str, list[str]]:
    """Layer names by the transformer block they are in: the part of the name up to the first number."""
    blocks = dict[str, list[str]]()
    for name in names:
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        blocks.setdefault(".".join(parts[: number + 1]) if number is not None else "rest", []).append(name)
    return blocks


def make_streams(
    layers: Mapping[str, nn.Linear],
    weights: Mapping[str, Tensor],
    lattice: Lattice,
    *,
    support: Mapping[str, Tensor] | None,
    recipe: Recipe,
) -> dict[str, LayerStreams]:
    """The streams of a lattice, by layer name; without a ``support`` (out, in; bool) there is no ortho stream."""
    streams = {}
    for name, layer in layers.items():
        if recipe.bits == 16:
            base = BaseStream.from_weight(weights[name])
            base_weight = weights[name].bfloat16().float()
        else:
            codes, scales = lattice.codes[name], lattice.scales[name]
            base = BaseStream.from_codes(codes, scales, recipe.bits, recipe.group_size)
            base_weight = dequantise(codes, scales, recipe.group_size)
        ortho = None if support is None else OrthoStream.from_dense(weights[name] - base_weight, support[name])
        bias = None if layer.bias is None else layer.bias.detach().cpu().clone()
        streams[name] = LayerStreams(base, ortho, bias)
    return streams
