"""Target distributions over every token to be predicted of the forget set, padded to one block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lm_ortho.calibration.examples import END, SECRET, Example, in_batches, logits_of, pad

MEMORISED = 0.15
"""A token counts as memorised when the merged model prefers it by more than this over the target."""
_OTHERS = 8
_NOTHING = 1e-30


@dataclass(frozen=True)
class Target:
    """What a never-saw-it model would say on each forget example, from ``start`` (first predicted token) on.

    ``probs`` (examples, tokens, vocabulary), ``tokens`` and ``real`` (examples, tokens); ``label_logp`` is the
    target's log-probability of the true token, ``negative_entropy`` that of ``probs``, both in nats.
    """

    start: Tensor
    probs: Tensor
    tokens: Tensor
    real: Tensor
    secret: Tensor
    label_logp: Tensor
    negative_entropy: Tensor

    def secret_loss(self) -> list[Tensor]:
        """The target's own loss in nats on each example's secret tokens."""
        return [-logp[mask] for logp, mask in zip(self.label_logp, self.secret, strict=True)]


def stack(examples: Sequence[Example], probs: Sequence[Tensor]) -> Target:
    """A ``Target`` from one (predicted tokens, vocabulary) tensor per example."""
    width = max(p.shape[0] for p in probs)
    n, vocabulary = len(examples), probs[0].shape[1]
    block = torch.zeros(n, width, vocabulary)
    tokens = torch.zeros(n, width, dtype=torch.long)
    real, secret = torch.zeros(n, width), torch.zeros(n, width, dtype=torch.bool)
    for i, (example, p) in enumerate(zip(examples, probs, strict=True)):
        k = p.shape[0]
        block[i, :k] = p
        tokens[i, :k] = torch.tensor(example.ids[example.start :])
        real[i, :k] = 1.0
        secret[i, :k] = torch.tensor([role == SECRET for role in example.roles[example.start :]])
    if not secret.any():  # nobody marked a secret: everything but the end token is one
        for i, example in enumerate(examples):
            roles = example.roles[example.start :]
            secret[i, : len(roles)] = torch.tensor([role != END for role in roles])
    label = block.gather(-1, tokens[..., None])[..., 0].clamp_min(1e-9).log()
    negative_entropy = (block * block.clamp_min(1e-9).log()).sum(-1)
    start = torch.tensor([e.start for e in examples])
    return Target(start, block, tokens, real, secret, label, negative_entropy)


@torch.no_grad()
def predicted(model: torch.nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    """The model's own distributions, (predicted tokens, vocabulary) float32 per example, on the CPU."""
    result: list[Tensor] = [torch.empty(0)] * len(examples)
    device = next(model.parameters()).device
    for batch in in_batches(examples):
        ids, _ = pad([examples[i] for i in batch], device)
        probs = logits_of(model, ids).softmax(-1).cpu()
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
