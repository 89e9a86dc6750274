"""Methods that go up the loss of the forget set, or down that of the retain set alone."""

from __future__ import annotations

from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Result, Run, arxiv, method
from lm_ortho.baselines.losses import ascent, likelihood
from lm_ortho.baselines.training import (
    RATES,
    Balanced,
    Pair,
    Sets,
    Trained,
    answered,
    encoded,
    grid_of,
    retain_loss,
    trained_copy,
)


@method(
    "gradient_ascent",
    objective="mean log p(y given x) over forget rows, downwards; no retain row is read",
    paper=f"Jang et al. 2023, {arxiv('2210.01504')}, eq. 1",
    settings=Trained,
    grid=[{"lr": rate} for rate in (1e-6, 3e-6, 1e-5, *RATES)],
    trains=True,
)
def gradient_ascent(material: Material, settings: Trained, run: Run) -> Result:
    """Gradient ascent (GA). The rates of its grid reach lower: nothing but the rate can stop it."""
    sets = encoded(material)

    def loss(model: nn.Module, pair: Pair) -> Tensor:
        return ascent(answered(model, sets.forget, pair[0])[0])

    return Result(trained_copy(material.merged, sets, run, settings.lr, loss, "gradient_ascent"))


@method(
    "grad_diff",
    objective="- loss per token of forget rows + `retain` * loss per token of retain rows",
    paper=f"Liu et al. 2022, {arxiv('2203.12817')}; *gradient difference* of Maini et al. 2024, {arxiv('2401.06121')}",
    settings=Balanced,
    grid=grid_of(retain=(1.0, 4.0)),
    trains=True,
)
def grad_diff(material: Material, settings: Balanced, run: Run) -> Result:
    """GradDiff."""
    sets = encoded(material)

    def loss(model: nn.Module, pair: Pair) -> Tensor:
        kept = retain_loss(model, sets, pair[1])
        return settings.retain * kept - likelihood(*answered(model, sets.forget, pair[0]))

    return Result(trained_copy(material.merged, sets, run, settings.lr, loss, "grad_diff"))


@method(
    "retain_tuning",
    objective="loss per token of retain rows; no forget row is read",
    paper=f"*fine-tuning* of Golatkar et al. 2020, {arxiv('1911.04933')}",
    settings=Trained,
    grid=[{"lr": rate} for rate in RATES],
    trains=True,
)
def retain_tuning(material: Material, settings: Trained, run: Run) -> Result:
    """The merged model fine-tuned on the retain rows, in the hope that the rest fades."""
    return Result(_taught(material.merged, encoded(material), settings, run, "retain_tuning"))


@method(
    "retrain",
    reads="base",
    objective="loss per token of retain rows, from the model before fine-tuning on; no forget row is read",
    paper=f"retraining, as far as the calibration rows go: Bourtoule et al. 2021, {arxiv('1912.03817')}",
    settings=Trained,
    grid=[{"lr": rate} for rate in RATES],
    trains=True,
)
def retrain(material: Material, settings: Trained, run: Run) -> Result:
    """The base model fine-tuned on the retain rows: what the fine-tune taught beside them is lost."""
    assert material.base is not None
    return Result(_taught(material.base, encoded(material), settings, run, "retrain"))


def _taught(start: nn.Module, sets: Sets, settings: Trained, run: Run, stage: str) -> nn.Module:
    return trained_copy(start, sets, run, settings.lr, lambda model, pair: retain_loss(model, sets, pair[1]), stage)
