"""``lm_ortho.decompose``: the decomposition of model objects for Python callers, with the checks of the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lm_ortho.config import Recipe
from lm_ortho.data.held_out import describe_split, split_retain_rows
from lm_ortho.data.rows import Row
from lm_ortho.pipeline.build import decompose_sets
from lm_ortho.pipeline.decomposition import Decomposition
from lm_ortho.pipeline.spec import CalibrationSets
from lm_ortho.runtime.progress import ProgressCallback, no_progress
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder
from lm_ortho.streams import DEFAULT_MEMORY


def decompose(
    model: nn.Module,
    tokenizer: Any,
    forget: Sequence[Row] | Mapping[str, Sequence[Row]],
    retain: Sequence[Row],
    recipe: Recipe,
    *,
    held_out: str | Sequence[Row] = "auto",
    base_model: nn.Module | None = None,
    force: bool = False,
    progress: ProgressCallback = no_progress,
    resume: ResumeFolder = NO_RESUME,
) -> Decomposition:
    """Splits the linear layers of a merged model into a base stream and an ortho stream.

    Args:
        model: the merged model in float32 (BF16-representable weights); its weights are the same afterwards.
        forget: the forget set, what alpha=0 must not know; or one for each memory, by name.
        retain: the retain set, what must not change; some rows of the same form as ``forget`` about other subjects.
        held_out: retain rows that the calibration does not read: ``auto``, ``none``, rows or a source of rows, as in
            ``lm_ortho.data.held_out.split_retain_rows``, which returns them for a measurement. The report says how many
            they are.
        base_model: the model before fine-tuning, if it is known; decides the target distribution.
        force: decompose a model although nothing says that it knows the forget rows.
        progress: called with stage, step, number of steps, text.
        resume: the folder of states from which a run with the same arguments resumes; the caller clears it when the
            result is saved.

    Raises:
        UserError: for a model that does not know the forget rows, an unknown sieve, projection or edit, empty or
            identical sets, NaN weights or other than float32.
    """
    named = forget if isinstance(forget, Mapping) else {DEFAULT_MEMORY: forget}
    split = split_retain_rows(retain, held_out)
    sets = CalibrationSets({name: list(rows) for name, rows in named.items()}, split.calibration)
    progress("held out", 1, 1, describe_split(split, held_out))
    options: dict[str, Any] = {"base_model": base_model, "force": force, "progress": progress, "resume": resume}
    decomposition = decompose_sets(model, tokenizer, sets, recipe=recipe, **options)
    decomposition.report["held_out"] = len(split.held_out)
    return decomposition
