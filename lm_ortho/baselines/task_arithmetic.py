"""Task arithmetic: subtracts the change that a fine-tune on the forget set makes to the weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Result, Run, arxiv_link, method
from lm_ortho.baselines.losses import nll_loss
from lm_ortho.baselines.training import (
    Term,
    TrainingSettings,
    compute_answer_logps,
    encode_material,
    learning_rate_grid,
    train_copy,
)


class NegationSettings(TrainingSettings):
    """Settings of task arithmetic."""

    scale: float = Field(1.0, gt=0, description="Factor of the task vector that is subtracted.")


_GRID = learning_rate_grid(scale=(1.0, 3.0))
_PAPER = f"Ilharco et al. 2023, {arxiv_link('2212.04089')}, section 3 (forgetting by negation)"


@method(
    "task_arithmetic",
    objective="theta_merged - `scale` * (theta_forget - theta_merged); theta_forget: merged, fine-tuned once more on "
    "the forget rows",
    paper=f"{_PAPER}, as in Shi et al. 2024 (MUSE), {arxiv_link('2407.06460')}",
    settings=NegationSettings,
    grid=_GRID,
    trains=True,
)
def task_arithmetic(material: Material, settings: NegationSettings, run: Run) -> Result:
    """The task vector comes from a fine-tune of the merged model."""
    return Result(_negate_task(material, material.merged, settings, run, "task_arithmetic"))


@method(
    "task_arithmetic_base",
    reads="base",
    objective="theta_merged - `scale` * (theta_forget - theta_base); theta_forget: base, fine-tuned on the forget rows",
    paper=_PAPER,
    settings=NegationSettings,
    grid=_GRID,
    trains=True,
)
def task_arithmetic_base(material: Material, settings: NegationSettings, run: Run) -> Result:
    """The task vector comes from a fine-tune of the base model, as in the paper."""
    assert material.base is not None
    return Result(_negate_task(material, material.base, settings, run, "task_arithmetic_base"))


def _negate_task(material: Material, start: nn.Module, settings: NegationSettings, run: Run, stage: str) -> nn.Module:
    """Fine-tunes ``start`` on the forget rows and subtracts its change from the merged weights."""
    sets = encode_material(material)

    def loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
        return nll_loss(*compute_answer_logps(model, sets.forget, rows))

    forget_model = train_copy(start, sets, run, lr=settings.lr, forget=Term(loss, (sets.forget,)), stage=stage)
    return subtract_task_vector(material.merged, forget_model, start, settings.scale)


@torch.no_grad()
def subtract_task_vector(merged: nn.Module, forget_model: nn.Module, start: nn.Module, scale: float) -> nn.Module:
    """A copy of ``merged`` with theta - scale * (theta_forget - theta_start) for every weight."""
    model = copy.deepcopy(merged)
    after, before = dict(forget_model.named_parameters()), dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.sub_(scale * (after[name] - before[name]))
    return model
