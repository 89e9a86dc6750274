"""The two ends of the scale, and the model before fine-tuning: nothing is made, a copy is handed on."""

from __future__ import annotations

import copy

from lm_ortho.baselines.interface import Material, Result, Run, Settings, arxiv, method


@method("unedited", reads="end", objective="the merged model as it is", paper="the end that remembers")
def unedited(material: Material, settings: Settings, run: Run) -> Result:
    """Everything is still there."""
    return Result(copy.deepcopy(material.merged))


@method(
    "never_saw",
    reads="end",
    objective="the same fine-tune without the forget set",
    paper=f"the end that never knew: retraining, the goal of Maini et al. 2024, {arxiv('2401.06121')}",
)
def never_saw(material: Material, settings: Settings, run: Run) -> Result:
    """What forgetting means; no method may look at it."""
    return Result(copy.deepcopy(material.reference))  # type: ignore[arg-type]


@method(
    "unload",
    reads="base",
    objective="the model before fine-tuning: the adapter is taken off",
    paper="the simplest thing one can do who has it",
)
def unload(material: Material, settings: Settings, run: Run) -> Result:
    """All that the fine-tune taught is gone, what should stay among it."""
    return Result(copy.deepcopy(material.base))  # type: ignore[arg-type]
