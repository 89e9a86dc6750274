"""Pruning of the weights that matter to the forget set: Wanda and SparseGPT, pointed at it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from lm_ortho.baselines.interface import Material, Result, Run, Settings, arxiv, method
from lm_ortho.baselines.training import encoded
from lm_ortho.calibration.activations import damped_inverse
from lm_ortho.calibration.by_layer import InputMoments
from lm_ortho.layer import find_linear
from lm_ortho.layer.linear_form import linear_form
from lm_ortho.projection.gptq import compensated
from lm_ortho.sieve import select_support

_WEI = f"which Wei et al. 2024, {arxiv('2402.05162')}, point at what one set needs and another one does not"


class Pruned(Settings):
    """Settings of both."""

    share: float = Field(0.01, gt=0, le=0.5, description="Share of the weights of the linear layers that become 0.")
    spared: float = Field(
        0.05, ge=0, le=0.5, description="Share that matters most to the retain rows and is left alone."
    )


_GRID = [{"spared": spared} for spared in (0.05, 0.0, 0.2)]


@method(
    "wanda",
    objective="|W| ||x|| on forget rows, ranked within each output; the top `share` but for the top `spared` of the "
    "same score on retain rows becomes 0",
    paper=f"score of Sun et al. 2024, {arxiv('2306.11695')}, eq. 1, {_WEI}",
    settings=Pruned,
    grid=_GRID,
)
def wanda(material: Material, settings: Pruned, run: Run) -> Result:
    """Wanda; nothing makes up for what is removed."""
    return _pruned(material, settings, run, lambda w, h: by_row(wanda_scores(w, h)), zeroed)


@method(
    "sparsegpt",
    objective="w^2 / [H^-1]_jj on forget rows, ranked within each matrix; the top `share` but for the top `spared` of "
    "the same score on retain rows becomes 0, the rest of the row makes up for it on retain rows, column by column",
    paper=f"score and update of Frantar and Alistarh 2023, {arxiv('2301.00774')}, eq. 3, {_WEI}",
    settings=Pruned,
    grid=_GRID,
)
def sparsegpt(material: Material, settings: Pruned, run: Run) -> Result:
    """SparseGPT."""
    return _pruned(material, settings, run, lambda w, h: by_matrix(obs_scores(w, h)), made_up_for)


def wanda_scores(weight: Tensor, moment: Tensor) -> Tensor:
    """|W| times the norm of its input (out, in); ``moment`` is E[x x^T] (in, in)."""
    return weight.abs() * moment.diagonal().sqrt()


def obs_scores(weight: Tensor, moment: Tensor) -> Tensor:
    """w^2 / [H^-1]_jj (out, in), H damped: what the layer's output loses without it, made up for by the rest."""
    return weight.square() / damped_inverse(moment).diagonal().to(weight)


def by_row(scores: Tensor) -> Tensor:
    """Ranks in [0, 1) within each row of (out, in); those of one rank go by the score over the row's largest."""
    width = scores.shape[1]
    rank = scores.argsort(1).argsort(1).to(torch.float64)
    within = scores.double() / scores.amax(1, keepdim=True).clamp_min(1e-30)
    return ((rank + 0.999 * within) / width).float()


def by_matrix(scores: Tensor) -> Tensor:
    """Ranks in [0, 1) within the whole matrix (out, in)."""
    rank = scores.flatten().argsort().argsort().to(torch.float64)
    return (rank / rank.numel()).float().reshape(scores.shape)


def zeroed(weight: Tensor, mask: Tensor, moment: Tensor) -> Tensor:
    """``weight`` without what ``mask`` (out, in) marks."""
    return weight.masked_fill(mask, 0.0)


def made_up_for(weight: Tensor, mask: Tensor, moment: Tensor) -> Tensor:
    """The same, the weights after a removed one in its row changed so that the layer's output stays as it can."""

    def without(j: int, column: Tensor) -> Tensor:
        return column.masked_fill(mask[:, j], 0.0)

    return compensated(weight, moment, without).to(weight.dtype)


def _pruned(
    material: Material,
    settings: Pruned,
    run: Run,
    score: Callable[[Tensor, Tensor], Tensor],
    remove: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Result:
    """Scores and moments are those of the unpruned model; one budget of weights over all linear layers."""
    model, sets = copy.deepcopy(material.merged), encoded(material)
    with linear_form(model):
        layers = find_linear(model)
        weights = {name: layer.weight.detach().cpu() for name, layer in layers.items()}
        forget, retain = (InputMoments(model, layers, rows) for rows in (sets.forget, sets.retain))
        wanted, needed = dict[str, Tensor](), dict[str, Tensor]()
        for number, (name, weight) in enumerate(weights.items(), 1):
            wanted[name], needed[name] = (score(weight, moments[name]) for moments in (forget, retain))
            run.progress("scores", number, len(weights), name)
        masks = select_support(wanted, settings.share, select_support(needed, settings.spared))
        pruned = {name: remove(weight, masks[name], retain[name]) for name, weight in weights.items()}
        for name, layer in layers.items():
            layer.weight.data.copy_(pruned[name])
    return Result(model, {"removed": sum(int(mask.sum()) for mask in masks.values())})
