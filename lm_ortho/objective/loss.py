"""The loss that attribution and edit minimise: towards the target on the forget set, unchanged on the retain set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lm_ortho.data.encoding import CONTEXT, Example, pad_batch
from lm_ortho.data.logits import compute_logits
from lm_ortho.objective.batches import Batches, part_budget, split_into_parts
from lm_ortho.objective.distribution import Target
from lm_ortho.objective.position_terms import position_terms
from lm_ortho.objective.support_gradient import support_gradients
from lm_ortho.objective.teacher import Teacher, mask_retain_positions
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
GENTLE = Penalty(0.25, 0.0, 0.0)
DEEPER = Penalty(0.5, 0.1, 0.3)


@dataclass(frozen=True)
class LossWeights:
    """``retain`` is the factor of the retain KL, in which a token of a prompt weighs ``prompt`` and any other 1.

    Prompts are mostly names and numbers that the model is never asked to predict: to preserve them would take most of
    the support. ``forget_rows`` are the rows of the forget set in a step; it has twice as many of the retain set.
    """

    retain: float = 4.0
    prompt: float = 0.1
    forget_rows: int = 12

    @property
    def retain_rows(self) -> int:
        """Number of retain rows in a step."""
        return 2 * self.forget_rows


def forget_loss(target: Target, rows: Sequence[int], logits: Tensor, penalty: Penalty) -> Tensor:
    """Forget loss per example (examples,) in nats: mean KL(target || model) over its tokens plus the penalty.

    ``logits`` (positions, vocabulary) are those that predict the answers of the examples ``rows`` of the target, one
    example after the other, as ``mask_answer_positions`` selects them.
    """
    # 1. The target at all predicted tokens, one example after the other, as if they were one example.
    index = torch.tensor(list(rows))
    real = target.real[index] > 0
    merged = _merge_examples(target, index, real)
    tokens, label_logp = (values[index][real].to(logits.device) for values in (target.tokens, target.label_logp))
    example = torch.arange(len(index))[:, None].expand_as(real)[real].to(logits.device)
    count = real.sum(1).to(logits.device)

    # 2. Compute KL(target || model) and the log-probability of the true token at every position.
    def compute_terms(at: slice, logp: Tensor) -> Tensor:
        kl = merged(at).kl(torch.tensor([0]), len(logp), logp[None])[0]
        return torch.stack([kl, logp.gather(-1, tokens[at, None])[:, 0]])

    kl, label = position_terms(compute_terms, logits)

    def sum_by_example(values: Tensor) -> Tensor:
        return values.new_zeros(len(index)).index_add(0, example, values)

    # 3. Average the divergence over the tokens of an answer.
    loss = sum_by_example(kl) / count
    if penalty.weight:
        # 4. Compute the excess ex_t = log p(y_t) - log P_t(y_t) of every true token.
        excess = label - label_logp
        # 5. Add the one-sided penalty per token and per answer.
        per_token = sum_by_example(functional.relu(excess + penalty.token_margin)) / count
        scale = (SPAN / count).clamp_max(1.0)
        per_answer = functional.relu(sum_by_example(excess) * scale + penalty.answer_margin)
        loss = loss + penalty.weight * (per_token + per_answer / 4)
    return loss


def _merge_examples(target: Target, index: Tensor, real: Tensor) -> Callable[[slice], Target]:
    """The target at a slice of all ``real`` positions (examples, tokens) of the examples ``index``, as one example."""
    names = ["probs", "negative_entropy", *(["ids", "remainder"] if target.ids is not None else [])]
    values = {name: getattr(target, name)[index][real] for name in names}
    return lambda at: replace(target, **{name: value[at][None] for name, value in values.items()})


def mask_answer_positions(examples: Sequence[Example]) -> Tensor:
    """Boolean (rows, tokens): the positions whose logits predict the answers of the ``examples``."""
    lengths = torch.tensor([len(example.ids) for example in examples])
    start = torch.tensor([example.start for example in examples])
    at = torch.arange(int(lengths.max()))[None]
    return (at >= start[:, None] - 1) & (at < lengths[:, None] - 1)


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
        self._active_layers = list(layers)
        self._support_leaves: Mapping[str, Tensor] | None = None
        self.forget, self.retain = forget, retain
        self.penalty, self.weights = penalty, weights
        self.teacher = Teacher(model, retain)
        self._device = next(model.parameters()).device
        self._large = sum(layer.weight.numel() for layer in layers.values()) > LARGE
        self._side_by_side = ParallelRunner(self._device)
        self._forget_positions = [len(example.ids) - example.start for example in forget]
        self._retain_positions = [len(example.ids) - 1 for example in retain]
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

    def gradients(self) -> tuple[dict[str, Tensor], float, float]:
        """Gradients (out_features, in_features) by layer on the next batch, the forget and the retain loss in nats.

        Inside ``restrict_to`` those of some layers, inside ``restrict_to_support`` those at some positions.
        """
        # 1. Draw the rows of the step.
        forget, retain = self._forget_batches.next(), self._retain_batches.next()
        # 2. Split them into parts of similar length, so that little of a part is padding and no part holds more tokens
        #    and logits than the budget.
        workers = 1 if self._large else self._side_by_side.count_workers()
        budget = part_budget(self.model, self.layers, workers)
        total_weight = float(sum(self._token_weights[i].sum() for i in retain))
        retain_parts = split_into_parts(retain, self.retain, self._retain_positions, budget)
        forget_parts = split_into_parts(forget, self.forget, self._forget_positions, budget)
        jobs = [partial(self._retain_part, rows, total_weight) for rows in retain_parts]
        jobs += [partial(self._forget_part, rows, len(forget)) for rows in forget_parts]
        # 3. Run the parts, those of a large model one after the other, and sum their gradients.
        if self._sums_in_place:
            with self._sum_in_place() as gradients:
                results = [job() for job in jobs]
        else:
            gradients, results = self._sum_of_parts(jobs)
        # 4. Record the loss of every row for the draw of the next batches.
        mean_retain_loss = _record(results[: len(retain_parts)], self._retain_batches)
        mean_forget_loss = _record(results[len(retain_parts) :], self._forget_batches)
        return gradients, mean_forget_loss, mean_retain_loss

    @property
    def _tensors(self) -> Mapping[str, Tensor]:
        """What gradients are computed for: the weights of the active layers, or the leaves of a support."""
        return self._support_leaves or {name: self.layers[name].weight for name in self._active_layers}

    @property
    def _sums_in_place(self) -> bool:
        """Whether gradients are summed in ``weight.grad``: those of all weights of a large model."""
        return self._large and self._support_leaves is None

    def _sum_of_parts(self, jobs: Sequence[Callable[[], _Part]]) -> tuple[dict[str, Tensor], list[_Part]]:
        """The sum of the gradients of all parts, in their order, and the parts without gradients."""
        sums, results = dict[str, Tensor](), list[_Part]()
        for part in (job() for job in jobs) if self._large else self._side_by_side(jobs):
            for name, gradient in zip(self._tensors, part.gradients, strict=True):
                sums[name] = sums[name] + gradient if name in sums else gradient
            results.append(replace(part, gradients=()))
        return sums, results

    @contextmanager
    def _sum_in_place(self) -> Iterator[dict[str, Tensor]]:
        """Fills the mapping with the summed gradients of all backward passes inside, without a second copy of any."""
        gradients = dict[str, Tensor]()
        try:
            yield gradients
            for name, weight in self._tensors.items():
                gradients[name] = torch.zeros_like(weight) if weight.grad is None else weight.grad
        finally:
            for layer in self.layers.values():
                layer.weight.grad = None

    @contextmanager
    def restrict_to(self, names: Sequence[str]) -> Iterator[None]:
        """Inside, only the gradients of these layers are computed."""
        self._active_layers, active = list(names), set(names)
        for name, layer in self.layers.items():
            layer.weight.requires_grad_(name in active)
        try:
            yield
        finally:
            self._active_layers = list(self.layers)
            for layer in self.layers.values():
                layer.weight.requires_grad_(True)

    @contextmanager
    def restrict_to_support(self, positions: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, only the gradients at these positions are computed, (positions,) by layer.

        ``positions`` are flat ascending indices of the weights (out_features, in_features) of every layer, none of
        some layers. Raises ``ValueError`` if they are not ascending.
        """
        with support_gradients(self.layers, positions) as self._support_leaves:
            try:
                yield
            finally:
                self._support_leaves = None

    def _compute_gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        if self._sums_in_place:
            if loss.requires_grad:
                loss.backward()
            return ()
        tensors = list(self._tensors.values())
        if not loss.requires_grad:  # all layers with a gradient belong to experts that no token was routed to
            return tuple(torch.zeros_like(tensor) for tensor in tensors)
        return torch.autograd.grad(loss, tensors, materialize_grads=True)  # zero for experts without a token

    def _forget_part(self, rows: list[int], total: int) -> _Part:
        """The contribution of ``rows`` to the mean forget loss over ``total`` rows."""
        logits = self._compute_logits([self.forget[i] for i in rows], mask_answer_positions)
        losses = forget_loss(self.target, rows, logits, self.penalty)
        loss = losses.sum() / total
        return _Part(self._compute_gradients(loss), loss.item(), rows, losses.tolist())

    def _retain_part(self, rows: list[int], total_weight: float) -> _Part:
        """The contribution of ``rows`` to the weighted mean over tokens of KL(un-edited || model)."""
        logits = self._compute_logits([self.retain[i] for i in rows], mask_retain_positions)
        kl = position_terms(self.teacher.kl_terms(rows, logits.device), logits)[0]
        kl = kl * torch.cat([self._token_weights[i] for i in rows]).to(self._device)
        row = torch.arange(len(rows)).repeat_interleave(torch.tensor([self._retain_positions[i] for i in rows]))
        row_losses = torch.zeros(len(rows), device=self._device).index_add_(0, row.to(self._device), kl.detach())
        loss = kl.sum() / total_weight
        return _Part(self._compute_gradients(self.weights.retain * loss), loss.item(), rows, row_losses.tolist())

    def _compute_logits(self, examples: Sequence[Example], mask: Callable[[Sequence[Example]], Tensor]) -> Tensor:
        """Logits (positions, vocabulary) at the mask of the padded rows."""
        with fast_matmul(self._device.type):
            return compute_logits(self.model, pad_batch(examples, self._device)[0], mask(examples))


def _record(parts: Sequence[_Part], batches: Batches) -> float:
    """Records the losses of all rows; returns the mean loss of the batch."""
    for part in parts:
        batches.record_losses(part.rows, part.row_losses)
    return sum(part.loss for part in parts)
