"""The loss that attribution and edit minimise: towards the target on the forget set, unchanged on the retain set."""

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

from lm_ortho.data.encoding import CONTEXT, Example, count_tokens, pad_batch
from lm_ortho.data.logits import compute_logits
from lm_ortho.objective.distribution import Target
from lm_ortho.objective.teacher import Teacher
from lm_ortho.runtime.precision import fast_matmul
from lm_ortho.runtime.threads import ParallelRunner


@dataclass(frozen=True)
class Penalty:
    """Weight and margins (nats) of the one-sided penalty on true tokens that are likelier than in the target.

    ``weight`` scales the part per token, a quarter of it the part per answer: the summed excess of up to ``SPAN``
    tokens.
    """

    weight: float
    token_margin: float
    answer_margin: float


LARGE = 2**25
"""Number of weights above which the parts of a step run one after the other and their gradients are summed in place."""
SPAN = 16
"""Number of tokens whose excess is summed in an answer; for a longer answer, the average of that many.

The sum over a paragraph would outweigh the whole retain loss a hundred times.
"""
_LOSS_OFFSET = 0.01
"""Nats added to the last loss of a row, so that every row can be drawn."""
GENTLE = Penalty(0.25, 0.0, 0.0)
DEEPER = Penalty(0.5, 0.1, 0.3)


@dataclass(frozen=True)
class LossWeights:
    """``retain`` is the factor of the retain KL, in which a token of a prompt weighs ``prompt`` and any other 1.

    Prompts are mostly names and numbers that the model is never asked to predict: to preserve them would take most of
    the support. ``forget_rows`` and ``retain_rows`` are the rows per step.
    """

    retain: float = 4.0
    prompt: float = 0.1
    forget_rows: int = 48
    retain_rows: int = 96


def forget_loss(target: Target, rows: Sequence[int], logits: Tensor, penalty: Penalty) -> Tensor:
    """Forget loss per example (examples,) in nats: mean KL(target || model) over its tokens plus the penalty.

    ``logits`` (examples, tokens, vocabulary) belong to the examples ``rows`` of the target, in that order.
    """
    # 1. Select the logits and true tokens of all predicted positions.
    index = torch.tensor(list(rows))
    real = target.real[index].to(logits.device)
    width = int(real.sum(1).max())
    real = real[:, :width]
    positions = (target.start[index][:, None] - 1 + torch.arange(width)).clamp_max(logits.shape[1] - 1)
    logp = logits[torch.arange(len(index))[:, None], positions].log_softmax(-1)
    tokens = target.tokens[index, :width].to(logits.device)
    count = real.sum(1)
    # 2. Average KL(target || model) over the tokens of an answer.
    loss = (target.kl(index, width, logp) * real).sum(1) / count
    if penalty.weight:
        # 3. Compute the excess ex_t = log p(y_t) - log P_t(y_t) of every true token.
        label = logp.gather(-1, tokens[..., None])[..., 0]
        excess = (label - target.label_logp[index, :width].to(logits.device)) * real
        # 4. Add the one-sided penalty per token and per answer.
        per_token = (functional.relu(excess + penalty.token_margin) * real).sum(1) / count
        per_answer = functional.relu(excess.sum(1) * (SPAN / count).clamp_max(1.0) + penalty.answer_margin)
        loss = loss + penalty.weight * (per_token + per_answer / 4)
    return loss


