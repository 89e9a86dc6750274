"""The decomposition of a model with one memory: the steps in order."""

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
    """The result: streams by layer name, and the report."""

    streams: dict[str, LayerStreams]
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
        forget: the forget set, what alpha=0 must not know.
        retain: the retain set, what must not change; some rows of the same form as ``forget`` about other subjects.
        base_model: the model before fine-tuning, if it is known; decides the target distribution.
        progress: called with stage, step, number of steps, text.
        resume: the folder of states from which a run with the same arguments resumes; the caller clears it when the
            result is saved.

    Raises:
        UserError: for an unknown sieve, projection or edit, empty or identical sets, NaN weights or other than float32.
    """
    start_time = time.perf_counter()
    check_recipe(recipe, base_known=base_model is not None)
    # 1. Layers, rows and scales; statistics, target and objective follow when they are needed.
    with Workbench(
        model, tokenizer, forget, retain, recipe=recipe, base_model=base_model, progress=progress, resume=resume
    ) as bench:
        # 2. Score every weight, and select the support.
        support = bench.select_support(recipe.sieve, recipe.density, recipe.steps)
        # 3. Round the other weights to the lattice.
        lattice = bench.project(support)
        # 4. Edit the codes on the support.
        codes = bench.edit_codes(recipe.edit, lattice, support, steps=recipe.steps)
        # 5. Put base stream and ortho stream together.
        streams, report = bench.make_streams(codes, support), bench.report(codes, support)
    return Decomposition(streams, report | {"seconds": round(time.perf_counter() - start_time, 1)})


def check_recipe(recipe: Recipe, *, base_known: bool) -> None:
    """Raises ``UserError`` for unknown names, impossible combinations, and those that need an unknown base model."""
    for registry, name in ((SIEVES, recipe.sieve), (PROJECTIONS, recipe.projection), (EDITS, recipe.edit)):
        registry.get(name)
    if recipe.bits == 16 and recipe.edit != "none":
        default = "the default " if "edit" not in recipe.model_fields_set else ""
        raise UserError(
            f"bits=16 has no lattice, on which {default}edit={recipe.edit!r} works: add edit=none, which leaves the "
            "weights as they are, or use bits=3, 4 or 8"
        )
    if recipe.sieve == "oracle" and recipe.edit != "w0":
        raise UserError(f"edit={recipe.edit!r}: sieve=oracle scores weights along the path to W0; use it with edit=w0")
    if recipe.edit == "w0" and not base_known:
        raise UserError("edit='w0' needs the model before fine-tuning; pass base= (or peft=, with base=auto)")
