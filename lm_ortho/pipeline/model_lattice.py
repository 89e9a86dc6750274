"""The lattice of a whole model: scales and codes by layer, and the streams made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from lm_ortho.calibration.by_layer import InputMoments, LayerTensors, snapshot_weights
from lm_ortho.config import Recipe
from lm_ortho.data.encoding import Example
from lm_ortho.layer import find_linear
from lm_ortho.layer.linear_form import linear_form
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


def compute_layer_scales(weights: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The scales (out_features, groups) of every layer; none for 16 bits."""
    if recipe.bits == 16:
        return {}
    return {name: compute_scales(weight, recipe.bits, recipe.group_size) for name, weight in weights.items()}


def project_layers(
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    *,
    recipe: Recipe,
    exact: Mapping[str, Tensor] | None = None,
    progress: ProgressCallback = no_progress,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """The codes (out, in) int8 of these weights by layer name, computed on ``device`` and held on the CPU.

    ``exact`` (out, in; bool) is the support by layer name, or None. There are no codes for 16 bits.
    """
    projection, result = PROJECTIONS.get(recipe.projection), dict[str, Tensor]()
    if recipe.bits == 16:
        return result
    for number, (name, weight) in enumerate(weights.items(), 1):
        codes = projection(
            weight.to(device),
            scales[name].to(device),
            moments[name].to(device),
            bits=recipe.bits,
            group_size=recipe.group_size,
            exact=None if exact is None else exact[name].to(device),
        )
        result[name] = codes.cpu()
        progress("projection", number, len(weights), name)
    return result


def project_blocks(
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    *,
    recipe: Recipe,
    exact: Mapping[str, Tensor] | None = None,
    progress: ProgressCallback,
    device: str = "cpu",
    resume: ResumeFolder = NO_RESUME,
) -> dict[str, Tensor]:
    """``project_layers`` by transformer block; a block whose codes are in ``resume`` is not computed again."""
    result, prefix = dict[str, Tensor](), "plain" if exact is None else "projection"
    for block, names in group_by_block(list(weights)).items():
        codes = resume.load(f"{prefix}-{block}")
        if codes is None:
            codes = project_layers(
                LayerTensors(names, weights.__getitem__),
                moments,
                scales,
                recipe=recipe,
                exact=exact,
                progress=_with_offset(progress, len(result), len(weights)),
                device=device,
            )
            resume.save(f"{prefix}-{block}", codes)
        result.update(codes)
    return result


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


def quantise(
    model: nn.Module,
    examples: Sequence[Example],
    recipe: Recipe,
    *,
    progress: ProgressCallback = no_progress,
    device: str = "cpu",
) -> dict[str, LayerStreams]:
    """Plain quantisation of a model: base streams of its linear layers, by name, with no support and no edit.

    Bits, group size and projection are those of ``recipe``; second moments are those of ``examples``, the retain rows.
    """
    with linear_form(model):
        layers = find_linear(model)
        weights = snapshot_weights(layers)
        moments = InputMoments(model, layers, examples)
        scales = compute_layer_scales(weights, recipe)
        codes = project_layers(weights, moments, scales, recipe=recipe, progress=progress, device=device)
        return make_streams(layers, weights, Lattice(scales, codes), support=None, recipe=recipe)
