"""UNDIAL: distils the model from itself, with the logit of every true token of the forget answers lowered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Result, Run, arxiv_link, method
from lm_ortho.baselines.losses import adjusted_distillation_loss, mask_predicting_tokens, select_labels, sum_by_row
from lm_ortho.baselines.training import (
    RetainSettings,
    Term,
    encode_material,
    learning_rate_grid,
    make_retain_term,
    train_copy,
)
from lm_ortho.data.encoding import pad_batch
from lm_ortho.data.logits import compute_logits


class UndialSettings(RetainSettings):
    """Settings of UNDIAL. The paper reads no retain rows (``retain=0``) and recommends strengths of 3 to 30."""

    strength: float = Field(10.0, gt=0, description="By how much the logit of the true token is lowered.")


@method(
    "undial",
    objective="cross-entropy per token of forget rows to softmax(z_merged - `strength` at the true token), z: logits, "
    "+ `retain` * loss per token of retain rows",
    paper=f"self-distillation with adjusted logits of Dong et al. 2024, {arxiv_link('2402.10052')}, as in "
    "open-unlearning but at answer tokens only; the retain term is that of the other methods, the paper has none",
    settings=UndialSettings,
    grid=learning_rate_grid(strength=(3.0, 10.0)),
    trains=True,
)
def undial(material: Material, settings: UndialSettings, run: Run) -> Result:
    """UNDIAL: the teacher is the unedited model, so nothing is maximised and the training has an end."""
    sets, teacher = encode_material(material), material.merged

    def forget_loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
        ids, roles = pad_batch([sets.forget[i] for i in rows], next(teacher.parameters()).device)
        mask = mask_predicting_tokens(roles)
        with torch.no_grad():
            teacher_logits = compute_logits(teacher, ids, mask)
        losses = adjusted_distillation_loss(
            compute_logits(model, ids, mask), teacher_logits, select_labels(ids, mask), strength=settings.strength
        )
        return (sum_by_row(losses, mask) / mask.sum(1)).mean()

    model = train_copy(
        material.merged,
        sets,
        run,
        lr=settings.lr,
        forget=Term(forget_loss, (sets.forget,), has_teacher=True),
        retain=make_retain_term(sets, settings.retain),
        stage="undial",
    )
    return Result(model)
