"""Plain INT4 quantisation, to see whether a memory survives rounding alone."""

from __future__ import annotations

import copy

from pydantic import Field

from lm_ortho.baselines.interface import Material, Result, Run, Settings, arxiv_link, method
from lm_ortho.baselines.training import count_example_tokens, encode_material
from lm_ortho.config import Recipe, make_recipe
from lm_ortho.layer import patch
from lm_ortho.pipeline.model_lattice import quantise


class LatticeSettings(Settings):
    """Settings of both methods; the lattice is that of a base stream."""

    bits: int = Field(4, ge=3, le=8, description="Bits per code: 3, 4 or 8.")
    group_size: int = Field(64, ge=8, description="Number of weights of a row that share a scale; a multiple of 8.")


@method(
    "int4_rtn",
    objective="every weight goes to the nearest code; no row is read",
    paper=f"round to nearest, the baseline of Frantar et al. 2023, {arxiv_link('2210.17323')}",
    settings=LatticeSettings,
)
def int4_rtn(material: Material, settings: LatticeSettings, run: Run) -> Result:
    """Round to nearest (RTN)."""
    return _round_to_int4(material, settings, run, "rtn")


@method(
    "int4_gptq",
    objective="argmin over codes of ||(Q - W) X||, column by column from the largest input on, on retain rows; "
    "no forget row is read",
    paper=f"Frantar et al. 2023, {arxiv_link('2210.17323')}, eq. 1",
    settings=LatticeSettings,
)
def int4_gptq(material: Material, settings: LatticeSettings, run: Run) -> Result:
    """GPTQ, calibrated on the retain rows."""
    return _round_to_int4(material, settings, run, "gptq_ordered")


def _round_to_int4(material: Material, settings: LatticeSettings, run: Run, projection: str) -> Result:
    """A model patched with base streams and no ortho streams: codes and scales are saved without another rounding."""
    recipe: Recipe = make_recipe(projection=projection, **settings.model_dump())
    model, sets = copy.deepcopy(material.merged).requires_grad_(False), encode_material(material)
    device = next(model.parameters()).device.type
    if projection != "rtn":  # which rounds without a look at the inputs
        run.tokens.add_forward(count_example_tokens(sets.retain))
    patch(model, quantise(model, sets.retain, recipe, progress=run.progress, device=device))
    return Result(model, {"projection": projection})
