"""The decomposition of this package, as a method: with the model before fine-tuning, and from merged weights alone."""

from __future__ import annotations

import copy

from lm_ortho.baselines.interface import Material, Result, Run, method
from lm_ortho.config import Recipe
from lm_ortho.layer import patch
from lm_ortho.pipeline.build import meta_for
from lm_ortho.pipeline.decomposition import decompose

_OBJECTIVE = (
    "the steps of [method.md](method.md): a target, an objective, attribution, a support of `density` of the weights, "
    "an edit on the INT4 lattice; measured at any alpha, forgets at 0"
)


@method("ortho", reads="base", objective=_OBJECTIVE, paper="this package, [method.md](method.md)", settings=Recipe)
def ortho(material: Material, settings: Recipe, run: Run) -> Result:
    """Target a: what the base model says once it was taught the retain rows."""
    return _decomposed(material, settings, run)


@method(
    "ortho_merged",
    objective=f"{_OBJECTIVE}; the target comes from the merged model itself",
    paper="this package, [method.md](method.md), targets b to d",
    settings=Recipe,
)
def ortho_merged(material: Material, settings: Recipe, run: Run) -> Result:
    """Targets b and c."""
    return _decomposed(material, settings, run)


def _decomposed(material: Material, settings: Recipe, run: Run) -> Result:
    """A patched copy of the merged model; alpha is no setting, it is chosen when the result is measured."""
    recipe = settings.model_copy(update={"seed": run.seed})
    model = copy.deepcopy(material.merged)
    made = decompose(
        model, material.tokenizer, material.forget, material.retain, recipe,
        base_model=material.base, progress=run.progress, resume=run.resume,
    )  # fmt: skip
    patch(model, made.streams)
    meta = meta_for(recipe, "none" if material.base is None else "auto", made.report)
    return Result(model, meta["report"], meta)
