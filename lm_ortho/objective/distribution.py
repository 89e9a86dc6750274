"""Target distributions over every token to be predicted of the forget set, padded to one block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_ortho.data.encoding import END, SECRET, Example, batch_by_length, compute_logits, max_batch_tokens, pad

WHOLE = 8192
"""Vocabularies up to this are kept whole; of larger ones the likeliest ``KEPT`` tokens and the mass of the others."""
KEPT = 256
MEMORISED = 0.15
"""A token counts as memorised when the merged model prefers it by more than this over the target."""
_OTHERS = 8
_NOTHING = 1e-30


@dataclass(frozen=True)
class Target:
    """What a never-saw-it model would say on each forget example, from ``start`` (first predicted token) on.

    ``probs`` (examples, tokens, vocabulary), ``tokens`` and ``real`` (examples, tokens); ``label_logp`` is the
    target's log-probability of the true token, ``negative_entropy`` that of ``probs``, both in nats. Of a large
    vocabulary ``probs`` holds the tokens ``ids`` (examples, tokens, kept), the true one among them, and ``rest``
    (examples, tokens) the probability of all others together.
    """

    start: Tensor
    probs: Tensor
    tokens: Tensor
    real: Tensor
    secret: Tensor
    label_logp: Tensor
    negative_entropy: Tensor
    ids: Tensor | None = None
    rest: Tensor | None = None
    vocabulary: int = 0

    def of(self, example: int) -> Tensor:
        """(tokens, vocabulary) of one example; what is not kept is spread evenly."""
        if self.ids is None or self.rest is None:
            return self.probs[example]
        ids = self.ids[example].long()
        others = self.rest[example] / (self.vocabulary - ids.shape[-1])
        return others[:, None].repeat(1, self.vocabulary).scatter_(-1, ids, self.probs[example])

    def kl(self, rows: Tensor, width: int, logp: Tensor) -> Tensor:
        """(rows, width) KL(target || model) in nats, ``logp`` (rows, width, vocabulary) being the model's."""
        probs = self.probs[rows, :width].to(logp.device)
        own = self.negative_entropy[rows, :width].to(logp.device)
        if self.ids is None or self.rest is None:
            return own - (probs * logp).sum(-1)
        theirs = logp.gather(-1, self.ids[rows, :width].to(logp.device).long())
        rest = self.rest[rows, :width].to(logp.device)
        return own - (probs * theirs).sum(-1) - rest * log_of_others(theirs)

    def secret_loss(self) -> list[Tensor]:
        """The target's own loss in nats on each example's secret tokens."""
        return [-logp[mask] for logp, mask in zip(self.label_logp, self.secret, strict=True)]


def stack(examples: Sequence[Example], probs: Sequence[Tensor]) -> Target:
    """A ``Target`` from one (predicted tokens, vocabulary) tensor per example."""
    width = max(p.shape[0] for p in probs)
    n, vocabulary = len(examples), probs[0].shape[1]
    kept = vocabulary if vocabulary <= WHOLE else KEPT
    block = torch.zeros(n, width, kept)
    ids = torch.zeros(n, width, kept if kept < vocabulary else 0, dtype=torch.int32)
    label, rest = torch.zeros(n, width), torch.zeros(n, width)
    tokens = torch.zeros(n, width, dtype=torch.long)
    real, secret = torch.zeros(n, width), torch.zeros(n, width, dtype=torch.bool)
    for i, (example, p) in enumerate(zip(examples, probs, strict=True)):
        k = p.shape[0]
        tokens[i, :k] = torch.tensor(example.ids[example.start :])
        label[i, :k] = p.gather(-1, tokens[i, :k, None])[:, 0]
        if kept == vocabulary:
            block[i, :k] = p
        else:
            ids[i, :k], block[i, :k] = likeliest(p, kept, tokens[i, :k])
            rest[i, :k] = (1.0 - block[i, :k].sum(-1)).clamp_min(0.0)
        real[i, :k] = 1.0
        secret[i, :k] = torch.tensor([role == SECRET for role in example.roles[example.start :]])
    if not secret.any():  # nobody marked a secret: everything but the end token is one
        for i, example in enumerate(examples):
            roles = example.roles[example.start :]
            secret[i, : len(roles)] = torch.tensor([role != END for role in roles])
    label = label.clamp_min(1e-9).log()
    negative_entropy = (block * block.clamp_min(1e-9).log()).sum(-1)
    start = torch.tensor([e.start for e in examples])
    if kept == vocabulary:
        return Target(start, block, tokens, real, secret, label, negative_entropy)
    negative_entropy += rest * rest.clamp_min(1e-9).log()
    return Target(start, block, tokens, real, secret, label, negative_entropy, ids, rest, vocabulary)


def likeliest(probs: Tensor, kept: int, always: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ids (..., kept) int32 of the largest entries of ``probs`` (..., vocabulary), and their values.

    ``always`` (...) is in each row in any case, in the place of the least likely one.
    """
    ids = probs.topk(kept, -1).indices
    if always is not None:
        missing = ~(ids == always[..., None]).any(-1)
        ids[..., -1] = torch.where(missing, always, ids[..., -1])
    return ids.to(torch.int32), probs.gather(-1, ids)


def log_of_others(logp: Tensor) -> Tensor:
    """The log-probability that is left beside those of the last dimension; never below that of 1e-6."""
    return (1.0 - logp.exp().sum(-1)).clamp_min(1e-6).log()


@torch.no_grad()
def predicted(model: torch.nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """The model's own distributions, (predicted tokens, vocabulary) float32 per example, on the CPU."""
    result: list[Tensor] = [torch.empty(0)] * len(examples)
    device = next(model.parameters()).device
    for batch in batch_by_length(examples, tokens=max_batch_tokens(model)):
        ids, _ = pad([examples[i] for i in batch], device)
        probs = compute_logits(model, ids).softmax(-1).cpu()
        for row, i in enumerate(batch):
            result[i] = probs[row, examples[i].start - 1 : len(examples[i].ids) - 1].clone()
    return result


def hold_down(probs: Tensor, tokens: Tensor, memorised: Tensor) -> Tensor:
    """``probs`` with the true token of memorised positions lowered to the mean of the 8 largest others.

    ``probs`` (tokens, vocabulary), ``tokens`` and ``memorised`` (tokens,). Never raises a probability before
    renormalising; other positions stay as they are.
    """
    at = torch.arange(len(tokens))
    others = probs.clone()
    others[at, tokens] = 0.0
    cap = others.topk(min(_OTHERS, probs.shape[1] - 1), -1).values.mean(-1)
    lowered = others.clone()
    lowered[at, tokens] = torch.minimum(probs[at, tokens], cap)
    mass = lowered.sum(-1, keepdim=True)  # (nearly) zero when the model gives the true token all of it
    lowered = torch.where(mass > _NOTHING, lowered / mass.clamp_min(_NOTHING), 1 / probs.shape[1])
    return torch.where(memorised[:, None], lowered, probs)
