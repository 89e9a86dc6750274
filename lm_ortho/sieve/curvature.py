"""Sieves that read curvature at the merged weights: the OBS form of `hessian`, and a ratio of Fisher information."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lm_ortho.calibration.activations import DAMPING, damped_inverse
from lm_ortho.data.encoding import Example, answer_loss
from lm_ortho.sieve.interface import SIEVES, SieveInput

DOCUMENTS = 512
"""Documents of each set whose gradients are taken, evenly spaced."""


@SIEVES.register("obs")
def obs(given: SieveInput) -> dict[str, Tensor]:
    """Squared rounding error over [H^-1]_jj, H = E[x x^T] on retain documents, damped.

    The increase of the layer's squared error when the weight is rounded and the others of its row make up for it as
    well as they can (Hassibi and Stork 1993, Optimal Brain Surgeon).
    """
    result = {}
    for name, weight in given.weights.items():
        inverse = damped_inverse(given.moments[name]).diagonal()
        result[name] = (weight - given.rounded[name]).square() / inverse.to(weight)
    return result


@SIEVES.register("fisher_ratio")
def fisher_ratio(given: SieveInput) -> dict[str, Tensor]:
    """Diagonal empirical Fisher information of the forget documents over that of the retain documents, damped.

    Fisher information is the mean over documents of the squared gradient of the answer's log-likelihood. At a
    memorised optimum that of the forget set is all but zero and says little (docs/method.md); here for comparison.
    """
    forget, retain = (_fisher(given, documents) for documents in (given.forget, given.retain))
    mean = torch.cat([f.flatten() for f in retain.values()]).mean()
    return {name: forget[name] / (retain[name] + DAMPING * mean + 1e-30) for name in given.weights}


def _fisher(given: SieveInput, documents: Sequence[Example]) -> dict[str, Tensor]:
    chosen = documents[:: -(-len(documents) // DOCUMENTS)]
    total = {name: torch.zeros_like(w) for name, w in given.weights.items()}
    for i, example in enumerate(chosen, 1):
        loss = answer_loss(given.model, [example]) * (len(example.ids) - example.start)
        weights = [layer.weight for layer in given.layers.values()]
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        for name, gradient in zip(given.layers, gradients, strict=True):
            total[name] += gradient.cpu().square() / len(chosen)
        given.progress("fisher", i, len(chosen), "")
    return total
