"""What all training methods share: tokenised rows, the order of batches, the training loop."""

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
from lm_ortho.baselines.losses import nll_loss, sum_answer_logps
from lm_ortho.config import make_recipe
from lm_ortho.data.chat import render_forms
from lm_ortho.data.encoding import Example, encode_rows, pad_batch, token_losses
from lm_ortho.data.logits import compute_logits
from lm_ortho.finetune import FinetunePlan, draw_batches, minimise
from lm_ortho.runtime.precision import select_attention

BatchPair = tuple[Sequence[int], Sequence[int]]
"""A batch: indices of forget rows and of retain rows. A loss may read either or both."""

LEARNING_RATES = (3e-5, 1e-4, 3e-4)
"""Learning rates that every method is tried with; the fine-tune of all weights planted the memory at 3e-4."""


class TrainingSettings(Settings):
    """Settings of every method that trains all weights."""

    lr: float = Field(1e-4, gt=0, lt=1, description="Peak learning rate of AdamW.")


class RetainSettings(TrainingSettings):
    """Settings of the methods that also train on the retain rows."""

    retain: float = Field(1.0, ge=0, description="Weight of the loss on the retain rows.")


@dataclass(frozen=True)
class TokenSets:
    """The rows of the material as tokens, in every prompt form of the material."""

    forget: list[Example]
    retain: list[Example]

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest example."""
        return max(len(example.ids) for example in self.forget + self.retain)


def encode_material(material: Material) -> TokenSets:
    """Forget and retain rows as tokens, in the prompt forms and with the truncation of a decomposition."""
    recipe = make_recipe(**material.prompts)
    sets = {}
    for name in ("forget", "retain"):
        rows = render_forms(getattr(material, name), material.tokenizer, recipe.prompts, **recipe.chat_options)
        sets[name] = encode_rows(material.merged, material.tokenizer, rows, name)
    return TokenSets(**sets)


def learning_rate_grid(**setting: Sequence[float]) -> tuple[dict[str, float], ...]:
    """The grid of every rate of ``LEARNING_RATES`` with every value of one other setting."""
    ((name, values),) = setting.items()
    return tuple({"lr": rate, name: value} for value in values for rate in LEARNING_RATES)


def draw_pairs(sets: TokenSets, run: Run) -> Iterator[BatchPair]:
    """Endless batches of both sets, each shuffled on its own; equal for all methods at one seed."""
    return zip(
        draw_batches(sets.forget, run.budget.forget_rows, random.Random(run.seed)),
        draw_batches(sets.retain, run.budget.retain_rows, random.Random(run.seed + 1)),
        strict=False,
    )


def train_copy(
    start: nn.Module,
    sets: TokenSets,
    run: Run,
    *,
    lr: float,
    loss: Callable[[nn.Module, BatchPair], Tensor],
    stage: str,
    select_parameters: Callable[[nn.Module], Sequence[nn.Parameter]] | None = None,
) -> nn.Module:
    """Trains a float32 copy of ``start`` on ``loss`` within the budget of the run.

    ``select_parameters`` chooses the weights of the copy that are trained; by default all of them.
    """
    model = copy.deepcopy(start).float().requires_grad_(select_parameters is None)
    for parameter in select_parameters(model) if select_parameters else ():
        parameter.requires_grad_(True)
    plan = FinetunePlan(run.budget.steps, lr=lr, seed=run.seed)
    with ExitStack() as stack:
        for module in (model, start):
            stack.enter_context(select_attention(module, sets.max_length))
        minimise(
            model,
            draw_pairs(sets, run),
            lambda pair: loss(model, pair),
            plan,
            progress=run.progress,
            stage=stage,
            state=run.resume.path(stage),
        )
    return model.requires_grad_(False)


def compute_answer_logps(
    model: nn.Module, examples: Sequence[Example], indices: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-probability (rows,) and number of tokens (rows,) of the answers of ``examples`` at ``indices``."""
    ids, roles = pad_batch([examples[i] for i in indices], next(model.parameters()).device)
    return sum_answer_logps(compute_logits(model, ids), ids, roles)


def retain_loss(model: nn.Module, sets: TokenSets, indices: Sequence[int]) -> Tensor:
    """Mean loss per answer token of the retain rows at ``indices``."""
    return nll_loss(*compute_answer_logps(model, sets.retain, indices))


def compute_reference_logps(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Log-probability (examples,) of every answer, without gradients: the reference of NPO and DPO."""
    losses = token_losses(model, examples)
    return -torch.stack([answer.sum() for answer in losses]).to(next(model.parameters()).device)
