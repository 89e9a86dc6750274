"""What the unedited model says to the retain documents, kept so that an edited one can be held to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lm_ortho.data.encoding import Example, batch_by_length, compute_logits, max_batch_tokens, pad
from lm_ortho.objective.distribution import KEPT, WHOLE, likeliest, log_of_others


class Teacher:
    """The log-probabilities (float16) behind every token of the retain documents, at the weights of the moment.

    Of a large vocabulary the likeliest tokens are kept and the probability of all others together.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Example]) -> None:
        self._logp: list[Tensor] = [torch.empty(0)] * len(examples)
        self._ids: list[Tensor] = []
        self._rest: list[Tensor] = []
        self._record(model, examples)

    @torch.no_grad()
    def _record(self, model: nn.Module, examples: Sequence[Example]) -> None:
        device = next(model.parameters()).device
        for batch in batch_by_length(examples, tokens=max_batch_tokens(model)):
            ids, _ = pad([examples[i] for i in batch], device)
            logp = compute_logits(model, ids).log_softmax(-1)
            if logp.shape[-1] > WHOLE:
                kept, logp = likeliest(logp, KEPT)
                self._ids, self._rest = (of or [torch.empty(0)] * len(examples) for of in (self._ids, self._rest))
                _file(self._ids, kept.cpu(), batch, examples)
                _file(self._rest, log_of_others(logp).cpu(), batch, examples)
            _file(self._logp, logp.half().cpu(), batch, examples)

    def kl(self, rows: Sequence[int], logp: Tensor) -> Tensor:
        """(tokens,) KL(teacher || model) in nats for all tokens of ``rows``, one document after the other.

        ``logp`` (tokens, vocabulary) is the model's.
        """
        mine = torch.cat([self._logp[i] for i in rows]).to(logp.device).float()
        if not self._ids:
            mine = mine.log_softmax(-1)
            return (mine.exp() * (mine - logp)).sum(-1)
        theirs = logp.gather(-1, torch.cat([self._ids[i] for i in rows]).to(logp.device).long())
        rest = torch.cat([self._rest[i] for i in rows]).to(logp.device)
        return (mine.exp() * (mine - theirs)).sum(-1) + rest.exp() * (rest - log_of_others(theirs))


def _file(into: list[Tensor], found: Tensor, batch: Sequence[int], examples: Sequence[Example]) -> None:
    """Copies what belongs to the tokens that have one after them, without the padding."""
    for row, i in enumerate(batch):
        into[i] = found[row, : len(examples[i].ids) - 1].clone()
