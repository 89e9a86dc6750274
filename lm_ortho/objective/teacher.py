"""Teacher distributions: the predictions of the un-edited model on the retain rows, which the edit must preserve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lm_ortho.data.encoding import Example, batch_by_length, pad_batch
from lm_ortho.data.logits import compute_logits
from lm_ortho.objective.batches import logit_positions
from lm_ortho.objective.distribution import FULL_VOCABULARY, TOP_TOKENS, log_remaining_mass, select_top_tokens
from lm_ortho.objective.position_terms import Terms
from lm_ortho.runtime.progress import track


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
        batches = batch_by_length(examples, tokens=logit_positions(model))
        for batch in track(batches, "teacher", "predictions for the retain rows"):
            rows = [examples[i] for i in batch]
            ids, _ = pad_batch(rows, device)
            logp = compute_logits(model, ids, mask_retain_positions(rows)).log_softmax(-1)
            if logp.shape[-1] > FULL_VOCABULARY:
                top_ids, logp = select_top_tokens(logp, TOP_TOKENS)
                if not self._ids:
                    self._ids = [torch.empty(0)] * len(examples)
                    self._log_remainder = [torch.empty(0)] * len(examples)
                _store_rows(self._ids, top_ids, batch, examples)
                _store_rows(self._log_remainder, log_remaining_mass(logp), batch, examples)
            _store_rows(self._logp, logp.half(), batch, examples)

    def kl_terms(self, rows: Sequence[int], device: torch.device) -> Terms:
        """KL(teacher || model) in nats at every token of ``rows``, one row after the other, as one term."""
        teacher_logp = torch.cat([self._logp[i] for i in rows]).to(device)
        if not self._ids:

            def compute_kl(at: slice, logp: Tensor) -> Tensor:
                row_logp = teacher_logp[at].float().log_softmax(-1)
                return (row_logp.exp() * (row_logp - logp)).sum(-1)[None]

            return compute_kl
        ids = torch.cat([self._ids[i] for i in rows]).to(device)
        log_remainder = torch.cat([self._log_remainder[i] for i in rows]).to(device)

        def compute_top_kl(at: slice, logp: Tensor) -> Tensor:
            row_logp, remainder = teacher_logp[at].float(), log_remainder[at]
            model_logp = logp.gather(-1, ids[at].long())
            top_kl = (row_logp.exp() * (row_logp - model_logp)).sum(-1)
            return (top_kl + remainder.exp() * (remainder - log_remaining_mass(model_logp)))[None]

        return compute_top_kl


def mask_retain_positions(examples: Sequence[Example]) -> Tensor:
    """Boolean (rows, tokens): the positions that have a next token, which are those with a teacher distribution."""
    lengths = torch.tensor([len(example.ids) for example in examples])
    return torch.arange(int(lengths.max()))[None] < (lengths - 1)[:, None]


def _store_rows(store: list[Tensor], values: Tensor, batch: Sequence[int], examples: Sequence[Example]) -> None:
    """Stores the values (positions, ...) of a batch by row, on the CPU."""
    for i, row in zip(batch, values.cpu().split([len(examples[i].ids) - 1 for i in batch]), strict=True):
        store[i] = row.clone()
