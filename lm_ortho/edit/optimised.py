"""The default edit: codes on the support, optimised through straight-through rounding."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lm_ortho.edit.interface import EDITS, EditInput
from lm_ortho.projection.lattice import dequantise, expand_scales
from lm_ortho.streams import code_range

log = logging.getLogger(__name__)

LEARNING_RATE = 0.2
"""In units of the layer (``lattice.layer_units``)."""
_WARM_UP, _BETAS = 5, (0.9, 0.98)
UNUSABLE = 0.5
"""Retain KL in nats a token at the end above which the base stream cannot be trusted; 0.02 to 0.1 is what is usual."""
KEPT = "edit"
"""The name under which an edit keeps what it has reached."""


@EDITS.register("optimised")
def optimised(given: EditInput) -> dict[str, Tensor]:
    """Codes that minimise the objective on the support, everything else frozen on the lattice.

    A latent weight per position starts at W; the forward pass sees it rounded to its code, the gradient goes
    to the latent as if it had not been rounded (Bengio et al. 2013, arXiv 1308.3432). Latents stay within
    the range of their group.
    """
    low, high = code_range(given.bits)
    objective = given.objective()
    places, scale, latent, first, second = {}, {}, {}, {}, {}
    with torch.no_grad():
        for name, layer in given.layers.items():
            device = layer.weight.device
            places[name] = given.support[name].flatten().nonzero()[:, 0].to(device)
            per_weight = expand_scales(given.scales[name], given.group_size, layer.in_features)
            scale[name] = per_weight.flatten().to(device)[places[name]]
            latent[name] = given.weights[name].flatten().to(device)[places[name]].clone()
            first[name], second[name] = torch.zeros_like(latent[name]), torch.zeros_like(latent[name])
            around = dequantise(given.codes[name], given.scales[name], given.group_size)
            if name in given.taken:
                around = torch.where(given.taken[name], given.weights[name], around)
            layer.weight.copy_(around)

    def codes(name: str) -> Tensor:
        return (latent[name] / scale[name]).round().clamp(low, high)

    objective.restart(given.seed + 1)
    states = {"latent": latent, "first": first, "second": second}
    reached = 0
    if (kept := given.resume.load(KEPT)) is not None:
        reached = kept["step"]
        objective.resume(kept["batches"])
        for key, tensors in states.items():
            for name, tensor in tensors.items():
                tensor.copy_(kept[key][name])
    for step in range(reached + 1, given.steps + 1):
        with torch.no_grad():
            for name, layer in given.layers.items():
                layer.weight.view(-1)[places[name]] = codes(name) * scale[name]
        gradients, lost, kept_loss = objective.gradients(places)
        warm, left = min(1.0, step / _WARM_UP), max(0.05, 1 - step / given.steps)
        for name in given.layers:
            g, rate = gradients[name], LEARNING_RATE * given.unit[name] * warm * left
            first[name].lerp_(g, 1 - _BETAS[0])
            second[name].lerp_(g * g, 1 - _BETAS[1])
            move = first[name] / (1 - _BETAS[0] ** step)
            latent[name] -= rate * move / ((second[name] / (1 - _BETAS[1] ** step)).sqrt() + 1e-10)
            latent[name] = torch.minimum(torch.maximum(latent[name], low * scale[name]), high * scale[name])
        given.progress("edit", step, given.steps, f"forget {lost:.3f} retain {kept_loss:.4f}")
        if given.resume.due():
            given.resume.save(KEPT, {"step": step, "batches": objective.state(), **states})
    if given.steps > reached and kept_loss > UNUSABLE:
        log.warning(
            "edit: what should stay is %.2g nats a token away from the merged model; the base stream is damaged. "
            "Lattice steps that differ a hundredfold between layers, as after too long a fine-tune, do that",
            kept_loss,
        )
    result = {}
    for name, before in given.codes.items():
        after = before.flatten().clone()
        after[places[name].cpu()] = codes(name).to(torch.int8).cpu()
        result[name] = after.reshape(before.shape)
    return result
