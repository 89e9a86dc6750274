"""The default edit: codes on the support, optimised through straight-through rounding."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_ortho.calibration.output_change import peak_rates
from lm_ortho.edit.interface import EDITS, EditInput
from lm_ortho.projection.lattice import dequantise, expand_scales
from lm_ortho.runtime.optim import Adam, restore, scheduled_rate
from lm_ortho.streams import code_range

log = logging.getLogger(__name__)

RATE_FLOOR = 0.05
"""Factor below which the linear decay of the learning rate does not go."""
EPSILON = 1e-10
UNUSABLE = 0.5
"""Final retain KL in nats per token above which the base stream cannot be trusted; 0.02 to 0.1 is usual."""
STATE_NAME = "edit"
"""The name under which an unfinished edit is saved."""


@EDITS.register("optimised")
def optimise_codes(inputs: EditInput) -> dict[str, Tensor]:
    """Codes that minimise the objective on the support; all other codes stay frozen.

    A latent weight per position starts at W; the forward pass sees it rounded to its code, and its gradient is
    computed as if it had not been rounded (Bengio et al. 2013, arXiv 1308.3432). Latent weights stay within the
    range of their group. Adam works in the coordinates of ``InputMetric``.
    """
    low, high = code_range(inputs.bits)
    objective = inputs.objective()
    # 1. The coordinates, from the inputs that the layers have while all weights are W.
    metrics = inputs.metrics()
    # 2. Set the weights off the support to the codes of the projection, and to W on the supports of other memories;
    #    start the latent weights on the support at W.
    _set_frozen_weights(inputs)
    latents = {name: _start_latent(inputs, name) for name in inputs.layers}
    adam = Adam({name: latent.values for name, latent in latents.items()}, epsilon=EPSILON)
    changes = {name: metric.relative_change for name, metric in metrics.items()}
    peaks = peak_rates(inputs.lr, changes, inputs.step_units)
    # 3. Resume an interrupted edit.
    objective.restart(inputs.seed + 1)
    first_step = 1
    if (state := inputs.resume.load(STATE_NAME)) is not None:
        first_step = state["step"] + 1
        objective.resume(state["batches"])
        restore({name: latent.values for name, latent in latents.items()}, state["latent"])
        restore(adam.first, state["first"])
        restore(adam.second, state["second"])
    positions = {name: latent.positions for name, latent in latents.items()}
    with objective.restrict_to_support(positions):
        for step in range(first_step, inputs.steps + 1):
            # 4. Show the model the latent weights rounded to the lattice.
            with torch.no_grad():
                for name, layer in inputs.layers.items():
                    latent = latents[name]
                    layer.weight.view(-1)[latent.positions] = latent.round_to_codes(low, high) * latent.scales
            # 5. Compute the gradients on the support and pass them straight through to the latent weights.
            gradients, forget_loss, retain_loss = objective.gradients()
            # 6. Take an Adam step in the coordinates and clamp the latent weights to the range of their group.
            for name, latent in latents.items():
                rate = scheduled_rate(peaks[name], step, inputs.steps, floor=RATE_FLOOR)
                gradient = metrics[name].rotate(gradients[name])
                update = adam.compute_update(name, gradient, step=step, rate=rate) * metrics[name].step_lengths
                latent.values += metrics[name].rotate_back(update)
                latent.clamp(low, high)
            inputs.progress("edit", step, inputs.steps, f"forget {forget_loss:.3f} retain {retain_loss:.4f}")
            # 7. Save the state now and then, so that an interrupted edit can be resumed.
            if inputs.resume.is_due():
                values = {name: latent.values for name, latent in latents.items()}
                position = {"step": step, "batches": objective.state()}
                inputs.resume.save(
                    STATE_NAME, {**position, "latent": values, "first": adam.first, "second": adam.second}
                )
    if inputs.steps >= first_step and retain_loss > UNUSABLE:
        log.warning(
            "edit: the retain loss ended at %.2g nats per token from the merged model; the base stream is damaged. "
            "The usual cause is lattice steps that differ a hundredfold between layers, as after too long a fine-tune",
            retain_loss,
        )
    # 8. Write the codes of the latent weights into those of the projection.
    result = {}
    for name, before in inputs.codes.items():
        codes = before.flatten().clone()
        codes[positions[name].cpu()] = latents[name].round_to_codes(low, high).to(torch.int8).cpu()
        result[name] = codes.reshape(before.shape)
    return result


@dataclass
class _Latent:
    """The latent weights of one layer: flat positions on the support, scales and values, all (positions,)."""

    positions: Tensor
    scales: Tensor
    values: Tensor

    def round_to_codes(self, low: int, high: int) -> Tensor:
        """Nearest codes, as float."""
        return (self.values / self.scales).round().clamp(low, high)

    def clamp(self, low: int, high: int) -> None:
        """Limits the values to the range of the codes."""
        self.values = torch.minimum(torch.maximum(self.values, low * self.scales), high * self.scales)


@torch.no_grad()
def _set_frozen_weights(inputs: EditInput) -> None:
    for name, layer in inputs.layers.items():
        frozen_weights = dequantise(inputs.codes[name], inputs.scales[name], inputs.group_size)
        if name in inputs.other_supports:
            frozen_weights = torch.where(inputs.other_supports[name], inputs.weights[name], frozen_weights)
        layer.weight.copy_(frozen_weights)


def _start_latent(inputs: EditInput, name: str) -> _Latent:
    layer = inputs.layers[name]
    device = layer.weight.device
    positions = inputs.support[name].flatten().nonzero()[:, 0].to(device)
    scales = expand_scales(inputs.scales[name], inputs.group_size, layer.in_features)
    weights = inputs.weights[name].flatten().to(device)[positions].clone()
    return _Latent(positions, scales.flatten().to(device)[positions], weights)
