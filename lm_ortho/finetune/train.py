"""Fine-tuning on rows: the trainable parameters of a model, or all parameters of a copy."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lm_ortho.data.encoding import CONTEXT, Example, answer_loss, batch_by_length
from lm_ortho.data.logits import selected_logits
from lm_ortho.runtime.precision import fast_matmul, select_attention
from lm_ortho.runtime.progress import ProgressCallback, no_progress, show_progress
from lm_ortho.runtime.resume import load_state, save_state

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class FinetunePlan:
    """Hyperparameters of a fine-tuning run: AdamW, 20 warm-up steps, then a linear decay of the learning rate to 0."""

    steps: int
    rows: int = 32
    lr: float = 5e-3
    rank: int = 16
    seed: int = 0


_WARMUP_STEPS = 20
_SAVE_STEPS, _SAVE_SECONDS = 500, 300.0
"""Steps, or seconds, after which the state of a run is saved."""
_POOL_BATCHES = 16
MAX_STEP_VALUES = 2**29
"""Largest number of inputs and outputs of all layers in one forward pass of training: two gigabytes in float32."""


@dataclass
class Goal:
    """What ends a training before its last step, and the number of steps taken, which is set at the end.

    After every ``interval`` steps ``is_reached`` is asked about the model in evaluation mode, but only if the batch of
    that step has a loss of at most ``max_loss`` nats per token.
    """

    is_reached: Callable[[torch.nn.Module], bool]
    interval: int
    max_loss: float
    steps: int = 0

    def check(self, model: torch.nn.Module, step: int, loss: float) -> bool:
        """Returns whether the training is to end after ``step`` (1, 2, ...), whose batch has this ``loss``."""
        if step % self.interval or loss > self.max_loss:
            return False
        model.eval()
        with show_progress(no_progress):  # the training is the stage that is shown
            is_reached = self.is_reached(model)
        model.train()
        return is_reached


def draw_batches(examples: Sequence[Example], rows: int, draw: random.Random) -> Iterator[list[int]]:
    """Yields batches of ``rows`` indices without end, from shuffled passes over the examples.

    Each pool of up to 16 batches is sorted by length before it is divided, so that a batch has little padding.
    """
    order = list[int]()
    size = rows * min(_POOL_BATCHES, max(1, len(examples) // rows))
    while True:
        # 1. Append shuffled passes over the examples until they fill a pool.
        while len(order) < size:
            order += draw.sample(range(len(examples)), len(examples))
        # 2. Sort the pool by length and divide it into batches.
        pool, order = sorted(order[:size], key=lambda i: len(examples[i].ids)), order[size:]
        batches = [pool[start : start + rows] for start in range(0, size, rows)]
        # 3. Yield the batches in random order.
        yield from draw.sample(batches, len(batches))


def fine_tune(
    model: torch.nn.Module,
    examples: Sequence[Example],
    plan: FinetunePlan,
    progress: ProgressCallback,
    stage: str = "fine-tuning",
    *,
    state: Path | None = None,
    goal: Goal | None = None,
) -> None:
    """Trains the trainable parameters of ``model`` in place; afterwards the model is in evaluation mode.

    The loss is that of the answer tokens. Batches come from shuffled passes over ``examples``; one that would need too
    much memory goes through the model in parts (``split_batch``), with the same gradient. With a file ``state``, an
    interrupted run resumes from its last saved step and sees the same batches as an uninterrupted one. ``goal`` ends
    the training early.
    """
    max_tokens = max_step_tokens(model)

    def split(batch: Sequence[int]) -> list[tuple[list[Example], float]]:
        return split_batch([examples[i] for i in batch], max_tokens)

    def loss(part: Sequence[Example]) -> Tensor:
        return answer_loss(model, part)

    batches = draw_batches(examples, plan.rows, random.Random(plan.seed))
    with select_attention(model, max((len(example.ids) for example in examples), default=0)):
        minimise(model, batches, loss, plan=plan, progress=progress, stage=stage, state=state, split=split, goal=goal)


def max_step_tokens(model: torch.nn.Module) -> int:
    """Returns the largest number of tokens, padding included, of a forward pass of training.

    What is stored of a token for the backward pass is estimated by the inputs and outputs of all matrices: the output
    embedding gives the logits, and of stacked experts one is counted.
    """
    values = sum(sum(parameter.shape[-2:]) for parameter in model.parameters() if parameter.dim() > 1)
    return max(1, MAX_STEP_VALUES // max(1, values))


def split_batch(batch: Sequence[Example], max_tokens: int) -> list[tuple[list[Example], float]]:
    """Returns parts of at most ``max_tokens`` tokens with their padding, and the share of each in the batch's loss.

    A part is at least one row. ``answer_loss`` of the batch is the sum of those of the parts times their shares, which
    are their shares of the tokens to predict.
    """
    parts = [[batch[i] for i in part] for part in batch_by_length(batch, len(batch), tokens=max_tokens)]
    counts = [sum(role != CONTEXT for example in part for role in example.roles[1:]) for part in parts]
    return [(part, count / sum(counts)) for part, count in zip(parts, counts, strict=True)]


def _keep_whole(batch: Any) -> list[tuple[Any, float]]:
    return [(batch, 1.0)]


def minimise(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Any], Tensor],
    plan: FinetunePlan,
    progress: ProgressCallback,
    stage: str,
    *,
    state: Path | None = None,
    split: Callable[[Batch], Sequence[tuple[Any, float]]] = _keep_whole,
    goal: Goal | None = None,
) -> None:
    """Minimises ``loss`` over ``batches`` by the trainable parameters of ``model``, in place, one batch per step.

    Uses steps, learning rate and seed of ``plan``; only ``loss`` has to know what a batch is. ``split`` divides a batch
    into parts with weights: the loss of the batch is the weighted sum of those of its parts, and one part at a time is
    in memory. ``state`` and ``goal`` as in ``fine_tune``.
    """
    # 1. Set up the optimiser, or load the state of an interrupted run.
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    completed_steps, is_finished = _load_state(state, parameters, optimiser)
    last_save, last_step = time.monotonic(), completed_steps if is_finished else plan.steps
    steps = range(0 if is_finished else plan.steps)  # a finished run needs no batches, and may have no rows
    with selected_logits(model):
        for step, batch in zip(steps, batches, strict=False):
            # 2. Draw and skip the batches of completed steps, so that the following ones are the same.
            if step < completed_steps:
                continue
            # 3. Set the learning rate: linear warm-up, then linear decay.
            optimiser.param_groups[0]["lr"] = plan.lr * min((step + 1) / _WARMUP_STEPS, 1 - step / plan.steps)
            # 4. Forward and backward pass of each part of the batch.
            batch_loss = _accumulate_gradients(model, loss, split(batch), seed=plan.seed, step=step)
            # 5. Optimiser step, with the gradient norm clipped at 1.
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            # 6. Report the step, and end the training if it has reached its goal.
            is_finished = step + 1 == plan.steps or (goal is not None and goal.check(model, step + 1, batch_loss))
            progress(stage, step + 1, step + 1 if is_finished else plan.steps, f"loss {batch_loss:.3f}")
            # 7. Save the state every 500 steps or 300 seconds, and after the last step.
            is_save_step = is_finished or step % _SAVE_STEPS == _SAVE_STEPS - 1
            if state and (is_save_step or time.monotonic() - last_save >= _SAVE_SECONDS):
                trained = {"trained": parameters, "optimiser": optimiser.state_dict()}
                save_state({"steps": step + 1, "is_finished": is_finished, **trained}, state)
                last_save = time.monotonic()
            if is_finished:
                last_step = step + 1
                break
    if goal is not None:
        goal.steps = last_step
    model.eval()


def _accumulate_gradients(
    model: torch.nn.Module,
    loss: Callable[[Any], Tensor],
    parts: Sequence[tuple[Any, float]],
    *,
    seed: int,
    step: int,
) -> float:
    """Adds the gradient of the weighted sum of the losses of ``parts`` to the parameters; returns that sum."""
    # Tensors of a batch are on the device of the first parameter: trained parameters may be elsewhere, if offloaded.
    device = next(model.parameters()).device
    total = 0.0
    with _seeded_dropout(seed, step, device):
        for part, weight in parts:
            with fast_matmul(device.type):
                part_loss = loss(part)
            (part_loss if weight == 1 else part_loss * weight).backward()
            total += weight * part_loss.item()
    return total


@contextmanager
def _seeded_dropout(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Context in which dropout depends on seed and step only, so that a resumed run draws the same masks."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
        torch.manual_seed(seed * 1_000_003 + step)
        yield


def train_full(
    model: torch.nn.Module,
    examples: Sequence[Example],
    plan: FinetunePlan,
    progress: ProgressCallback,
    stage: str = "fine-tuning",
    *,
    state: Path | None = None,
    goal: Goal | None = None,
    in_place: bool = False,
) -> torch.nn.Module:
    """Returns a float32 copy of ``model``, or itself if ``in_place``, with all weights trained.

    See ``fine_tune`` for the other arguments.
    """
    tuned_model = (model if in_place else copy.deepcopy(model)).float().requires_grad_(True)
    fine_tune(tuned_model, examples, plan, progress=progress, stage=stage, state=state, goal=goal)
    return tuned_model.requires_grad_(False)


def _load_state(
    state: Path | None, parameters: list[torch.nn.Parameter], optimiser: torch.optim.Optimizer
) -> tuple[int, bool]:
    """Loads a saved state into parameters and optimiser.

    Returns the number of completed steps, 0 without a state, and whether none is left.
    """
    saved_state = None if state is None else load_state(state)
    if saved_state is None:
        return 0, False
    with torch.no_grad():
        for parameter, value in zip(parameters, saved_state["trained"], strict=True):
            parameter.copy_(value)
    optimiser.load_state_dict(saved_state["optimiser"])
    return saved_state["steps"], saved_state.get("is_finished", False)
