"""The decomposition of this package as a method: with the base model, and from merged weights alone."""

from __future__ import annotations

import copy

from lm_ortho.baselines.interface import Material, Result, Run, method
from lm_ortho.config import Recipe
from lm_ortho.layer import patch
from lm_ortho.pipeline.build import make_metadata
from lm_ortho.pipeline.decomposition import decompose

_OBJECTIVE = (
    "the steps of [method.md](method.md): a target, an objective, attribution, a support of `density` of the weights, "
    "an edit on the INT4 lattice; measured at any alpha, forgets at 0"
)


@method("ortho", reads="base", objective=_OBJECTIVE, paper="this package, [method.md](method.md)", settings=Recipe)
def ortho(material: Material, settings: Recipe, run: Run) -> Result:
    """Target a: target distributions of the base model after a fine-tune on the retain rows."""
    return _run_decomposition(material, settings, run)


@method(
    "ortho_merged",
    objective=f"{_OBJECTIVE}; the target comes from the merged model itself",
    paper="this package, [method.md](method.md), targets b to d",
    settings=Recipe,
)
def ortho_merged(material: Material, settings: Recipe, run: Run) -> Result:
    """Targets b and c: target distributions that the merged model gives itself."""
    return _run_decomposition(material, settings, run)


def _run_decomposition(material: Material, settings: Recipe, run: Run) -> Result:
    """A patched copy of the merged model. Alpha is no setting: it is set when the result is measured."""
    prompts = {name: value for name, value in material.prompts.items() if name not in settings.model_fields_set}
    recipe = settings.model_copy(update={**prompts, "seed": run.seed})
    # The decomposition restores the merged model, so it is copied afterwards, when the memory for it is free again.
    decomposition = decompose(
        material.merged,
        material.tokenizer,
        material.forget,
        material.retain,
        recipe,
        base_model=material.base,
        progress=run.progress,
        resume=run.resume,
    )
    model = copy.deepcopy(material.merged)
    patch(model, decomposition.streams)
    meta = make_metadata(recipe, "none" if material.base is None else "auto", decomposition.report)
    return Result(model, meta["report"], meta)
