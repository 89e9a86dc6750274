"""Attribution along the path out of the memorised optimum (the default sieve)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lm_ortho.calibration.output_change import measure_output_changes, peak_rates
from lm_ortho.errors import UserError
from lm_ortho.objective import Objective
from lm_ortho.objective.batches import sample_examples
from lm_ortho.runtime.optim import Adam, restore, scheduled_rate
from lm_ortho.sieve.interface import SIEVES, SieveInput

LEARNING_RATE = 0.029
"""Peak learning rate: the change of the outputs of the layers, as a share of them, by a step of all weights."""
SAMPLE_ROWS = 32
"""Retain rows on which the outputs of the layers are measured, for the learning rate."""
RATE_FLOOR = 0.1
"""Factor below which the linear decay of the learning rate does not go."""
EPSILON = 1e-8

ORACLE_STEPS = 20
"""Points on the straight path from the merged weights to those before fine-tuning."""
STATE_NAME = "attribution"
"""The name under which an unfinished pass is saved."""


@SIEVES.register("oracle")
def oracle(inputs: SieveInput) -> dict[str, Tensor]:
    """Saliency scores from integrated gradients along the straight path back to the weights W0 before fine-tuning.

    Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) by the midpoint rule: each weight is credited
    with its share of the decrease of the objective. For comparison only, because only the owner of W0 can compute it.

    Raises:
        UserError: when the model before fine-tuning is not known.
    """
    if inputs.base_weights is None:
        raise UserError("sieve='oracle' needs the model before fine-tuning; set base, or use sieve=attribution")
    direction = {name: inputs.base_weights[name] - w for name, w in inputs.weights.items()}
    scores = {name: torch.zeros_like(w) for name, w in inputs.weights.items()}
    objective = inputs.objective()
    objective.restart(inputs.seed)
    for step in range(1, ORACLE_STEPS + 1):
        # 1. Set the weights to the midpoint of the next piece of the path.
        with torch.no_grad():
            for name, layer in inputs.layers.items():
                layer.weight.copy_(inputs.weights[name] + (step - 0.5) / ORACLE_STEPS * direction[name])
        # 2. Add -gradient * movement along this piece to the scores.
        gradients, forget_loss, retain_loss = objective.gradients()
        for name in inputs.layers:
            scores[name] -= gradients[name].cpu() * direction[name] / ORACLE_STEPS
        inputs.progress("oracle", step, ORACLE_STEPS, f"forget {forget_loss:.3f} retain {retain_loss:.4f}")
    _restore_weights(inputs)
    return scores


@SIEVES.register("attribution")
def attribution(inputs: SieveInput) -> dict[str, Tensor]:
    """Saliency scores: the share of each weight in the decrease of the objective while all weights move freely.

    A dense Adam pass starts at the merged weights; every step adds -gradient * movement to the scores. At the
    memorised optimum itself gradient and Fisher information are near zero and misrank the weights; along the path out
    of it they do not. The weights are restored afterwards. With several ``groups`` of layers there is one pass per
    group, in which the other layers stay fixed: it takes less memory and more time by the same factor.
    """
    # The learning rate of each layer, from the outputs that it has before anything moves.
    sample = sample_examples(inputs.retain, SAMPLE_ROWS, inputs.seed)
    changes = measure_output_changes(inputs.model, inputs.layers, sample, progress=inputs.progress)
    peaks = peak_rates(LEARNING_RATE, changes, inputs.step_units)
    groups = split_into_groups(list(inputs.layers), inputs.groups)
    state = inputs.resume.load(STATE_NAME) or {"part": 0, "score": {}}
    scores = {name: state["score"].get(name, torch.zeros(layer.weight.shape)) for name, layer in inputs.layers.items()}
    objective = inputs.objective()
    for number in range(state["part"], len(groups)):
        objective.restart(inputs.seed)
        with objective.restrict_to(groups[number]):
            stage = "attribution" if len(groups) == 1 else f"attribution {number + 1} of {len(groups)}"
            resume_state = state if "step" in state else None
            _run_pass(
                inputs,
                objective,
                number,
                names=groups[number],
                peaks=peaks,
                stage=stage,
                scores=scores,
                state=resume_state,
            )
        state = {}
        _restore_weights(inputs)
    return scores


def split_into_groups(names: list[str], count: int) -> list[list[str]]:
    """The names in order, in ``count`` groups of about the same size; fewer groups where there are fewer names."""
    ends = [round(len(names) * i / count) for i in range(count + 1)]
    return [names[low:high] for low, high in pairwise(ends) if low < high]


def _run_pass(
    inputs: SieveInput,
    objective: Objective,
    number: int,
    *,
    names: Sequence[str],
    peaks: Mapping[str, float],
    stage: str,
    scores: dict[str, Tensor],
    state: dict[str, Any] | None,
) -> None:
    """Runs the Adam steps of group ``number`` with the layers ``names`` and adds to ``scores``.

    ``peaks`` are the peak learning rates of the layers, ``state`` is that of an interrupted pass, or None.
    """
    # 1. Start at the merged weights, or where the interrupted pass was saved.
    weights = {name: inputs.layers[name].weight for name in names}
    adam = Adam(weights, epsilon=EPSILON, dtype=inputs.optimiser_dtype)
    tensors = {"weights": weights, "first": adam.first, "second": adam.second}
    if state:
        objective.resume(state["batches"])
        for key, group in tensors.items():
            restore(group, state[key])
    for step in range(state["step"] + 1 if state else 1, inputs.steps + 1):
        # 2. Compute the gradients of the objective on the next batch.
        gradients, forget_loss, retain_loss = objective.gradients()
        with torch.no_grad():
            for name in names:
                # 3. Compute the movement of every weight.
                gradient = gradients.pop(name)
                rate = scheduled_rate(peaks[name], step, inputs.steps, floor=RATE_FLOOR)
                movement = adam.compute_update(name, gradient, step=step, rate=rate)
                # 4. Credit each weight with -gradient * movement, its share of the descent, and move it.
                scores[name] -= (gradient * movement).to(scores[name].device)
                weights[name] += movement
        inputs.progress(stage, step, inputs.steps, f"forget {forget_loss:.3f} retain {retain_loss:.4f}")
        # 5. Save the state now and then, so that an interrupted pass can be resumed.
        if inputs.resume.is_due():
            position = {"part": number, "step": step, "score": scores, "batches": objective.state()}
            inputs.resume.save(STATE_NAME, {**position, **{key: _detach(group) for key, group in tensors.items()}})


def _detach(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _restore_weights(inputs: SieveInput) -> None:
    restore({name: layer.weight for name, layer in inputs.layers.items()}, inputs.weights)
