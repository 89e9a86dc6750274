"""Methods of preference optimisation: the answers of the forget set are the rejected ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field
from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Result, Run, arxiv_link, method
from lm_ortho.baselines.losses import dpo_loss, npo_loss, simnpo_loss
from lm_ortho.baselines.training import (
    RetainSettings,
    Term,
    TokenSets,
    compute_answer_logps,
    compute_reference_logps,
    encode_material,
    learning_rate_grid,
    make_retain_term,
    train_copy,
)
from lm_ortho.data.encoding import Example
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError

IDK_ANSWERS = (
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
"""Answers of somebody who does not know; one of them replaces each answer to be forgotten."""


class NpoSettings(RetainSettings):
    """Settings of NPO and IdkDPO."""

    beta: float = Field(
        0.1, gt=0, description="Inverse temperature: the higher, the sooner a forgotten row stops counting."
    )


class SimNpoSettings(RetainSettings):
    """Settings of SimNPO."""

    beta: float = Field(2.5, gt=0, description="Inverse temperature of the log-probabilities per token.")
    gamma: float = Field(0.0, ge=0, description="Margin that the log-probability of an answer has to fall below.")


@method(
    "npo",
    objective="-2/`beta` mean log sigma(-`beta` log(p / p_merged)) over forget rows + `retain` * loss per token of "
    "retain rows",
    paper=f"Zhang et al. 2024, {arxiv_link('2404.05868')}, eq. 3, with its retain term (NPO+RT)",
    settings=NpoSettings,
    grid=learning_rate_grid(retain=(1.0, 4.0)),
    trains=True,
)
def npo(material: Material, settings: NpoSettings, run: Run) -> Result:
    """NPO: the gradient of a row vanishes once the row is forgotten."""
    sets = encode_material(material)
    reference = compute_reference_logps(material.merged, sets.forget, run)

    def forget_loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
        return npo_loss(compute_answer_logps(model, sets.forget, rows)[0], reference[list(rows)], settings.beta)

    return train_with_retain(material, sets, settings, run, forget=Term(forget_loss, (sets.forget,)), stage="npo")


@method(
    "simnpo",
    objective="-2/`beta` mean log sigma(-`beta` log p / number of tokens - `gamma`) over forget rows + `retain` * loss "
    "per token of retain rows",
    paper=f"Fan et al. 2024, {arxiv_link('2410.07163')}, eq. 4",
    settings=SimNpoSettings,
    grid=learning_rate_grid(retain=(1.0, 4.0)),
    trains=True,
)
def simnpo(material: Material, settings: SimNpoSettings, run: Run) -> Result:
    """SimNPO: NPO without a reference, per token."""
    sets = encode_material(material)

    def forget_loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
        logps, tokens = compute_answer_logps(model, sets.forget, rows)
        return simnpo_loss(logps, tokens, settings.beta, settings.gamma)

    return train_with_retain(material, sets, settings, run, forget=Term(forget_loss, (sets.forget,)), stage="simnpo")


@method(
    "idk_dpo",
    objective="-2/`beta` mean log sigma(`beta` (log(p / p_merged) of an *I don't know* - that of the true answer)) "
    "over forget rows + `retain` * loss per token of retain rows",
    paper=f"DPO of Rafailov et al. 2023, {arxiv_link('2305.18290')}, eq. 7, with the answers of "
    f"the *preference optimization* of Maini et al. 2024, {arxiv_link('2401.06121')}",
    settings=NpoSettings,
    grid=learning_rate_grid(retain=(1.0, 4.0)),
    trains=True,
)
def idk_dpo(material: Material, settings: NpoSettings, run: Run) -> Result:
    """IdkDPO: prefers an *I don't know* to the true answer."""
    sets = encode_material(material)
    idk_examples = encode_material(replace(material, forget=replace_answers(material.forget, run.seed))).forget
    term = make_preference_term(material.merged, idk_examples, sets.forget, beta=settings.beta, run=run)
    return train_with_retain(material, sets, settings, run, forget=term, stage="idk_dpo")


def make_preference_term(
    reference_model: nn.Module, preferred: Sequence[Example], rejected: Sequence[Example], *, beta: float, run: Run
) -> Term:
    """The term of DPO: each of the ``preferred`` answers rather than the ``rejected`` one of the same index."""
    preferred_reference, rejected_reference = (
        compute_reference_logps(reference_model, examples, run) for examples in (preferred, rejected)
    )

    def loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
        indices = list(rows)
        preferred_logps, _ = compute_answer_logps(model, preferred, indices)
        rejected_logps, _ = compute_answer_logps(model, rejected, indices)
        return dpo_loss(
            preferred_logps, preferred_reference[indices], rejected_logps, rejected_reference[indices], beta
        )

    return Term(loss, (preferred, rejected))


def train_with_retain(
    material: Material, sets: TokenSets, settings: RetainSettings, run: Run, *, forget: Term, stage: str
) -> Result:
    """Trains the merged model on ``forget`` plus ``settings.retain`` times the loss of the retain rows."""
    model = train_copy(
        material.merged,
        sets,
        run,
        lr=settings.lr,
        forget=forget,
        retain=make_retain_term(sets, settings.retain),
        stage=stage,
    )
    return Result(model)


def replace_answers(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows with a randomly drawn one of ``IDK_ANSWERS`` in place of the answer.

    Raises:
        UserError: for plain text, which has no question.
    """
    refuse_plain_text(rows, "method=idk_dpo", "*I don't know*")
    draw = random.Random(seed)
    return [replace(row, answer=draw.choice(IDK_ANSWERS), secret="") for row in rows]


def refuse_plain_text(rows: Sequence[Row], where: str, answer: str) -> None:
    """Raises ``UserError`` for rows without a question or prompt, which cannot get another ``answer``."""
    if any(not row.context for row in rows):
        raise UserError(f"{where}: plain text among the forget rows has no question to answer with {answer}")
