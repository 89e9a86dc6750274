"""What all training methods share: tokenised rows, the order of batches, micro-batches, the training loop."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from pydantic import Field
from torch import Tensor, nn

from lm_ortho.baselines.interface import FORWARD_SHARE, Material, Run, Settings
from lm_ortho.baselines.losses import mask_predicting_tokens, nll_loss, sum_answer_logps
from lm_ortho.config import make_recipe
from lm_ortho.data.chat import render_forms
from lm_ortho.data.encoding import Example, batch_by_length, encode_rows, pad_batch
from lm_ortho.data.logits import compute_logits, selected_logits
from lm_ortho.errors import UserError
from lm_ortho.finetune import FinetunePlan, draw_batches, minimise
from lm_ortho.finetune.train import max_step_tokens
from lm_ortho.runtime.precision import select_attention

BatchPair = tuple[Sequence[int], Sequence[int]]
"""The rows of a step: indices of forget rows and of retain rows."""

RowLoss = Callable[[nn.Module, Sequence[int]], Tensor]
"""From a model and the indices of rows to the mean over these rows of a loss, differentiable."""

MICRO_BATCH_TOKENS = 1024
"""Largest number of tokens, padding included, of one forward and backward pass, unless it is a single row."""

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


@dataclass(frozen=True)
class Term:
    """One term of an objective: ``weight`` times the mean of ``loss`` over the forget or the retain rows of a step.

    ``inputs`` are the examples that go through the trained model for each row: one set, or several of equal size (the
    preferred and the rejected answers of DPO). ``has_teacher`` says whether they also go through another model, without
    gradients; the passes end after the share ``depth`` of the blocks.
    """

    loss: RowLoss
    inputs: tuple[Sequence[Example], ...]
    weight: float = 1.0
    has_teacher: bool = False
    depth: float = 1.0

    def count_tokens(self, row: int) -> float:
        """The tokens that one use of ``row`` puts through the model, as ``TokenCount`` counts them."""
        if not self.weight:
            return 0.0
        tokens = sum(len(examples[row].ids) for examples in self.inputs)
        return self.depth * tokens * (1 + FORWARD_SHARE * self.has_teacher)


def make_retain_term(sets: TokenSets, weight: float = 1.0) -> Term:
    """The term that most methods share: the mean loss per answer token of retain rows."""
    return Term(lambda model, rows: retain_loss(model, sets, rows), (sets.retain,), weight)


def train_copy(
    start: nn.Module,
    sets: TokenSets,
    run: Run,
    *,
    lr: float,
    stage: str,
    forget: Term | None = None,
    retain: Term | None = None,
    select_parameters: Callable[[nn.Module], Sequence[nn.Parameter]] | None = None,
) -> nn.Module:
    """Trains a float32 copy of ``start`` on the sum of the terms within the budget of the run.

    ``select_parameters`` chooses the weights of the copy that are trained; by default all of them.
    """
    model = copy.deepcopy(start).float().requires_grad_(select_parameters is None)
    for parameter in select_parameters(model) if select_parameters else ():
        parameter.requires_grad_(True)
    terms = (forget, retain)
    plan = FinetunePlan(count_steps(terms, run), lr=lr, seed=run.seed)
    tokens = min(MICRO_BATCH_TOKENS, max_step_tokens(model))
    _count_pairs(islice(draw_pairs(sets, run), plan.steps), terms, run)
    with ExitStack() as stack:
        for module in (model, start):
            stack.enter_context(answer_passes(module, sets.max_length))
        minimise(
            model,
            draw_pairs(sets, run),
            lambda part: part[0].loss(model, part[1]),
            plan,
            progress=run.progress,
            stage=stage,
            state=run.resume.path(stage),
            split=lambda pair: split_terms(terms, pair, tokens),
        )
    return model.requires_grad_(False)


def count_steps(terms: Sequence[Term | None], run: Run) -> int:
    """The number of steps of the budget: its ``steps``, or as many as its ``tokens`` pay for at the mean cost of a row.

    What the run has put through the model before the training is part of its tokens.

    Raises:
        UserError: if the tokens do not suffice for one step.
    """
    budget = run.budget
    if budget.steps is not None:
        return budget.steps
    assert budget.tokens is not None
    cost = 0.0
    for term, rows in zip(terms, (budget.forget_rows, budget.retain_rows), strict=True):
        if term is not None:
            row_count = len(term.inputs[0])
            cost += rows * sum(term.count_tokens(row) for row in range(row_count)) / row_count
    steps = int((budget.tokens - run.tokens.total) / cost)
    if steps < 1:
        raise UserError(
            f"budget: tokens={budget.tokens} do not suffice for one step of {round(cost)} tokens after "
            f"{round(run.tokens.total)} of the preparation; give more tokens or fewer rows per step"
        )
    return steps


def _count_pairs(pairs: Iterable[BatchPair], terms: Sequence[Term | None], run: Run) -> None:
    """Adds the tokens of the pairs of all steps to those of the run, also of the steps that a resumed run skips."""
    for pair in pairs:
        for term, rows in zip(terms, pair, strict=True):
            run.tokens.add(sum(term.count_tokens(row) for row in rows) if term is not None else 0)


@contextmanager
def answer_passes(model: nn.Module, longest: int) -> Iterator[None]:
    """Context for passes over examples of at most ``longest`` tokens, with logits where they count only."""
    with select_attention(model, longest), selected_logits(model):
        yield


def accumulate_gradients(
    model: nn.Module, terms: Sequence[Term | None], batches: Sequence[Sequence[int]], tokens: int | None = None
) -> Tensor:
    """Adds the gradient of the sum of the terms to the parameters, one micro-batch of a term's rows after the other.

    ``batches`` are the rows of each term.

    The mean of a micro-batch counts by its share of the rows, so the gradient does not depend on ``tokens``, the
    largest size of a micro-batch (``MICRO_BATCH_TOKENS`` without it), except for rounding.

    Returns:
        The sum as a scalar without a graph; ``backward`` on it adds nothing.
    """
    total = torch.zeros((), device=next(model.parameters()).device)
    for (term, rows), weight in split_terms(terms, batches, tokens or MICRO_BATCH_TOKENS):
        loss = weight * term.loss(model, rows)
        # The caller may hold autocast, which is meant for forward passes only.
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
        total += loss.detach()
    return total.requires_grad_(True)


def split_terms(
    terms: Sequence[Term | None], batches: Sequence[Sequence[int]], tokens: int
) -> list[tuple[tuple[Term, list[int]], float]]:
    """Micro-batches of the rows of each term with their weights: the sum of the terms is the weighted sum of theirs."""
    return [
        ((term, part), term.weight * len(part) / len(rows))
        for term, rows in zip(terms, batches, strict=True)
        if term is not None and term.weight
        for part in split_rows(rows, term.inputs, tokens)
    ]


def split_rows(rows: Sequence[int], inputs: Sequence[Sequence[Example]], tokens: int) -> list[list[int]]:
    """Divides the indices of a batch into micro-batches of similar length.

    The examples of ``inputs`` at the indices of a micro-batch have at most ``tokens`` tokens with their padding, unless
    it is a single row.
    """

    def count_tokens(part: Sequence[int]) -> int:
        return len(part) * sum(max(len(examples[i].ids) for i in part) for examples in inputs)

    parts = list[list[int]]()
    for row in sorted(rows, key=lambda i: count_tokens([i])):
        if parts and count_tokens([*parts[-1], row]) <= tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def compute_answer_logps(
    model: nn.Module, examples: Sequence[Example], indices: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Log-probability (rows,) and number of tokens (rows,) of the answers of ``examples`` at ``indices``."""
    ids, roles = pad_batch([examples[i] for i in indices], next(model.parameters()).device)
    return sum_answer_logps(compute_logits(model, ids, mask_predicting_tokens(roles)), ids, roles)


def retain_loss(model: nn.Module, sets: TokenSets, indices: Sequence[int]) -> Tensor:
    """Mean loss per answer token of the retain rows at ``indices``."""
    return nll_loss(*compute_answer_logps(model, sets.retain, indices))


def count_example_tokens(examples: Sequence[Example]) -> int:
    """Number of tokens of all examples, without padding."""
    return sum(len(example.ids) for example in examples)


@torch.no_grad()
def compute_reference_logps(model: nn.Module, examples: Sequence[Example], run: Run) -> Tensor:
    """Log-probability (examples,) of every answer, without gradients: the reference of NPO and DPO."""
    run.tokens.add_forward(count_example_tokens(examples))
    logps = torch.empty(len(examples), device=next(model.parameters()).device)
    with answer_passes(model, max(len(example.ids) for example in examples)):
        for batch in batch_by_length(examples, tokens=MICRO_BATCH_TOKENS):
            logps[batch] = compute_answer_logps(model, examples, batch)[0]
    return logps
