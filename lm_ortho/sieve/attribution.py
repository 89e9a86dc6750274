"""Attribution along the path out of the memorised optimum (the default sieve)."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_ortho.errors import UserError
from lm_ortho.sieve.base import SIEVES, SieveInput

LEARNING_RATE = 0.03
"""In lattice steps."""
_WARM_UP, _BETAS = 5, (0.9, 0.98)


ORACLE_STEPS = 20


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
            score[name] -= gradients[name] * way[name] / ORACLE_STEPS
        given.notify("oracle", step, ORACLE_STEPS, f"forget {lost:.3f} retain {kept:.4f}")
    _put_back(given)
    return score


@SIEVES.register("attribution")
def attribution(given: SieveInput) -> dict[str, Tensor]:
    """How much of the objective's decrease each weight brought about while all weights were free to move.

    A dense Adam pass from the merged weights; every step adds -gradient * movement. At the memorised optimum
    itself gradient and Fisher information are near zero and misrank the weights; along the path out they do
    not. The weights are put back afterwards.
    """
    score = {name: torch.zeros_like(w) for name, w in given.weights.items()}
    first = {name: torch.zeros_like(w) for name, w in given.weights.items()}
    second = {name: torch.zeros_like(w) for name, w in given.weights.items()}
    objective = given.objective()
    objective.restart(given.seed)
    for step in range(1, given.steps + 1):
        gradients, lost, kept = objective.gradients()
        rate = LEARNING_RATE * given.step * min(1.0, step / _WARM_UP) * max(0.1, 1 - step / given.steps)
        with torch.no_grad():
            for name, layer in given.layers.items():
                g = gradients[name]
                first[name].lerp_(g, 1 - _BETAS[0])
                second[name].lerp_(g * g, 1 - _BETAS[1])
                move = first[name] / (1 - _BETAS[0] ** step)
                move = -rate * move / ((second[name] / (1 - _BETAS[1] ** step)).sqrt() + 1e-8)
                score[name] -= g * move
                layer.weight += move
        given.notify("attribution", step, given.steps, f"forget {lost:.3f} retain {kept:.4f}")
    _put_back(given)
    return score


def _put_back(given: SieveInput) -> None:
    with torch.no_grad():
        for name, layer in given.layers.items():
            layer.weight.copy_(given.weights[name])
