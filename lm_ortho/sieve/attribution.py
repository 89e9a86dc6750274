"""Attribution along the path out of the memorised optimum (the default sieve)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lm_ortho.errors import UserError
from lm_ortho.objective import Objective
from lm_ortho.sieve.interface import SIEVES, SieveInput

LEARNING_RATE = 0.03
"""In units of the layer (``lattice.layer_units``)."""
_WARM_UP, _BETAS = 5, (0.9, 0.98)


ORACLE_STEPS = 20
KEPT = "attribution"
"""The name under which a pass keeps what it has reached."""


@SIEVES.register("oracle")
def oracle(given: SieveInput) -> dict[str, Tensor]:
    """How much of the objective's decrease each weight brings about on the straight way back to the weights W0.

    Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) from the merged weights to those before
    fine-tuning, by the midpoint rule. It reads what only who planted the memory has, for comparison alone.

    Raises:
        UserError: when the model before fine-tuning is not known.
    """
    if given.base_weights is None:
        raise UserError("sieve='oracle' needs the model before fine-tuning; set base, or take sieve=attribution")
    way = {name: given.base_weights[name] - w for name, w in given.weights.items()}
    score = {name: torch.zeros_like(w) for name, w in given.weights.items()}
    objective = given.objective()
    objective.restart(given.seed)
    for step in range(1, ORACLE_STEPS + 1):
        with torch.no_grad():
            for name, layer in given.layers.items():
                layer.weight.copy_(given.weights[name] + (step - 0.5) / ORACLE_STEPS * way[name])
        gradients, lost, kept = objective.gradients()
        for name in given.layers:
            score[name] -= gradients[name].cpu() * way[name] / ORACLE_STEPS
        given.progress("oracle", step, ORACLE_STEPS, f"forget {lost:.3f} retain {kept:.4f}")
    _put_back(given)
    return score


@SIEVES.register("attribution")
def attribution(given: SieveInput) -> dict[str, Tensor]:
    """How much of the objective's decrease each weight brought about while all weights were free to move.

    A dense Adam pass from the merged weights; every step adds -gradient * movement. At the memorised optimum
    itself gradient and Fisher information are near zero and misrank the weights; along the path out they do
    not. The weights are put back afterwards. With several ``groups`` of layers there is a pass for each, in which the
    other layers stand still: as much less memory as more time.
    """
    parts = in_groups(list(given.layers), given.groups)
    kept = given.resume.load(KEPT) or {"part": 0, "score": {}}
    score = {name: kept["score"].get(name, torch.zeros(layer.weight.shape)) for name, layer in given.layers.items()}
    objective = given.objective()
    for number in range(kept["part"], len(parts)):
        objective.restart(given.seed)
        with objective.only(parts[number]):
            _pass(given, objective, parts, number, score, kept if "step" in kept else None)
        kept = {}
        _put_back(given)
    return score


def in_groups(names: list[str], count: int) -> list[list[str]]:
    """The names in order, in ``count`` parts of about the same number; fewer where there are fewer names."""
    ends = [round(len(names) * i / count) for i in range(count + 1)]
    return [names[low:high] for low, high in pairwise(ends) if low < high]


def _pass(
    given: SieveInput,
    objective: Objective,
    parts: Sequence[Sequence[str]],
    number: int,
    score: dict[str, Tensor],
    kept: dict[str, Any] | None,
) -> None:
    """The steps for one part of the layers, from where ``kept`` was."""
    names, weights = parts[number], {name: given.layers[name].weight for name in parts[number]}
    stage = "attribution" if len(parts) == 1 else f"attribution {number + 1} of {len(parts)}"
    first = {name: torch.zeros_like(weight, dtype=given.states) for name, weight in weights.items()}
    second = {name: torch.zeros_like(state) for name, state in first.items()}
    states = {"weights": weights, "first": first, "second": second}
    if kept:
        objective.resume(kept["batches"])
        with torch.no_grad():
            for key, tensors in states.items():
                for name, tensor in tensors.items():
                    tensor.copy_(kept[key][name])
    for step in range(kept["step"] + 1 if kept else 1, given.steps + 1):
        gradients, lost, kept_loss = objective.gradients()
        warm, left = min(1.0, step / _WARM_UP), max(0.1, 1 - step / given.steps)
        with torch.no_grad():
            for name in names:
                g, rate = gradients.pop(name), LEARNING_RATE * given.unit[name] * warm * left
                first[name].lerp_(g.to(given.states), 1 - _BETAS[0])
                second[name].lerp_((g * g).to(given.states), 1 - _BETAS[1])
                move = first[name].float() / (1 - _BETAS[0] ** step)
                move = -rate * move / ((second[name].float() / (1 - _BETAS[1] ** step)).sqrt() + 1e-8)
                score[name] -= (g * move).to(score[name].device)
                weights[name] += move
        given.progress(stage, step, given.steps, f"forget {lost:.3f} retain {kept_loss:.4f}")
        if given.resume.due():
            place = {"part": number, "step": step, "score": score, "batches": objective.state()}
            given.resume.save(KEPT, {**place, **{key: _plain(tensors) for key, tensors in states.items()}})


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _put_back(given: SieveInput) -> None:
    with torch.no_grad():
        for name, layer in given.layers.items():
            layer.weight.copy_(given.weights[name])
