"""What the methods that train have in common: the rows as tokens, the order of batches, the loop."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_ortho.baselines.interface import Material, Run, Settings
from lm_ortho.baselines.losses import answers, likelihood
from lm_ortho.data.chat import render_forms
from lm_ortho.data.encoding import Example, compute_logits, encode_rows, pad, token_losses
from lm_ortho.finetune import FinetunePlan, draw_batches, minimise
from lm_ortho.runtime.precision import select_attention

Pair = tuple[Sequence[int], Sequence[int]]
"""A batch: numbers of forget rows and of retain rows. Which of them are looked at is up to the loss."""

RATES = (3e-5, 1e-4, 3e-4)
"""The learning rates that every method is tried with: fine-tuning of all weights planted the memory at 3e-4."""


class Trained(Settings):
    """What every method that trains all weights lets one choose."""

    lr: float = Field(1e-4, gt=0, lt=1, description="Learning rate of AdamW at its peak.")


class Balanced(Trained):
    """The same for those that also learn the retain rows."""

    retain: float = Field(1.0, ge=0, description="Factor of the loss on the retain rows.")


@dataclass(frozen=True)
class Sets:
    """The rows of the material as tokens, in each form that questions are put in."""

    forget: list[Example]
    retain: list[Example]

    @property
    def longest(self) -> int:
        return max(len(example.ids) for example in self.forget + self.retain)


def encoded(material: Material) -> Sets:
    """Forget and retain rows as tokens, cut as a decomposition cuts them."""
    sets = {}
    for name in ("forget", "retain"):
        rows = render_forms(getattr(material, name), material.tokenizer, "auto")
        sets[name] = encode_rows(material.merged, material.tokenizer, rows, name)
    return Sets(**sets)


def grid_of(**choices: Sequence[float]) -> tuple[dict[str, float], ...]:
    """Every rate of ``RATES`` with every one of the one other choice."""
    ((name, values),) = choices.items()
    return tuple({"lr": rate, name: value} for value in values for rate in RATES)


def pairs(sets: Sets, run: Run) -> Iterator[Pair]:
    """Endless batches of both sets, each from shuffled passes of its own; the same for all methods at one seed."""
    return zip(
        draw_batches(sets.forget, run.budget.forget_rows, random.Random(run.seed)),
        draw_batches(sets.retain, run.budget.retain_rows, random.Random(run.seed + 1)),
        strict=False,
    )


def trained_copy(
    start: nn.Module,
    sets: Sets,
    run: Run,
    lr: float,
    loss: Callable[[nn.Module, Pair], Tensor],
    stage: str,
    parameters: Callable[[nn.Module], Sequence[nn.Parameter]] | None = None,
) -> nn.Module:
    """A float32 copy of ``start`` taken down ``loss`` within the budget; all its weights move, or ``parameters`` do."""
    model = copy.deepcopy(start).float().requires_grad_(parameters is None)
    for parameter in parameters(model) if parameters else ():
        parameter.requires_grad_(True)
    plan = FinetunePlan(run.budget.steps, lr=lr, seed=run.seed)
    with ExitStack() as inside:
        for each in (model, start):
            inside.enter_context(select_attention(each, sets.longest))
        minimise(
            model, pairs(sets, run), lambda pair: loss(model, pair), plan, run.progress, stage, run.resume.path(stage)
        )
    return model.requires_grad_(False)


def answered(model: nn.Module, examples: Sequence[Example], chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probability (rows,) and number of tokens of the answers of the ``chosen`` examples."""
    ids, roles = pad([examples[i] for i in chosen], next(model.parameters()).device)
    return answers(compute_logits(model, ids), ids, roles)


def retain_loss(model: nn.Module, sets: Sets, chosen: Sequence[int]) -> Tensor:
    """Mean loss per answer token of the ``chosen`` retain rows."""
    return likelihood(*answered(model, sets.retain, chosen))


def answers_before(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Log-probability (examples,) of every answer at the weights of the moment."""
    losses = token_losses(model, examples)
    return -torch.stack([each.sum() for each in losses]).to(next(model.parameters()).device)
