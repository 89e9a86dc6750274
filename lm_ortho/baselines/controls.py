"""Controls: the two ends of the scale and the base model. Each returns a copy of a model of the material."""

from __future__ import annotations

import copy

from lm_ortho.baselines.interface import Material, Result, Run, Settings, arxiv_link, method


@method("unedited", reads="end", objective="the merged model as it is", paper="the end of the scale that remembers")
def unedited(material: Material, settings: Settings, run: Run) -> Result:
    """The original model, which still holds the memory."""
    return Result(copy.deepcopy(material.merged))


@method(
    "never_saw",
    reads="end",
    objective="the same fine-tune without the forget set",
    paper=f"the end of the scale that never knew: retraining, the goal of "
    f"Maini et al. 2024, {arxiv_link('2401.06121')}",
)
def never_saw(material: Material, settings: Settings, run: Run) -> Result:
    """The retain-only model, which defines forgetting; no other method may read it."""
    return Result(copy.deepcopy(material.reference))  # type: ignore[arg-type]


@method(
    "unload",
    reads="base",
    objective="the model before fine-tuning: the adapter is removed",
    paper="the simplest method for whoever has the base model",
)
def unload(material: Material, settings: Settings, run: Run) -> Result:
    """The base model: everything that the fine-tune taught is lost, also what should stay."""
    return Result(copy.deepcopy(material.base))  # type: ignore[arg-type]
