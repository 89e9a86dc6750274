"""Sieves that read curvature at the merged weights: the OBS form of `hessian`, and a ratio of Fisher information."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_ortho.calibration.activations import DAMPING, damped_inverse
from lm_ortho.data.encoding import Example, answer_loss
from lm_ortho.sieve.interface import SIEVES, SieveInput

DOCUMENTS = 512
"""Maximal number of rows of each set whose gradients are computed, evenly spaced."""


@SIEVES.register("obs")
def obs(inputs: SieveInput) -> dict[str, Tensor]:
    """Squared rounding error over [H^-1]_jj, with H = E[x x^T] on the retain rows, damped.

    It is the increase of the layer's squared error when the weight is rounded and the other weights of its row
    compensate for that as well as they can (Hassibi and Stork 1993, Optimal Brain Surgeon).
    """
    scores = {}
    for name, weight in inputs.weights.items():
        inverse = damped_inverse(inputs.moments[name]).diagonal()
        scores[name] = (weight - inputs.quantised_weights[name]).square() / inverse.to(weight)
    return scores


@SIEVES.register("fisher_ratio")
def fisher_ratio(inputs: SieveInput) -> dict[str, Tensor]:
    """Diagonal empirical Fisher information of the forget rows over that of the retain rows, damped.

    Fisher information is the mean over rows of the squared gradient of the answer's log-likelihood. At a memorised
    optimum that of the forget set is nearly zero and carries little information (docs/method.md); here for comparison.
    """
    forget, retain = (_fisher_information(inputs, examples) for examples in (inputs.forget, inputs.retain))
    mean = torch.cat([information.flatten() for information in retain.values()]).mean()
    return {name: forget[name] / (retain[name] + DAMPING * mean + 1e-30) for name in inputs.weights}


def _fisher_information(inputs: SieveInput, examples: Sequence[Example]) -> dict[str, Tensor]:
    stride = -(-len(examples) // DOCUMENTS)
    sample = examples[::stride]
    total = {name: torch.zeros_like(w) for name, w in inputs.weights.items()}
    for i, example in enumerate(sample, 1):
        loss = answer_loss(inputs.model, [example]) * (len(example.ids) - example.start)
        weights = [layer.weight for layer in inputs.layers.values()]
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        for name, gradient in zip(inputs.layers, gradients, strict=True):
            total[name] += gradient.cpu().square() / len(sample)
        inputs.progress("fisher", i, len(sample), "")
    return total
