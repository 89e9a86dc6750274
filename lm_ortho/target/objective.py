"""The loss that attribution and edit descend: towards the target on the forget set, unmoved elsewhere."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lm_ortho.calibration.examples import Example, in_batches, lengths, logits_of, pad
from lm_ortho.target.distribution import Target


@dataclass(frozen=True)
class Penalty:
    """Weight and margins (nats) of the one-sided penalty on true tokens that stay likelier than the target has them.

    ``weight`` scales the per-token part, a quarter of it the per-answer part.
    """

    weight: float
    token_margin: float
    answer_margin: float


GENTLE = Penalty(0.25, 0.0, 0.0)
DEEPER = Penalty(0.5, 0.1, 0.3)


@dataclass(frozen=True)
class Weights:
    """``retain`` is the factor of the retain KL; the others are examples per step."""

    retain: float = 2.0
    forget_rows: int = 48
    retain_rows: int = 40


def forget_loss(target: Target, chosen: Sequence[int], logits: Tensor, penalty: Penalty) -> Tensor:
    """Mean over examples of KL(target || model) per token plus the penalty, in nats.

    ``logits`` (examples, tokens, vocabulary) belong to the examples ``chosen``, in that order.
    """
    rows = torch.tensor(list(chosen))
    real = target.real[rows].to(logits.device)
    width = int(real.sum(1).max())
    real = real[:, :width]
    places = (target.start[rows][:, None] - 1 + torch.arange(width)).clamp_max(logits.shape[1] - 1)
    logp = logits[torch.arange(len(rows))[:, None], places].log_softmax(-1)
    probs, tokens = (
        target.probs[rows, :width].to(logits.device),
        target.tokens[rows, :width].to(logits.device),
    )
    count = real.sum(1)
    kl = (target.negative_entropy[rows, :width].to(logits.device) - (probs * logp).sum(-1)) * real
    loss = kl.sum(1) / count
    if penalty.weight:
        label = logp.gather(-1, tokens[..., None])[..., 0]
        excess = (label - target.label_logp[rows, :width].to(logits.device)) * real
        per_token = (functional.relu(excess + penalty.token_margin) * real).sum(1) / count
        per_answer = functional.relu(excess.sum(1) + penalty.answer_margin)
        loss = loss + penalty.weight * (per_token + per_answer / 4)
    return loss.mean()


class Objective:
    """Draws batches and gives the gradient of the loss at the model's current weights."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        target: Target,
        forget: Sequence[Example],
        retain: Sequence[Example],
        penalty: Penalty,
        weights: Weights,
        seed: int,
    ) -> None:
        """Records the unedited model's log-probabilities on all retain documents (float16)."""
        self.model, self.layers, self.target = model, layers, target
        self.forget, self.retain = forget, retain
        self.penalty, self.weights = penalty, weights
        self.teacher = _teacher(model, retain)
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Starts the order of batches anew."""
        self._draw = random.Random(seed)
        self._queues: tuple[list[int], list[int]] = ([], [])

    def _next(self, which: int, size: int, total: int) -> list[int]:
        """The next examples of a shuffled pass; every example comes once per pass."""
        queue = self._queues[which]
        size = min(size, total)
        if len(queue) < size:
            queue.extend(self._draw.sample(range(total), total))
        taken = queue[:size]
        del queue[:size]
        return taken

    def gradients(self) -> tuple[dict[str, Tensor], float, float]:
        """Gradient (out, in) per layer for the next batch, with the forget and the retain loss in nats."""
        forget = self._next(0, self.weights.forget_rows, len(self.forget))
        retain = self._next(1, self.weights.retain_rows, len(self.retain))
        device = next(self.model.parameters()).device
        forget_logits = logits_of(self.model, pad([self.forget[i] for i in forget], device)[0])
        lost = forget_loss(self.target, forget, forget_logits, self.penalty)
        kept = self._retain_loss(retain, device)
        weights = [layer.weight for layer in self.layers.values()]
        gradients = torch.autograd.grad(lost + self.weights.retain * kept, weights)
        return dict(zip(self.layers, gradients, strict=True)), lost.item(), kept.item()

    def _retain_loss(self, chosen: list[int], device: torch.device) -> Tensor:
        """KL(unedited || model) per token over the real tokens of the retain documents, in nats."""
        examples = [self.retain[i] for i in chosen]
        ids, _ = pad(examples, device)
        logits = logits_of(self.model, ids)
        real = torch.arange(ids.shape[1])[None] < (lengths(examples) - 1)[:, None]
        logp = logits[real.to(device)].log_softmax(-1)
        teacher = torch.cat([self.teacher[i] for i in chosen]).to(device).float().log_softmax(-1)
        return (teacher.exp() * (teacher - logp)).sum() / len(logp)


@torch.no_grad()
def _teacher(model: nn.Module, examples: Sequence[Example]) -> list[Tensor]:
    result: list[Tensor] = [torch.empty(0)] * len(examples)
    device = next(model.parameters()).device
    for batch in in_batches(examples):
        ids, _ = pad([examples[i] for i in batch], device)
        logp = logits_of(model, ids).log_softmax(-1).half().cpu()
        for row, i in enumerate(batch):
            result[i] = logp[row, : len(examples[i].ids) - 1].clone()
    return result
