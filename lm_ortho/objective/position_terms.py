"""Terms of a loss at single positions, computed for some positions at a time, as logits of a large vocabulary fill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = 2**23
"""Largest number of logits for which log-probabilities and their gradients are held at the same time, each 32 MB."""

Terms = Callable[[slice, Tensor], Tensor]
"""Terms (terms, positions) at a slice of the positions, from the log-probabilities (positions, vocabulary) there."""


def position_terms(terms: Terms, logits: Tensor) -> Tensor:
    """``terms`` at all positions, (terms, positions), from the ``logits`` (positions, vocabulary); differentiable.

    More than ``CHUNK_LOGITS`` logits are taken in chunks of positions. The backward pass computes the log-probabilities
    of a chunk again, so that beside the logits only their gradient is held in full.
    """
    if logits.numel() <= CHUNK_LOGITS:
        return terms(slice(0, len(logits)), logits.log_softmax(-1))
    result: Tensor = _ChunkedTerms.apply(logits, terms)
    return result


def _chunks(logits: Tensor) -> list[slice]:
    size = max(1, CHUNK_LOGITS // logits.shape[1])
    return [slice(low, min(low + size, len(logits))) for low in range(0, len(logits), size)]


class _ChunkedTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, terms: Terms) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.terms = terms
        return torch.cat([terms(chunk, logits[chunk].log_softmax(-1)) for chunk in _chunks(logits)], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        result = torch.empty_like(logits)
        for chunk in _chunks(logits):
            with torch.enable_grad():
                part = logits[chunk].detach().requires_grad_()
                values = ctx.terms(chunk, part.log_softmax(-1))
            (result[chunk],) = torch.autograd.grad(values, part, gradient[:, chunk])
        return result, None
