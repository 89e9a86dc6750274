"""Sieves that read weights and activations only: what the literature and earlier systems claim, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from lm_ortho.sieve.interface import SIEVES, SieveInput


@SIEVES.register("random")
def random_scores(given: SieveInput) -> dict[str, Tensor]:
    """Uniform random scores: the floor every other sieve has to beat."""
    generator = torch.Generator().manual_seed(given.seed)
    return {name: torch.rand(w.shape, generator=generator) for name, w in given.weights.items()}


@SIEVES.register("magnitude")
def magnitude(given: SieveInput) -> dict[str, Tensor]:
    """|W|."""
    return {name: w.abs() for name, w in given.weights.items()}


@SIEVES.register("residual")
def residual(given: SieveInput) -> dict[str, Tensor]:
    """|W - Q(W)|, the rounding error."""
    return {name: (w - given.rounded[name]).abs() for name, w in given.weights.items()}


@SIEVES.register("wanda")
def wanda(given: SieveInput) -> dict[str, Tensor]:
    """|W| times the norm of its input on retain documents (Sun et al. 2024, arXiv 2306.11695)."""
    return {name: w.abs() * given.moments[name].diagonal().sqrt() for name, w in given.weights.items()}


@SIEVES.register("hessian")
def hessian(given: SieveInput) -> dict[str, Tensor]:
    """Squared rounding error times H_jj, H = E[x x^T] on retain documents."""
    return {
        name: (w - given.rounded[name]).square() * given.moments[name].diagonal() for name, w in given.weights.items()
    }
