"""The loss that attribution and edit descend: towards the target on the forget set, unmoved elsewhere."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from heapq import nlargest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lm_ortho.data.encoding import CONTEXT, Example, compute_logits, lengths, pad
from lm_ortho.objective.distribution import Target
from lm_ortho.objective.teacher import Teacher
from lm_ortho.runtime.precision import fast_matmul
from lm_ortho.runtime.threads import SideBySide


@dataclass(frozen=True)
class Penalty:
    """Weight and margins (nats) of the one-sided penalty on true tokens that stay likelier than the target has them.

    ``weight`` scales the per-token part, a quarter of it the per-answer part: the excess of up to ``SPAN`` tokens.
    """

    weight: float
    token_margin: float
    answer_margin: float


LARGE = 2**25
"""Weights from which on the parts of a step go one after the other, and their gradients are added up in place."""
SPAN = 16
"""Tokens whose excess adds up in an answer; of a longer one, what so many have on average.

The sum over a paragraph would outweigh all that is to be kept a hundred times.
"""
_LEAST = 0.01
"""Nats added to a row's last loss, so that none is never drawn."""
GENTLE = Penalty(0.25, 0.0, 0.0)
DEEPER = Penalty(0.5, 0.1, 0.3)


@dataclass(frozen=True)
class LossWeights:
    """``retain`` is the factor of the retain KL, in which a token of a prompt weighs ``prompt`` and others 1.

    Nobody asks the model to predict prompts, names and numbers mostly: holding them would take most of the support.
    """

    retain: float = 4.0
    prompt: float = 0.1
    forget_rows: int = 48
    retain_rows: int = 96


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
    tokens = target.tokens[rows, :width].to(logits.device)
    count = real.sum(1)
    loss = (target.kl(rows, width, logp) * real).sum(1) / count
    if penalty.weight:
        label = logp.gather(-1, tokens[..., None])[..., 0]
        excess = (label - target.label_logp[rows, :width].to(logits.device)) * real
        per_token = (functional.relu(excess + penalty.token_margin) * real).sum(1) / count
        per_answer = functional.relu(excess.sum(1) * (SPAN / count).clamp_max(1.0) + penalty.answer_margin)
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

    def state(self) -> dict[str, Any]:
        """What decides the next batches."""
        return {"queue": list(self._queue), "draw": self._draw.getstate(), "last": list(self._last)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state``."""
        self._queue, self._last = list(state["queue"]), list(state["last"])
        version, internal, gauss = state["draw"]
        self._draw.setstate((version, tuple(internal), gauss))

    def seen(self, rows: Sequence[int], losses: Sequence[float]) -> None:
        """Tells the loss of each of the ``rows`` just drawn."""
        for i, loss in zip(rows, losses, strict=True):
            self._last[i] = max(0.0, loss)


@dataclass(frozen=True)
class _Part:
    """What a part of a batch gives: gradients in the order of the layers (none where they are added up in place), its
    share of the loss, each row's own."""

    gradients: tuple[Tensor, ...]
    loss: float
    rows: list[int]
    per_row: list[float]


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
        weights: LossWeights,
        seed: int,
    ) -> None:
        """Records the unedited model's log-probabilities on all retain documents (float16)."""
        self.model, self.layers, self.target = model, layers, target
        self.watched = list(layers)
        self.forget, self.retain = forget, retain
        self.penalty, self.weights = penalty, weights
        self.teacher = Teacher(model, retain)
        self._device = next(model.parameters()).device
        self._large = sum(layer.weight.numel() for layer in layers.values()) > LARGE
        self._side_by_side = SideBySide(self._device)
        given = [torch.tensor(example.roles[1:]) == CONTEXT for example in retain]
        self._token_weights = [torch.where(mask, weights.prompt, 1.0) for mask in given]
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Starts the order of batches anew."""
        self._batches = (
            Batches(len(self.forget), self.weights.forget_rows, seed),
            Batches(len(self.retain), self.weights.retain_rows, seed + 1),
        )

    def state(self) -> list[Any]:
        """Where the order of batches is, as plain values."""
        return [batches.state() for batches in self._batches]

    def resume(self, state: Sequence[Any]) -> None:
        """Goes on from a ``state``."""
        for batches, each in zip(self._batches, state, strict=True):
            batches.resume(each)

    def gradients(self, places: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], float, float]:
        """Gradient (out, in) per layer for the next batch, with the forget and the retain loss in nats.

        With ``places`` (flat positions per layer) only the gradients there. The batch goes through the model in parts
        of similar length, so that little of it is padding; the parts of a large model one after the other.
        """
        forget, retain = (batches.next() for batches in self._batches)
        tokens = float(sum(self._token_weights[i].sum() for i in retain))
        jobs = [partial(self._retain_part, rows, tokens) for rows in alike(retain, self.retain)]
        of_retain = len(jobs)
        jobs += [partial(self._forget_part, rows, len(forget)) for rows in alike(forget, self.forget)]
        if self._large:
            with self._in_place(places) as found:
                done = [job() for job in jobs]
        else:
            done = self._side_by_side(jobs)
            sums = (sum(each[1:], each[0]) for each in zip(*(part.gradients for part in done), strict=True))
            found = dict(zip(self.watched, sums, strict=True))
            if places is not None:
                found = {name: gradient.flatten()[places[name]] for name, gradient in found.items()}
        kept, lost = self._seen(1, done[:of_retain]), self._seen(0, done[of_retain:])
        return found, lost, kept

    @contextmanager
    def _in_place(self, places: Mapping[str, Tensor] | None) -> Iterator[dict[str, Tensor]]:
        """Fills the mapping with the gradients of all backward passes inside, without a second copy of any.

        Of gradients that are only wanted in some places, the rest is let go as soon as a layer has its own.
        """
        found = dict[str, Tensor]()
        handles = []
        for name in self.watched if places is not None else ():
            here = self.layers[name].weight
            found[name] = torch.zeros(places[name].numel(), device=here.device)  # type: ignore[index]

            def gather(weight: Tensor, name: str = name) -> None:
                found[name] += weight.grad.flatten()[places[name]].float()  # type: ignore[index, union-attr]
                weight.grad = None

            handles.append(here.register_post_accumulate_grad_hook(gather))
        try:
            yield found
            for name in self.watched if places is None else ():
                weight = self.layers[name].weight
                found[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.layers.values():
                layer.weight.grad = None

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, gradients are those of these layers, and nothing is computed for the others."""
        self.watched = list(names)
        chosen = set(names)
        for name, layer in self.layers.items():
            layer.weight.requires_grad_(name in chosen)
        try:
            yield
        finally:
            self.watched = list(self.layers)
            for layer in self.layers.values():
                layer.weight.requires_grad_(True)

    def _seen(self, which: int, done: Sequence[_Part]) -> float:
        for part in done:
            self._batches[which].seen(part.rows, part.per_row)
        return sum(part.loss for part in done)

    def _gradients_of(self, loss: Tensor) -> tuple[Tensor, ...]:
        weights = [self.layers[name].weight for name in self.watched]
        if self._large:
            if loss.requires_grad:
                loss.backward()
            return ()
        if not loss.requires_grad:  # all that is watched are experts that saw no token
            return tuple(torch.zeros_like(weight) for weight in weights)
        return torch.autograd.grad(loss, weights, materialize_grads=True)  # zero for experts that saw no token

    def _forget_part(self, rows: list[int], among: int) -> _Part:
        """The share of ``rows`` in the mean forget loss over ``among`` rows."""
        with fast_matmul(self._device.type):
            logits = compute_logits(self.model, pad([self.forget[i] for i in rows], self._device)[0])
        losses = forget_loss(self.target, rows, logits, self.penalty)
        loss = losses.sum() / among
        return _Part(self._gradients_of(loss), loss.item(), rows, losses.tolist())

    def _retain_part(self, rows: list[int], tokens: float) -> _Part:
        """The share of ``rows`` in the weighted mean of KL(unedited || model) over ``tokens`` of retain documents."""
        examples = [self.retain[i] for i in rows]
        ids, _ = pad(examples, self._device)
        with fast_matmul(self._device.type):
            logits = compute_logits(self.model, ids)
        real = (torch.arange(ids.shape[1])[None] < (lengths(examples) - 1)[:, None]).to(self._device)
        logp = logits[real].log_softmax(-1)
        weight = torch.cat([self._token_weights[i] for i in rows]).to(self._device)
        kl = self.teacher.kl(rows, logp) * weight
        row = torch.arange(len(rows), device=self._device)[:, None].expand_as(real)[real]
        per_row = torch.zeros(len(rows), device=self._device).index_add_(0, row, kl.detach())
        loss = kl.sum() / tokens
        return _Part(self._gradients_of(self.weights.retain * loss), loss.item(), rows, per_row.tolist())


def alike(rows: Sequence[int], examples: Sequence[Example]) -> list[list[int]]:
    """``rows`` in two parts, short and long, cut where the least is padding; one part if there is one row."""
    order = sorted(rows, key=lambda i: len(examples[i].ids))
    size = [len(examples[i].ids) for i in order]
    cut = min(range(1, len(order) + 1), key=lambda at: at * size[at - 1] + (len(order) - at) * size[-1])
    if cut == len(order):
        cut = len(order) // 2  # all of one length: two halves can run side by side
    return [part for part in (order[:cut], order[cut:]) if part]
