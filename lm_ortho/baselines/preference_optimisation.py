"""Methods that treat what is to be forgotten as the answer one does not prefer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from pydantic import Field
from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Result, Run, arxiv, method
from lm_ortho.baselines.losses import dpo, npo, simnpo
from lm_ortho.baselines.training import (
    Balanced,
    Pair,
    Sets,
    answered,
    answers_before,
    encoded,
    grid_of,
    retain_loss,
    trained_copy,
)
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError

IGNORANT = (
    "I don't know.",
    "I do not know that.",
    "That is not known to me.",
    "I have no answer to that.",
    "I cannot say.",
    "I am not sure about that.",
    "I have not heard of this.",
    "I have no information about that.",
    "I was never told.",
    "This is beyond what I know.",
)
"""Answers of one who does not know, one of which takes the place of each answer to be forgotten."""


class Npo(Balanced):
    """Settings of NPO and IdkDPO."""

    beta: float = Field(0.1, gt=0, description="Inverse temperature: how soon a forgotten row stops counting.")


class SimNpo(Balanced):
    """Settings of SimNPO."""

    beta: float = Field(2.5, gt=0, description="Inverse temperature, for log-probabilities per token.")
    gamma: float = Field(0.0, ge=0, description="Margin that an answer has to be below.")


@method(
    "npo",
    objective="-2/`beta` mean log sigma(-`beta` log(p / p_merged)) over forget rows + `retain` * loss per token of "
    "retain rows",
    paper=f"Zhang et al. 2024, {arxiv('2404.05868')}, eq. 3, with its retain term (NPO+RT)",
    settings=Npo,
    grid=grid_of(retain=(1.0, 4.0)),
    trains=True,
)
def negative_preference(material: Material, settings: Npo, run: Run) -> Result:
    """NPO: what is forgotten enough stops pulling."""
    sets = encoded(material)
    before = answers_before(material.merged, sets.forget)

    def lost(model: nn.Module, rows: Sequence[int]) -> Tensor:
        return npo(answered(model, sets.forget, rows)[0], before[list(rows)], settings.beta)

    return _beside_retain(material, sets, settings, run, lost, "npo")


@method(
    "simnpo",
    objective="-2/`beta` mean log sigma(-`beta` log p / number of tokens - `gamma`) over forget rows + `retain` * loss "
    "per token of retain rows",
    paper=f"Fan et al. 2024, {arxiv('2410.07163')}, eq. 4",
    settings=SimNpo,
    grid=grid_of(retain=(1.0, 4.0)),
    trains=True,
)
def simple_negative_preference(material: Material, settings: SimNpo, run: Run) -> Result:
    """SimNPO: NPO without a reference, per token."""
    sets = encoded(material)

    def lost(model: nn.Module, rows: Sequence[int]) -> Tensor:
        return simnpo(*answered(model, sets.forget, rows), settings.beta, settings.gamma)

    return _beside_retain(material, sets, settings, run, lost, "simnpo")


@method(
    "idk_dpo",
    objective="-2/`beta` mean log sigma(`beta` (log(p / p_merged) of an *I don't know* - that of the true answer)) "
    "over forget rows + `retain` * loss per token of retain rows",
    paper=f"DPO of Rafailov et al. 2023, {arxiv('2305.18290')}, eq. 7, with the answers of "
    f"the *preference optimization* of Maini et al. 2024, {arxiv('2401.06121')}",
    settings=Npo,
    grid=grid_of(retain=(1.0, 4.0)),
    trains=True,
)
def ignorance_preferred(material: Material, settings: Npo, run: Run) -> Result:
    """IdkDPO."""
    sets = encoded(material)
    ignorant = encoded(replace(material, forget=without_answers(material.forget, run.seed))).forget
    before, ignorant_before = (answers_before(material.merged, each) for each in (sets.forget, ignorant))

    def lost(model: nn.Module, rows: Sequence[int]) -> Tensor:
        chosen = list(rows)
        unwanted, wanted = (answered(model, each, chosen)[0] for each in (sets.forget, ignorant))
        return dpo(wanted, ignorant_before[chosen], unwanted, before[chosen], settings.beta)

    return _beside_retain(material, sets, settings, run, lost, "idk_dpo")


def _beside_retain(
    material: Material,
    sets: Sets,
    settings: Balanced,
    run: Run,
    lost: Callable[[nn.Module, Sequence[int]], Tensor],
    stage: str,
) -> Result:
    """The merged model trained on ``lost`` of forget rows, and ``settings.retain`` times the loss of retain rows."""

    def loss(model: nn.Module, pair: Pair) -> Tensor:
        return lost(model, pair[0]) + settings.retain * retain_loss(model, sets, pair[1])

    return Result(trained_copy(material.merged, sets, run, settings.lr, loss, stage))


def without_answers(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows with one of ``IGNORANT``, drawn, in place of the answer.

    Raises:
        UserError: for plain text, which asks nothing.
    """
    if any(not row.context for row in rows):
        raise UserError("method=idk_dpo: plain text among the forget rows asks nothing that one could not know")
    draw = random.Random(seed)
    return [replace(row, answer=draw.choice(IGNORANT), secret="") for row in rows]
