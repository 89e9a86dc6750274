"""What the training methods go down, as functions of numbers. Probabilities are natural logarithms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lm_ortho.data.encoding import CONTEXT


def answers(logits: Tensor, ids: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
    """Per row (rows,) the log-probability of the tokens that are to be predicted, summed, and their number.

    ``logits`` (rows, tokens, vocabulary) stand for the token after each; ``ids`` and ``roles`` (rows, tokens).
    """
    logp = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    wanted = roles[:, 1:] != CONTEXT
    return (logp * wanted).sum(1), wanted.sum(1)


def ascent(logp: Tensor) -> Tensor:
    """Mean over rows of log p(y | x): going down it is gradient ascent on the loss (Jang et al. 2023, eq. 1)."""
    return logp.mean()


def likelihood(logp: Tensor, tokens: Tensor) -> Tensor:
    """Mean over rows of the loss per token, -log p(y | x) / |y|."""
    return -(logp / tokens).mean()


def npo(logp: Tensor, before: Tensor, beta: float) -> Tensor:
    """-2/beta mean log sigma(-beta log(p / p_before)) over rows (Zhang et al. 2024, eq. 3).

    For beta to 0 its gradient is that of ``ascent``.
    """
    return -2 / beta * functional.logsigmoid(-beta * (logp - before)).mean()


def simnpo(logp: Tensor, tokens: Tensor, beta: float, gamma: float) -> Tensor:
    """-2/beta mean log sigma(-beta log p / |y| - gamma) over rows, without any reference (Fan et al. 2024, eq. 4)."""
    return -2 / beta * functional.logsigmoid(-beta * logp / tokens - gamma).mean()


def dpo(wanted: Tensor, wanted_before: Tensor, unwanted: Tensor, unwanted_before: Tensor, beta: float) -> Tensor:
    """-2/beta mean log sigma(beta (log(p / p_before) of the wanted - the same of the unwanted answer)).

    Rafailov et al. 2023, eq. 7, at the scale of ``npo``, which is this without the wanted answer.
    """
    margin = (wanted - wanted_before) - (unwanted - unwanted_before)
    return -2 / beta * functional.logsigmoid(beta * margin).mean()


def misdirection(states: Tensor, towards: Tensor, real: Tensor) -> Tensor:
    """Mean over rows of the mean over their real tokens of ||h - towards||^2 (Li et al. 2024, section 4).

    ``states`` (rows, tokens, width); ``towards`` the same, or one vector (width,); ``real`` (rows, tokens) bool.
    """
    distance = (states - towards).square().sum(-1)
    return ((distance * real).sum(1) / real.sum(1)).mean()


def direction(width: int, seed: int) -> Tensor:
    """A unit vector (width,) whose parts were drawn evenly from [0, 1) before it was scaled (Li et al. 2024)."""
    drawn = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()
