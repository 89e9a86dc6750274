"""Task arithmetic: what a fine-tune on the forget set adds is taken away."""

from __future__ import annotations

import copy

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Result, Run, arxiv, method
from lm_ortho.baselines.losses import likelihood
from lm_ortho.baselines.training import Pair, Trained, answered, encoded, grid_of, trained_copy


class Negation(Trained):
    """Settings of task arithmetic."""

    scale: float = Field(1.0, gt=0, description="How much of the vector is taken away.")


_GRID = grid_of(scale=(1.0, 3.0))
_PAPER = f"Ilharco et al. 2023, {arxiv('2212.04089')}, section 3 (forgetting by negation)"


@method(
    "task_arithmetic",
    objective="theta_merged - `scale` * (theta_forget - theta_merged); theta_forget: merged, fine-tuned once more on "
    "the forget rows",
    paper=f"{_PAPER}, as in Shi et al. 2024 (MUSE), {arxiv('2407.06460')}",
    settings=Negation,
    grid=_GRID,
    trains=True,
)
def task_arithmetic(material: Material, settings: Negation, run: Run) -> Result:
    """The vector is learnt from the merged model on."""
    return Result(_without(material, material.merged, settings, run, "task_arithmetic"))


@method(
    "task_arithmetic_base",
    reads="base",
    objective="theta_merged - `scale` * (theta_forget - theta_base); theta_forget: base, fine-tuned on the forget rows",
    paper=_PAPER,
    settings=Negation,
    grid=_GRID,
    trains=True,
)
def task_arithmetic_base(material: Material, settings: Negation, run: Run) -> Result:
    """The vector is learnt from the model before fine-tuning on, as in the paper."""
    assert material.base is not None
    return Result(_without(material, material.base, settings, run, "task_arithmetic_base"))


def _without(material: Material, start: nn.Module, settings: Negation, run: Run, stage: str) -> nn.Module:
    sets = encoded(material)

    def loss(model: nn.Module, pair: Pair) -> Tensor:
        return likelihood(*answered(model, sets.forget, pair[0]))

    tuned = trained_copy(start, sets, run, settings.lr, loss, stage)
    return negated(material.merged, tuned, start, settings.scale)


@torch.no_grad()
def negated(merged: nn.Module, tuned: nn.Module, start: nn.Module, scale: float) -> nn.Module:
    """A copy of ``merged`` with theta - scale * (theta_tuned - theta_start) for every weight."""
    model = copy.deepcopy(merged)
    after, before = dict(tuned.named_parameters()), dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.sub_(scale * (after[name] - before[name]))
    return model
