"""Plain INT4: rounding alone, in the hope that a memory does not survive it."""

from __future__ import annotations

import copy

from pydantic import Field

from lm_ortho.baselines.interface import Material, Result, Run, Settings, arxiv, method
from lm_ortho.baselines.training import encoded
from lm_ortho.calibration.by_layer import InputMoments, snapshot_weights
from lm_ortho.config import Recipe, make_recipe
from lm_ortho.layer import find_linear, patch
from lm_ortho.layer.linear_form import linear_form
from lm_ortho.pipeline.workbench import make_streams, projected


class Lattice(Settings):
    """Settings of both; the lattice is that of a base stream."""

    bits: int = Field(4, ge=3, le=8, description="Width of a code: 3, 4 or 8.")
    group_size: int = Field(64, ge=8, description="Weights of a row that share a scale, a multiple of 8.")


@method(
    "int4_rtn",
    objective="every weight goes to the nearest code; no row is read",
    paper=f"round to nearest, the baseline of Frantar et al. 2023, {arxiv('2210.17323')}",
    settings=Lattice,
)
def int4_rtn(material: Material, settings: Lattice, run: Run) -> Result:
    """Round to nearest."""
    return _rounded(material, settings, run, "rtn")


@method(
    "int4_gptq",
    objective="argmin over codes of ||(Q - W) X||, column by column, on retain rows; no forget row is read",
    paper=f"Frantar et al. 2023, {arxiv('2210.17323')}, eq. 1",
    settings=Lattice,
)
def int4_gptq(material: Material, settings: Lattice, run: Run) -> Result:
    """GPTQ."""
    return _rounded(material, settings, run, "gptq")


def _rounded(material: Material, settings: Lattice, run: Run, projection: str) -> Result:
    """A model patched with base streams that have no ortho stream: codes and scales are saved as they are."""
    recipe: Recipe = make_recipe(projection=projection, **settings.model_dump())
    model, sets = copy.deepcopy(material.merged).requires_grad_(False), encoded(material)
    device = next(model.parameters()).device.type
    with linear_form(model):
        layers = find_linear(model)
        weights = snapshot_weights(layers)
        scales, codes = projected(weights, InputMoments(model, layers, sets.retain), recipe, run.progress, device)
        streams = make_streams(layers, weights, codes, scales, None, recipe)
    patch(model, streams)
    return Result(model, {"projection": projection})
