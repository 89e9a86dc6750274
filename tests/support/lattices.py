"""The lattice around a support, computed again from a model and its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lm_ortho.calibration.by_layer import InputMoments, snapshot_weights
from lm_ortho.config import Recipe
from lm_ortho.data.logits import selected_logits
from lm_ortho.data.rows import Row
from lm_ortho.layer.linear_form import linear_form
from lm_ortho.pipeline.model_lattice import compute_layer_scales, project_layers
from lm_ortho.pipeline.preparation import encode_sets
from lm_ortho.projection.lattice import dequantise
from lm_ortho.runtime.precision import select_attention
from lm_ortho.streams import LayerStreams


def project_around(
    model: nn.Module,
    tokenizer: Any,
    sets: tuple[Sequence[Row], Sequence[Row]],
    *,
    recipe: Recipe,
    support: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The weights (out, in) of the lattice before any edit, by layer name; ``sets`` are forget and retain rows."""
    sets_of_ids = encode_sets(model, tokenizer, *sets, recipe=recipe)
    with linear_form(model), selected_logits(model), select_attention(model, sets_of_ids.max_tokens):
        layers: dict[str, Any] = {name: model.get_submodule(name) for name in support}
        weights = snapshot_weights(layers)
        scales = compute_layer_scales(weights, recipe)
        moments = InputMoments(model, layers, sets_of_ids.retain)
        codes = project_layers(weights, moments, scales, recipe=recipe, exact=support)
    return {name: dequantise(codes[name], scales[name], recipe.group_size) for name in support}


def read_supports(streams: Mapping[str, LayerStreams]) -> dict[str, Tensor]:
    """The positions (out, in; bool) of the one ortho stream of each layer."""
    return {name: layer.ortho.support() for name, layer in streams.items() if layer.ortho is not None}
