"""Losses of the training methods, as functions of tensors. Log-probabilities are natural logarithms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lm_ortho.data.encoding import CONTEXT


def mask_predicting_tokens(roles: Tensor) -> Tensor:
    """Mask (rows, tokens) of the tokens that are followed by a token to be predicted; ``roles`` (rows, tokens)."""
    is_next_predicted = roles[:, 1:] != CONTEXT
    return functional.pad(is_next_predicted, (0, 1))


def select_labels(ids: Tensor, mask: Tensor) -> Tensor:
    """The token after each position of the ``mask``, (positions,); ``ids`` and ``mask`` (rows, tokens)."""
    return ids[:, 1:][mask[:, :-1]]


def sum_by_row(values: Tensor, mask: Tensor) -> Tensor:
    """Sum (rows,) of the ``values`` (positions,) of each row of the ``mask`` (rows, tokens)."""
    return values.new_zeros(len(mask)).index_add(0, mask.nonzero()[:, 0], values)


def sum_answer_logps(logits: Tensor, ids: Tensor, roles: Tensor) -> tuple[Tensor, Tensor]:
    """Summed log-probability (rows,) of the tokens to be predicted in each row, and their number (rows,).

    ``logits`` (positions, vocabulary) are those at ``mask_predicting_tokens(roles)``; ``ids`` and ``roles`` (rows,
    tokens).
    """
    mask = mask_predicting_tokens(roles)
    losses = functional.cross_entropy(logits, select_labels(ids, mask), reduction="none")
    return sum_by_row(-losses, mask), mask.sum(1)


def ascent_loss(logp: Tensor) -> Tensor:
    """Mean over rows of log p(y | x): to minimise it is gradient ascent on the loss (Jang et al. 2023, eq. 1)."""
    return logp.mean()


def nll_loss(logp: Tensor, tokens: Tensor) -> Tensor:
    """Mean over rows of the loss per token, -log p(y | x) / |y|."""
    return -(logp / tokens).mean()


def npo_loss(logp: Tensor, reference: Tensor, beta: float) -> Tensor:
    """-2/beta mean log sigma(-beta log(p / p_reference)) over rows (Zhang et al. 2024, eq. 3).

    For beta to 0 its gradient is that of ``ascent_loss``.
    """
    return -2 / beta * functional.logsigmoid(-beta * (logp - reference)).mean()


def simnpo_loss(logp: Tensor, tokens: Tensor, beta: float, gamma: float) -> Tensor:
    """-2/beta mean log sigma(-beta log p / |y| - gamma) over rows, reference-free (Fan et al. 2024, eq. 4)."""
    return -2 / beta * functional.logsigmoid(-beta * logp / tokens - gamma).mean()


def dpo_loss(
    preferred: Tensor, preferred_reference: Tensor, rejected: Tensor, rejected_reference: Tensor, beta: float
) -> Tensor:
    """-2/beta mean log sigma(beta (log(p / p_reference) of the preferred - that of the rejected answer)).

    Rafailov et al. 2023, eq. 7, at the scale of ``npo_loss``, which is this loss without the preferred answer.
    """
    margin = (preferred - preferred_reference) - (rejected - rejected_reference)
    return -2 / beta * functional.logsigmoid(beta * margin).mean()


def adjusted_distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, strength: float) -> Tensor:
    """Cross-entropy (positions,) of the student to softmax(teacher - ``strength`` * one-hot(label)) (Dong et al. 2024).

    The target follows from the teacher alone, so the loss has a minimum.

    Args:
        student: logits (positions, vocabulary) of the model that is trained.
        teacher: logits of the original model, of the same shape.
        labels: the true token (positions,) of each position.
        strength: by how much the teacher's logit of the true token is lowered.
    """
    lowered = teacher.scatter_add(1, labels[:, None], teacher.new_full((len(labels), 1), -strength))
    return functional.cross_entropy(student, lowered.softmax(-1), reduction="none")


def misdirection_loss(states: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean over rows of the mean over their masked tokens of ||h - target||^2 (Li et al. 2024, section 4).

    ``states`` (rows, tokens, width); ``target`` of the same shape, or one vector (width,); ``mask`` (rows, tokens)
    bool.
    """
    distance = (states - target).square().sum(-1)
    return ((distance * mask).sum(1) / mask.sum(1)).mean()


def draw_direction(width: int, seed: int) -> Tensor:
    """A unit vector (width,): parts drawn uniformly from [0, 1), then scaled to length 1 (Li et al. 2024)."""
    parts = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return parts / parts.norm()