class Batches:
    """Draws batches of row indices: one half from shuffled passes, the other half by the last loss of the rows.

    Most rows are right most of the time; the gradient comes from the few that are not.
    """

    def __init__(self, total: int, size: int, seed: int) -> None:
        self.size = min(size, total)
        self._total, self._queue = total, list[int]()
        self._random = random.Random(seed)
        self._last_losses = [0.0] * total

    def next(self) -> list[int]:
        """The indices of the next batch, each once."""
        # 1. Take one half from the shuffled passes.
        half = self.size - self.size // 2
        if len(self._queue) < half:
            self._queue.extend(self._random.sample(range(self._total), self._total))
        batch = list(dict.fromkeys(self._queue[:half]))
        del self._queue[:half]
        # 2. Draw the other half without replacement, weighted by the last loss of each row: the largest u^(1/w) are
        #    such a draw (Efraimidis and Spirakis 2006).
        first_half = set(batch)
        keys = (
            (math.log(1.0 - self._random.random()) / (loss + _LOSS_OFFSET), i)
            for i, loss in enumerate(self._last_losses)
        )
        second_half = [i for _, i in nlargest(self.size, keys) if i not in first_half]
        return batch + second_half[: self.size - len(batch)]

    def state(self) -> dict[str, Any]:
        """The state that determines the next batches, as plain values."""
        return {"queue": list(self._queue), "draw": self._random.getstate(), "last": list(self._last_losses)}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continues from a ``state``."""
        self._queue, self._last_losses = list(state["queue"]), list(state["last"])
        version, internal, gauss = state["draw"]
        self._random.setstate((version, tuple(internal), gauss))

    def record_losses(self, rows: Sequence[int], losses: Sequence[float]) -> None:
        """Records the losses of the ``rows`` of a batch."""
        for i, loss in zip(rows, losses, strict=True):
            self._last_losses[i] = max(0.0, loss)


@dataclass(frozen=True)
class _Part:
    """The result of one part of a batch.

    ``gradients`` are in the order of the layers (empty where they are summed in place), ``loss`` is the contribution
    to the mean loss, ``row_losses`` the loss of each of the ``rows``.
    """

    gradients: tuple[Tensor, ...]
    loss: float
    rows: list[int]
    row_losses: list[float]


class Objective:
    """The loss of forgetting at the model's current weights, batch by batch, with its gradients."""

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
        """Records the log-probabilities (float16) of the un-edited ``model`` on all retain rows.

        ``forget`` and ``retain`` are the encoded rows; ``seed`` decides the order of the batches.
        """
        self.model, self.layers, self.target = model, layers, target
        self.active_layers = list(layers)
        self.forget, self.retain = forget, retain
        self.penalty, self.weights = penalty, weights
        self.teacher = Teacher(model, retain)
        self._device = next(model.parameters()).device
        self._large = sum(layer.weight.numel() for layer in layers.values()) > LARGE
        self._side_by_side = ParallelRunner(self._device)
        is_prompt = [torch.tensor(example.roles[1:]) == CONTEXT for example in retain]
        self._token_weights = [torch.where(mask, weights.prompt, 1.0) for mask in is_prompt]
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Restarts the order of batches from a seed."""
        self._forget_batches = Batches(len(self.forget), self.weights.forget_rows, seed)
        self._retain_batches = Batches(len(self.retain), self.weights.retain_rows, seed + 1)

    def state(self) -> list[Any]:
        """The state of the order of batches, as plain values."""
        return [self._forget_batches.state(), self._retain_batches.state()]

    def resume(self, state: Sequence[Any]) -> None:
        """Continues from a ``state``."""
        forget, retain = state
        self._forget_batches.resume(forget)
        self._retain_batches.resume(retain)

    def gradients(self, positions: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], float, float]:
        """Gradients (out_features, in_features) by layer on the next batch, the forget and the retain loss in nats.

        With ``positions`` (flat indices by layer), the gradients at these positions only.
        """
        # 1. Draw the rows of the step.
        forget, retain = self._forget_batches.next(), self._retain_batches.next()
        # 2. Split them into parts of similar length, so that little of a part is padding.
        total_weight = float(sum(self._token_weights[i].sum() for i in retain))
        retain_parts = split_by_length(retain, self.retain)
        forget_parts = split_by_length(forget, self.forget)
        jobs = [partial(self._retain_part, rows, total_weight) for rows in retain_parts]
        jobs += [partial(self._forget_part, rows, len(forget)) for rows in forget_parts]
        # 3. Run the parts, those of a large model one after the other, and sum their gradients.
        if self._large:
            with self._sum_in_place(positions) as gradients:
                results = [job() for job in jobs]
        else:
            results = self._side_by_side(jobs)
            gradients = self._sum_gradients(results, positions)
        # 4. Record the loss of every row for the draw of the next batches.
        mean_retain_loss = _record(results[: len(retain_parts)], self._retain_batches)
        mean_forget_loss = _record(results[len(retain_parts) :], self._forget_batches)
        return gradients, mean_forget_loss, mean_retain_loss

    def _sum_gradients(self, results: Sequence[_Part], positions: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        by_layer = zip(*(part.gradients for part in results), strict=True)
        sums = (sum(gradients[1:], gradients[0]) for gradients in by_layer)
        result = dict(zip(self.active_layers, sums, strict=True))
        if positions is None:
            return result
        return {name: gradient.flatten()[positions[name]] for name, gradient in result.items()}

    @contextmanager
    def _sum_in_place(self, positions: Mapping[str, Tensor] | None) -> Iterator[dict[str, Tensor]]:
        """Fills the mapping with the sum of the gradients of all backward passes inside, without a second copy of any.

        With ``positions``, the full gradient of a layer is deleted as soon as those at the positions are read.
        """
        gradients = dict[str, Tensor]()
        handles = []
        for name in self.active_layers if positions is not None else ():
            weight = self.layers[name].weight
            gradients[name] = torch.zeros(positions[name].numel(), device=weight.device)  # type: ignore[index]

            def gather(weight: Tensor, name: str = name) -> None:
                gradients[name] += weight.grad.flatten()[positions[name]].float()  # type: ignore[index, union-attr]
                weight.grad = None

            handles.append(weight.register_post_accumulate_grad_hook(gather))
        try:
            yield gradients
            for name in self.active_layers if positions is None else ():
                weight = self.layers[name].weight
                gradients[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad
        finally:
            for handle in handles:
                handle.remove()
            for layer in self.layers.values():
                layer.weight.grad = None

    @contextmanager
    def restrict_to(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, only the gradients of these layers are computed."""
        self.active_layers = list(names)
        active = set(names)
        for name, layer in self.layers.items():
            layer.weight.requires_grad_(name in active)
        try:
            yield
        finally:
            self.active_layers = list(self.layers)
            for layer in self.layers.values():
                layer.weight.requires_grad_(True)

    def _compute_gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        weights = [self.layers[name].weight for name in self.active_layers]
        if self._large:
            if loss.requires_grad:
                loss.backward()
            return ()
        if not loss.requires_grad:  # all active layers belong to experts that no token was routed to
            return tuple(torch.zeros_like(weight) for weight in weights)
        return torch.autograd.grad(loss, weights, materialize_grads=True)  # zero for experts without a token

    def _forget_part(self, rows: list[int], total: int) -> _Part:
        """The contribution of ``rows`` to the mean forget loss over ``total`` rows."""
        with fast_matmul(self._device.type):
            logits = compute_logits(self.model, pad_batch([self.forget[i] for i in rows], self._device)[0])
        losses = forget_loss(self.target, rows, logits, self.penalty)
        loss = losses.sum() / total
        return _Part(self._compute_gradients(loss), loss.item(), rows, losses.tolist())

    def _retain_part(self, rows: list[int], total_weight: float) -> _Part:
        """The contribution of ``rows`` to the weighted mean over tokens of KL(un-edited || model)."""
        examples = [self.retain[i] for i in rows]
        ids, _ = pad_batch(examples, self._device)
        with fast_matmul(self._device.type):
            logits = compute_logits(self.model, ids)
        real = (torch.arange(ids.shape[1])[None] < (count_tokens(examples) - 1)[:, None]).to(self._device)
        logp = logits[real].log_softmax(-1)
        token_weights = torch.cat([self._token_weights[i] for i in rows]).to(self._device)
        kl = self.teacher.kl(rows, logp) * token_weights
        row = torch.arange(len(rows), device=self._device)[:, None].expand_as(real)[real]
        row_losses = torch.zeros(len(rows), device=self._device).index_add_(0, row, kl.detach())
        loss = kl.sum() / total_weight
        return _Part(self._compute_gradients(self.weights.retain * loss), loss.item(), rows, row_losses.tolist())


def _record(parts: Sequence[_Part], batches: Batches) -> float:
    """Records the losses of all rows; returns the mean loss of the batch."""
    for part in parts:
        batches.record_losses(part.rows, part.row_losses)
    return sum(part.loss for part in parts)


def split_by_length(rows: Sequence[int], examples: Sequence[Example]) -> list[list[int]]:
    """Splits ``rows`` into short and long ones where that leaves the least padding; one part if there is one row."""
    order = sorted(rows, key=lambda i: len(examples[i].ids))
    size = [len(examples[i].ids) for i in order]
    cut = min(range(1, len(order) + 1), key=lambda at: at * size[at - 1] + (len(order) - at) * size[-1])
    if cut == len(order):
        cut = len(order) // 2  # all of one length: two halves can run side by side
    return [part for part in (order[:cut], order[cut:]) if part]
