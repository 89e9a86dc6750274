"""The one function that goes through the steps of a decomposition in order."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lm_ortho.config import Recipe
from lm_ortho.data.rows import Row
from lm_ortho.edit import EDITS
from lm_ortho.errors import UserError
from lm_ortho.pipeline.workbench import Workbench
from lm_ortho.projection import PROJECTIONS
from lm_ortho.runtime.progress import ProgressCallback, no_progress
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder
from lm_ortho.sieve import SIEVES
from lm_ortho.streams import LayerStreams


@dataclass(frozen=True)
class Decomposition:
    """Streams by layer name, plain rounding of the same lattice without support, and what was decided and why."""

    streams: dict[str, LayerStreams]
    plain: dict[str, LayerStreams]
    report: dict[str, Any]


def decompose(
    model: nn.Module,
    tokenizer: Any,
    forget: Sequence[Row],
    retain: Sequence[Row],
    recipe: Recipe,
    *,
    base_model: nn.Module | None = None,
    progress: ProgressCallback = no_progress,
    resume: ResumeFolder = NO_RESUME,
) -> Decomposition:
    """Splits the linear layers of a merged model into a base stream and an ortho stream.

    Args:
        model: the merged model in float32 (BF16-representable weights); its weights are the same afterwards.
        forget: what alpha=0 must not know.
        retain: documents that must not change, some of the same form as ``forget`` about others.
        base_model: the model before fine-tuning, if it is known; decides the target.
        progress: called with stage, step, steps, text.
        resume: where the run leaves what it has reached, for another one with the same arguments to go on from; the
            caller clears it when the result is safe.

    Raises:
        UserError: for an unknown sieve, projection or edit, empty or identical sets, NaN weights or other than float32.
    """
    began = time.perf_counter()
    check_recipe(recipe, base_model is not None)
    given = model, tokenizer, forget, retain, recipe
    with Workbench(*given, base_model=base_model, progress=progress, resume=resume) as bench:
        support = bench.support(recipe.sieve, recipe.density, recipe.steps)
        codes = bench.edited(recipe.edit, support, recipe.steps)
        streams, plain = bench.streams(codes, support), bench.streams(bench.codes, None)
        report = bench.report(codes, support)
    return Decomposition(streams, plain, report | {"seconds": round(time.perf_counter() - began, 1)})


def check_recipe(recipe: Recipe, base_known: bool) -> None:
    """Raises ``UserError`` for unknown names and for choices that do not go together, or not without a base model."""
    for registry, name in ((SIEVES, recipe.sieve), (PROJECTIONS, recipe.projection), (EDITS, recipe.edit)):
        registry.get(name)
    if recipe.bits == 16 and recipe.edit != "none":
        raise UserError(f"bits=16 passes weights through, so edit={recipe.edit!r} cannot be used; use edit=none")
    if recipe.sieve == "oracle" and recipe.edit != "w0":
        raise UserError(f"edit={recipe.edit!r}: sieve=oracle looks at the way back to W0; use it with edit=w0")
    if recipe.edit == "w0" and not base_known:
        raise UserError("edit='w0' needs the model before fine-tuning; pass base= (or peft=, with base=auto)")
