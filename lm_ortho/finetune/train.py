"""Fine-tuning on rows: whatever is trainable of a model, or all of it."""

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
from lm_ortho.runtime.resume import save_state

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class FinetunePlan:
    """How a model is fine-tuned: AdamW, warm-up of 20 steps, then a straight line to zero."""

    steps: int
    rows: int = 32
    lr: float = 5e-3
    rank: int = 16
    seed: int = 0


_KEEP_EVERY, _KEEP_AFTER = 500, 300.0
"""Steps, or seconds, after which the state of a training is kept."""
_POOL = 16


def draw_batches(examples: Sequence[Example], rows: int, draw: random.Random) -> Iterator[list[int]]:
    """Endless batches of ``rows`` indices from shuffled passes.

    Each pool of up to 16 batches is sorted by length before it is cut, so that little of a batch is padding.
    """
    order = list[int]()
    size = rows * min(_POOL, max(1, len(examples) // rows))
    while True:
        while len(order) < size:
            order += draw.sample(range(len(examples)), len(examples))
        pool, order = sorted(order[:size], key=lambda i: len(examples[i].ids)), order[size:]
        yield from draw.sample(cut := [pool[at : at + rows] for at in range(0, size, rows)], len(cut))


def fine_tune(
    model: torch.nn.Module,
    examples: Sequence[Example],
    plan: FinetunePlan,
    progress: ProgressCallback,
    stage: str = "fine-tuning",
    state: Path | None = None,
) -> None:
    """Trains the trainable parameters of ``model`` in place; afterwards it is in evaluation mode.

    The loss is that of the answer tokens. Batches go through shuffled passes over ``examples``. With a file
    ``state`` an interrupted run goes on from the last of its kept steps, with the same batches as an undisturbed one.
    """

    def loss(batch: Sequence[int]) -> torch.Tensor:
        return answer_loss(model, [examples[i] for i in batch])

    minimise(model, draw_batches(examples, plan.rows, random.Random(plan.seed)), loss, plan, progress, stage, state)


def minimise(
    model: torch.nn.Module,
    order: Iterable[Batch],
    loss: Callable[[Batch], torch.Tensor],
    plan: FinetunePlan,
    progress: ProgressCallback,
    stage: str,
    state: Path | None = None,
) -> None:
    """Takes the trainable parameters of ``model`` down ``loss`` of one batch of ``order`` after the other, in place.

    Of ``plan`` steps and rate count here; what a batch is, is between ``order`` and ``loss``. ``state`` as above.
    """
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    finished, saved = _resume(state, trained, optimiser), time.monotonic()
    for step, batch in zip(range(plan.steps), order, strict=False):
        if step < finished:
            continue
        optimiser.param_groups[0]["lr"] = plan.lr * min((step + 1) / 20, 1 - step / plan.steps)
        device = next(model.parameters()).device  # what is trained may be elsewhere, if offloaded
        with _drawn(plan.seed, step, device), fast_matmul(device.type):
            reached = loss(batch)
        reached.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 10 == 9 or step + 1 == plan.steps:
            progress(stage, step + 1, plan.steps, f"loss {reached.item():.3f}")
        last = step % _KEEP_EVERY == _KEEP_EVERY - 1 or step + 1 == plan.steps
        if state and (last or time.monotonic() - saved >= _KEEP_AFTER):
            save_state({"steps": step + 1, "trained": trained, "optimiser": optimiser.state_dict()}, state)
            saved = time.monotonic()
    model.eval()


@contextmanager
def _drawn(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Inside, dropout depends on seed and step alone, so that a run that was interrupted goes on as any other."""
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
    """A float32 copy of ``model`` all of whose weights were trained; the rest as in ``fine_tune``."""
    tuned = copy.deepcopy(model).float().requires_grad_(True)
    fine_tune(tuned, examples, plan, progress, stage, state)
    return tuned.requires_grad_(False)


def _resume(state: Path | None, trained: list[torch.nn.Parameter], optimiser: torch.optim.Optimizer) -> int:
    """The steps already done; parameters and optimiser are put where they were then."""
    if state is None or not state.is_file():
        return 0
    kept = torch.load(state, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for parameter, value in zip(trained, kept["trained"], strict=True):
            parameter.copy_(value)
    optimiser.load_state_dict(kept["optimiser"])
    steps: int = kept["steps"]
    return steps
