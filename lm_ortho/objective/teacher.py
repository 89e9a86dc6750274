"""Teacher distributions: the predictions of the un-edited model on the retain rows, which the edit must preserve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lm_ortho.data.encoding import Example, batch_by_length, max_batch_tokens, pad_batch
from lm_ortho.data.logits import compute_logits
from lm_ortho.objective.distribution import FULL_VOCABULARY, TOP_TOKENS, log_remaining_mass, select_top_tokens


class Teacher:
    """Log-probabilities (float16) for every token of the retain rows, at the weights the model has when it is made.

    Of a large vocabulary the likeliest tokens and the total probability of all others are stored.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Example]) -> None:
        self._logp: list[Tensor] = [torch.empty(0)] * len(examples)
        self._ids: list[Tensor] = []
        self._log_remainder: list[Tensor] = []
        self._record(model, examples)

    @torch.no_grad()
    def _record(self, model: nn.Module, examples: Sequence[Example]) -> None:
        device = next(model.parameters()).device
        for batch in batch_by_length(examples, tokens=max_batch_tokens(model)):
            ids, _ = pad_batch([examples[i] for i in batch], device)
            logp = compute_logits(model, ids).log_softmax(-1)
            if logp.shape[-1] > FULL_VOCABULARY:
                top_ids, logp = select_top_tokens(logp, TOP_TOKENS)
                if not self._ids:
                    self._ids = [torch.empty(0)] * len(examples)
                    self._log_remainder = [torch.empty(0)] * len(examples)
                _store_rows(self._ids, top_ids.cpu(), batch, examples)
                _store_rows(self._log_remainder, log_remaining_mass(logp).cpu(), batch, examples)
            _store_rows(self._logp, logp.half().cpu(), batch, examples)

    def kl(self, rows: Sequence[int], logp: Tensor) -> Tensor:
        """KL(teacher || model) in nats, (tokens,), for all tokens of ``rows``, one row after the other.

        ``logp`` (tokens, vocabulary) is that of the model.
        """
        teacher_logp = torch.cat([self._logp[i] for i in rows]).to(logp.device).float()
        if not self._ids:
            teacher_logp = teacher_logp.log_softmax(-1)
            return (teacher_logp.exp() * (teacher_logp - logp)).sum(-1)
        model_logp = logp.gather(-1, torch.cat([self._ids[i] for i in rows]).to(logp.device).long())
        remainder = torch.cat([self._log_remainder[i] for i in rows]).to(logp.device)
        top_kl = (teacher_logp.exp() * (teacher_logp - model_logp)).sum(-1)
        return top_kl + remainder.exp() * (remainder - log_remaining_mass(model_logp))


def _store_rows(store: list[Tensor], values: Tensor, batch: Sequence[int], examples: Sequence[Example]) -> None:
    """Stores the values of every token that has a next token, without padding."""
    for row, i in enumerate(batch):
        store[i] = values[row, : len(examples[i].ids) - 1].clone()
