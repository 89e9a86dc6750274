"""Pruning of the weights that matter most to the forget set, scored by Wanda or SparseGPT."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from lm_ortho.baselines.interface import Material, Result, Run, Settings, arxiv_link, method
from lm_ortho.baselines.training import count_example_tokens, encode_material
from lm_ortho.calibration.activations import damped_inverse
from lm_ortho.calibration.by_layer import InputMoments
from lm_ortho.layer import find_linear
from lm_ortho.layer.linear_form import linear_form
from lm_ortho.projection.gptq import compensate_errors
from lm_ortho.sieve import select_support

_WEI = (
    f"which Wei et al. 2024, {arxiv_link('2402.05162')}, direct at the weights that one set needs and another does not"
)


class PruningSettings(Settings):
    """Settings of both methods."""

    share: float = Field(0.01, gt=0, le=0.5, description="Share of the weights of the linear layers that become 0.")
    spared: float = Field(
        0.05, ge=0, le=0.5, description="Share of the weights that matter most to the retain rows and are never pruned."
    )


_GRID = [{"spared": spared} for spared in (0.05, 0.0, 0.2)]


@method(
    "wanda",
    objective="|W| ||x|| on forget rows, ranked within each output; the top `share` but for the top `spared` of the "
    "same score on retain rows becomes 0",
    paper=f"score of Sun et al. 2024, {arxiv_link('2306.11695')}, eq. 1, {_WEI}",
    settings=PruningSettings,
    grid=_GRID,
)
def wanda(material: Material, settings: PruningSettings, run: Run) -> Result:
    """Wanda, without compensation for the removed weights."""
    return _prune(material, settings, run, lambda w, h: rank_in_rows(compute_wanda_scores(w, h)), zero_weights)


@method(
    "sparsegpt",
    objective="w^2 / [H^-1]_jj on forget rows, ranked within each matrix; the top `share` but for the top `spared` of "
    "the same score on retain rows becomes 0, the rest of the row compensates for it on retain rows, column by column",
    paper=f"score and update of Frantar and Alistarh 2023, {arxiv_link('2301.00774')}, eq. 3, {_WEI}",
    settings=PruningSettings,
    grid=_GRID,
)
def sparsegpt(material: Material, settings: PruningSettings, run: Run) -> Result:
    """SparseGPT, with compensation for the removed weights on the retain rows."""
    return _prune(material, settings, run, lambda w, h: rank_in_matrix(compute_obs_scores(w, h)), zero_and_compensate)


def compute_wanda_scores(weight: Tensor, moment: Tensor) -> Tensor:
    """Scores (out, in): |W| times the norm of the weight's input; ``moment`` is E[x x^T] (in, in)."""
    return weight.abs() * moment.diagonal().sqrt()


def compute_obs_scores(weight: Tensor, moment: Tensor) -> Tensor:
    """Scores (out, in): w^2 / [H^-1]_jj with damped H, the output error without the weight after compensation."""
    return weight.square() / damped_inverse(moment).diagonal().to(weight)


def rank_in_rows(scores: Tensor) -> Tensor:
    """Ranks in [0, 1) within each row of (out, in).

    Equal ranks of different rows are ordered by the score relative to the largest score of the row.
    """
    width = scores.shape[1]
    rank = scores.argsort(1).argsort(1).to(torch.float64)
    relative_score = scores.double() / scores.amax(1, keepdim=True).clamp_min(1e-30)
    return ((rank + 0.999 * relative_score) / width).float()


def rank_in_matrix(scores: Tensor) -> Tensor:
    """Ranks in [0, 1) within the whole matrix (out, in)."""
    rank = scores.flatten().argsort().argsort().to(torch.float64)
    return (rank / rank.numel()).float().reshape(scores.shape)


def zero_weights(weight: Tensor, mask: Tensor, moment: Tensor) -> Tensor:
    """``weight`` with zeros where ``mask`` (out, in) is true."""
    return weight.masked_fill(mask, 0.0)


def zero_and_compensate(weight: Tensor, mask: Tensor, moment: Tensor) -> Tensor:
    """``weight`` with zeros where ``mask`` (out, in) is true, and the later weights of each row adjusted.

    The adjustment keeps the layer's output as close as possible to that of ``weight``.
    """

    def zero_column(j: int, column: Tensor) -> Tensor:
        return column.masked_fill(mask[:, j], 0.0)

    return compensate_errors(weight, moment, zero_column).to(weight.dtype)


def _prune(
    material: Material,
    settings: PruningSettings,
    run: Run,
    score: Callable[[Tensor, Tensor], Tensor],
    remove: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Result:
    """Prunes a copy of the merged model.

    Scores and input moments are those of the unpruned model; ``settings.share`` counts over all linear layers.
    """
    model, sets = copy.deepcopy(material.merged), encode_material(material)
    run.tokens.add_forward(count_example_tokens(sets.forget + sets.retain))
    with linear_form(model):
        layers = find_linear(model)
        weights = {name: layer.weight.detach().cpu() for name, layer in layers.items()}
        forget, retain = (InputMoments(model, layers, rows) for rows in (sets.forget, sets.retain))
        # 1. Score every weight on both sets.
        forget_scores, retain_scores = dict[str, Tensor](), dict[str, Tensor]()
        for number, (name, weight) in enumerate(weights.items(), 1):
            forget_scores[name], retain_scores[name] = (score(weight, moments[name]) for moments in (forget, retain))
            run.progress("scores", number, len(weights), name)
        # 2. Select the weights with the top forget scores, except those with the top retain scores.
        protected = select_support(retain_scores, settings.spared)
        masks = select_support(forget_scores, settings.share, protected)
        # 3. Remove them; all layers are computed before the first is changed, because moments read the model.
        pruned_weights = {name: remove(weight, masks[name], retain[name]) for name, weight in weights.items()}
        for name, layer in layers.items():
            layer.weight.data.copy_(pruned_weights[name])
    return Result(model, {"removed": sum(int(mask.sum()) for mask in masks.values())})
