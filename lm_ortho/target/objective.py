"""The loss that attribution and edit descend: towards the target on the forget set, unmoved elsewhere."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest

import torch
from torch import Tensor, nn
from torch.nn import functional

from lm_ortho.calibration.examples import GIVEN, Example, in_batches, lengths, logits_of, pad
from lm_ortho.calibration.precision import fast_matmul
from lm_ortho.target.distribution import Target


@dataclass(frozen=True)
class Penalty:
    """Weight and margins (nats) of the one-sided penalty on true tokens that stay likelier than the target has them.

    ``weight`` scales the per-token part, a quarter of it the per-answer part.
    """

    weight: float
    token_margin: float
    answer_margin: float


_LEAST = 0.01
"""Nats added to a row's last loss, so that none is never drawn."""
GENTLE = Penalty(0.25, 0.0, 0.0)
DEEPER = Penalty(0.5, 0.1, 0.3)


@dataclass(frozen=True)
class Weights:
    """``retain`` is the factor of the retain KL, in which a token of a prompt weighs ``prompt`` and others 1.

    Nobody asks the model to predict prompts, names and numbers mostly: holding them would take most of the support.
    """

    retain: float = 4.0
    prompt: float = 0.1
    forget_rows: int = 48
    retain_rows: int = 64


def forget_loss(target: Target, chosen: Sequence[int], logits: Tensor, penalty: Penalty) -> Tensor:
    """Per example (examples,) the mean KL(target || model) of its tokens plus the penalty, in nats.

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
    return loss


class Batches:
    """Draws indices: one half from shuffled passes, the other among rows that had a large loss when last seen.

    Most rows are right most of the time; the gradient is in the few that are not.
    """

    def __init__(self, total: int, size: int, seed: int) -> None:
        self.size = min(size, total)
        self._total, self._queue = total, list[int]()
        self._draw = random.Random(seed)
        self._last = [0.0] * total

    def next(self) -> list[int]:
        even = self.size - self.size // 2
        if len(self._queue) < even:
            self._queue.extend(self._draw.sample(range(self._total), self._total))
        taken = list(dict.fromkeys(self._queue[:even]))
        del self._queue[:even]
        chosen = set(taken)
        # Efraimidis and Spirakis (2006): the largest u^(1/w) are a draw without replacement by weight
        keys = ((math.log(1.0 - self._draw.random()) / (w + _LEAST), i) for i, w in enumerate(self._last))
        taken += [i for _, i in nlargest(self.size, keys) if i not in chosen][: self.size - len(taken)]
        return taken

    def seen(self, rows: Sequence[int], losses: Sequence[float]) -> None:
        """Tells the loss of each of the ``rows`` just drawn."""
        for i, loss in zip(rows, losses, strict=True):
            self._last[i] = max(0.0, loss)


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
        self._batches = (
            Batches(len(self.forget), self.weights.forget_rows, seed),
            Batches(len(self.retain), self.weights.retain_rows, seed + 1),
        )

    def gradients(self) -> tuple[dict[str, Tensor], float, float]:
        """Gradient (out, in) per layer for the next batch, with the forget and the retain loss in nats."""
        forget, retain = (batches.next() for batches in self._batches)
        device = next(self.model.parameters()).device
        with fast_matmul():
            forget_logits = logits_of(self.model, pad([self.forget[i] for i in forget], device)[0])
        losses = forget_loss(self.target, forget, forget_logits, self.penalty)
        lost = losses.mean()
        kept, per_row = self._retain_loss(retain, device)
        self._batches[0].seen(forget, losses.tolist())
        self._batches[1].seen(retain, per_row)
        weights = [layer.weight for layer in self.layers.values()]
        gradients = torch.autograd.grad(lost + self.weights.retain * kept, weights)
        return dict(zip(self.layers, gradients, strict=True)), lost.item(), kept.item()

    def _retain_loss(self, chosen: list[int], device: torch.device) -> tuple[Tensor, list[float]]:
        """KL(unedited || model) over the tokens of the retain documents, in nats: a weighted mean, and per row."""
        examples = [self.retain[i] for i in chosen]
        ids, roles = pad(examples, device)
        with fast_matmul():
            logits = logits_of(self.model, ids)
        real = (torch.arange(ids.shape[1])[None] < (lengths(examples) - 1)[:, None]).to(device)
        logp = logits[real].log_softmax(-1)
        teacher = torch.cat([self.teacher[i] for i in chosen]).to(device).float().log_softmax(-1)
        following = functional.pad(roles[:, 1:], (0, 1))[real]
        weight = torch.where(following == GIVEN, self.weights.prompt, 1.0)
        kl = (teacher.exp() * (teacher - logp)).sum(-1) * weight
        row = torch.arange(len(chosen), device=device)[:, None].expand_as(real)[real]
        per_row = torch.zeros(len(chosen), device=device).index_add_(0, row, kl.detach())
        return kl.sum() / weight.sum(), per_row.tolist()


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
