"""Fine-tuning on rows: the trainable parameters of a model, or all parameters of a copy."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from lm_ortho.data.encoding import Example, answer_loss
from lm_ortho.runtime.precision import fast_matmul
from lm_ortho.runtime.progress import ProgressCallback
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
    state: Path | None = None,
) -> None:
    """Trains the trainable parameters of ``model`` in place; afterwards the model is in evaluation mode.

    The loss is that of the answer tokens. Batches come from shuffled passes over ``examples``. With a file ``state``,
    an interrupted run resumes from its last saved step and sees the same batches as an uninterrupted one.
    """

    def loss(batch: Sequence[int]) -> torch.Tensor:
        return answer_loss(model, [examples[i] for i in batch])

    batches = draw_batches(examples, plan.rows, random.Random(plan.seed))
    minimise(model, batches, loss, plan=plan, progress=progress, stage=stage, state=state)


def minimise(
    model: torch.nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Batch], torch.Tensor],
    plan: FinetunePlan,
    progress: ProgressCallback,
    stage: str,
    state: Path | None = None,
) -> None:
    """Minimises ``loss`` over ``batches`` by the trainable parameters of ``model``, in place, one batch per step.

    Uses steps, learning rate and seed of ``plan``; only ``loss`` has to know what a batch is. ``state`` as in
    ``fine_tune``.
    """
    # 1. Set up the optimiser, or load the state of an interrupted run.
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    completed_steps, last_save = _load_state(state, parameters, optimiser), time.monotonic()
    for step, batch in zip(range(plan.steps), batches, strict=False):
        # 2. Draw and skip the batches of completed steps, so that the following ones are the same.
        if step < completed_steps:
            continue
        # 3. Set the learning rate: linear warm-up, then linear decay.
        optimiser.param_groups[0]["lr"] = plan.lr * min((step + 1) / _WARMUP_STEPS, 1 - step / plan.steps)
        # 4. Forward pass, on the device of the first parameter: trained parameters may be elsewhere, if offloaded.
        device = next(model.parameters()).device
        with _seeded_dropout(plan.seed, step, device), fast_matmul(device.type):
            batch_loss = loss(batch)
        # 5. Backward pass and optimiser step, with the gradient norm clipped at 1.
        batch_loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        # 6. Report every tenth step.
        if step % 10 == 9 or step + 1 == plan.steps:
            progress(stage, step + 1, plan.steps, f"loss {batch_loss.item():.3f}")
        # 7. Save the state every 500 steps or 300 seconds, and after the last step.
        is_save_step = step % _SAVE_STEPS == _SAVE_STEPS - 1 or step + 1 == plan.steps
        if state and (is_save_step or time.monotonic() - last_save >= _SAVE_SECONDS):
            save_state({"steps": step + 1, "trained": parameters, "optimiser": optimiser.state_dict()}, state)
            last_save = time.monotonic()
    model.eval()


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
    state: Path | None = None,
) -> torch.nn.Module:
    """Returns a float32 copy of ``model`` with all weights trained; see ``fine_tune`` for the arguments."""
    tuned_model = copy.deepcopy(model).float().requires_grad_(True)
    fine_tune(tuned_model, examples, plan, progress=progress, stage=stage, state=state)
    return tuned_model.requires_grad_(False)


def _load_state(state: Path | None, parameters: list[torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    """Loads a saved state into parameters and optimiser; returns its number of completed steps, 0 without a state."""
    saved_state = None if state is None else load_state(state)
    if saved_state is None:
        return 0
    with torch.no_grad():
        for parameter, value in zip(parameters, saved_state["trained"], strict=True):
            parameter.copy_(value)
    optimiser.load_state_dict(saved_state["optimiser"])
    steps: int = saved_state["steps"]
    return steps
