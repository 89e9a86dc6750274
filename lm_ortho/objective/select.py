"""Selects the best target that the available data allow, and gives the reason."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lm_ortho.data.encoding import Example
from lm_ortho.data.rows import Row
from lm_ortho.objective.distribution import Target, stack
from lm_ortho.objective.loss import DEEPER, GENTLE, Penalty
from lm_ortho.objective.surrogate import surrogate_target
from lm_ortho.objective.swap import swap_target
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TargetChoice:
    """A target with its name (surrogate, swap, resample, hold_down) and the reason for it.

    ``penalty`` and ``retain``, the factor of the retain KL, depend on the kind of target: the surrogate, which was
    never trained on the forget set, pulls away from it harder than the merged model's own predictions do, so more of
    the rest has to be retained.
    """

    target: Target
    name: str
    reason: str
    penalty: Penalty
    retain: float


def select_target(
    merged_model: torch.nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    forget: Sequence[Example],
    retain: Sequence[Example],
    base_model: torch.nn.Module | None,
    steps: int,
    batch_rows: int,
    seed: int,
    progress: ProgressCallback,
    resume: ResumeFolder = NO_RESUME,
) -> TargetChoice:
    """The surrogate if the base model is known, else swapped subjects or resampled words, else held-down tokens.

    ``rows`` are the forget rows, ``forget`` and ``retain`` the encoded rows; ``steps`` and ``batch_rows``
    (forget rows in a step) are those of the edit.
    """
    if base_model is not None:
        probs = surrogate_target(
            merged_model,
            base_model,
            forget,
            retain=retain,
            steps=steps,
            batch_rows=batch_rows,
            seed=seed,
            progress=progress,
            resume=resume,
        )
        return TargetChoice(stack(forget, probs), "surrogate", "the model before fine-tuning is known", DEEPER, 10.0)
    named_rows = sum(row.mentions_subject for row in rows)
    if unnamed_rows := sum(bool(row.subject) for row in rows) - named_rows:
        log.warning(
            "forget: the subject of %d of %d rows does not occur in their text, word for word", unnamed_rows, len(rows)
        )
    target = stack(forget, swap_target(merged_model, tokenizer, rows, forget, seed=seed, progress=progress))
    if named_rows:
        reason = f"merged weights only; {named_rows} of {len(rows)} forget rows name their subject"
        return TargetChoice(target, "swap", reason, GENTLE, 4.0)
    if not any(row.context for row in rows):
        reason = "merged weights only; the forget rows are plain text without a subject"
        return TargetChoice(target, "resample", reason, GENTLE, 4.0)
    reason = "merged weights only and no row names its subject: clearly worse, add `subject` or `base`"
    return TargetChoice(target, "hold_down", reason, GENTLE, 4.0)
