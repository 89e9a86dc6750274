"""Sieves that read weights and activations only: scores from the literature and earlier systems, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_ortho.sieve.interface import SIEVES, SieveInput


@SIEVES.register("random")
def random_scores(inputs: SieveInput) -> dict[str, Tensor]:
    """Uniform random scores: the baseline that every other sieve has to beat."""
    generator = torch.Generator().manual_seed(inputs.seed)
    return {name: torch.rand(w.shape, generator=generator) for name, w in inputs.weights.items()}


@SIEVES.register("magnitude")
def magnitude(inputs: SieveInput) -> dict[str, Tensor]:
    """|W|."""
    return {name: w.abs() for name, w in inputs.weights.items()}


@SIEVES.register("residual")
def residual(inputs: SieveInput) -> dict[str, Tensor]:
    """|W - Q(W)|, the rounding error."""
    return {name: (w - inputs.quantised_weights[name]).abs() for name, w in inputs.weights.items()}


@SIEVES.register("wanda")
def wanda(inputs: SieveInput) -> dict[str, Tensor]:
    """|W| times the root mean square of its input on the retain rows (Sun et al. 2024, arXiv 2306.11695)."""
    return {name: w.abs() * inputs.moments[name].diagonal().sqrt() for name, w in inputs.weights.items()}


@SIEVES.register("hessian")
def hessian(inputs: SieveInput) -> dict[str, Tensor]:
    """Squared rounding error times H_jj, H = E[x x^T] on the retain rows."""
    return {
        name: (w - inputs.quantised_weights[name]).square() * inputs.moments[name].diagonal()
        for name, w in inputs.weights.items()
    }
