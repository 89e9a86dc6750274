"""Methods that ascend the loss of the forget set, or descend the loss of the retain set alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Result, Run, arxiv_link, method
from lm_ortho.baselines.losses import ascent_loss, nll_loss
from lm_ortho.baselines.training import (
    LEARNING_RATES,
    RetainSettings,
    Term,
    TokenSets,
    TrainingSettings,
    compute_answer_logps,
    encode_material,
    learning_rate_grid,
    make_retain_term,
    train_copy,
)


@method(
    "gradient_ascent",
    objective="minimises mean log p(y given x) over forget rows; no retain row is read",
    paper=f"Jang et al. 2023, {arxiv_link('2210.01504')}, eq. 1",
    settings=TrainingSettings,
    grid=[{"lr": rate} for rate in (1e-6, 3e-6, 1e-5, *LEARNING_RATES)],
    trains=True,
)
def gradient_ascent(material: Material, settings: TrainingSettings, run: Run) -> Result:
    """Gradient ascent (GA). Its grid has lower learning rates: nothing else limits the ascent."""
    sets = encode_material(material)

    def loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
        return ascent_loss(compute_answer_logps(model, sets.forget, rows)[0])

    term = Term(loss, (sets.forget,))
    return Result(train_copy(material.merged, sets, run, lr=settings.lr, forget=term, stage="gradient_ascent"))


@method(
    "grad_diff",
    objective="- loss per token of forget rows + `retain` * loss per token of retain rows",
    paper=f"Liu et al. 2022, {arxiv_link('2203.12817')}; *gradient difference* of "
    f"Maini et al. 2024, {arxiv_link('2401.06121')}",
    settings=RetainSettings,
    grid=learning_rate_grid(retain=(1.0, 4.0)),
    trains=True,
)
def grad_diff(material: Material, settings: RetainSettings, run: Run) -> Result:
    """Gradient difference (GradDiff): ascends the forget loss and descends the retain loss."""
    sets = encode_material(material)

    def loss(model: nn.Module, rows: Sequence[int]) -> Tensor:
        return -nll_loss(*compute_answer_logps(model, sets.forget, rows))

    model = train_copy(
        material.merged,
        sets,
        run,
        lr=settings.lr,
        forget=Term(loss, (sets.forget,)),
        retain=make_retain_term(sets, settings.retain),
        stage="grad_diff",
    )
    return Result(model)


@method(
    "retain_tuning",
    objective="loss per token of retain rows; no forget row is read",
    paper=f"*fine-tuning* of Golatkar et al. 2020, {arxiv_link('1911.04933')}",
    settings=TrainingSettings,
    grid=[{"lr": rate} for rate in LEARNING_RATES],
    trains=True,
)
def retain_tuning(material: Material, settings: TrainingSettings, run: Run) -> Result:
    """Fine-tunes the merged model on the retain rows, so that the forget set may be forgotten meanwhile."""
    return Result(_train_on_retain(material.merged, encode_material(material), settings, run, "retain_tuning"))


@method(
    "retrain",
    reads="base",
    objective="loss per token of retain rows, from the model before fine-tuning on; no forget row is read",
    paper=f"retraining, as far as the calibration rows go: Bourtoule et al. 2021, {arxiv_link('1912.03817')}",
    settings=TrainingSettings,
    grid=[{"lr": rate} for rate in LEARNING_RATES],
    trains=True,
)
def retrain(material: Material, settings: TrainingSettings, run: Run) -> Result:
    """Fine-tunes the base model on the retain rows: whatever else the first fine-tune taught is lost."""
    assert material.base is not None
    return Result(_train_on_retain(material.base, encode_material(material), settings, run, "retrain"))


def _train_on_retain(start: nn.Module, sets: TokenSets, settings: TrainingSettings, run: Run, stage: str) -> nn.Module:
    """Trains a copy of ``start`` on the retain rows alone."""
    return train_copy(start, sets, run, lr=settings.lr, retain=make_retain_term(sets), stage=stage)
