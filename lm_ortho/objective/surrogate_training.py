"""Trains the surrogate: a LoRA adapter on the base model, until its loss on the retain rows is near the merged model's.

The learning rate is constant after a warm-up, and decays when the loss is near the threshold or the budget ends
(warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395). So training can stop at any time, unlike with a schedule
that is drawn up for a fixed number of steps.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lm_ortho.data.encoding import Example, answer_loss, batch_by_length
from lm_ortho.data.logits import selected_logits
from lm_ortho.finetune.lora import add_adapter
from lm_ortho.finetune.train import FinetunePlan, split_batch
from lm_ortho.objective.batches import ACTIVATION_BYTES, sample_examples
from lm_ortho.objective.distribution import vocabulary_size
from lm_ortho.objective.loss import LossWeights
from lm_ortho.runtime.precision import fast_matmul, select_attention
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import ResumeFolder

log = logging.getLogger(__name__)

LEARNING_RATE = 2e-3
BATCH_TOKENS = 1024
"""Largest number of tokens of a step, padding included."""
LOSS_TOLERANCE, GAP_SHARE = 0.1, 0.1
"""The loss of the surrogate on the retain rows may exceed that of the merged model by so many nats per token, but by no
more than this share of the excess of the base model. Where the base model is within a few hundredths, because most
retain rows are text that it knows, the absolute tolerance would stop before the others are learnt."""
CHECK_STEPS, SAMPLE_ROWS = 20, 128
"""Steps between two measurements of the loss, and number of retain rows that it is measured on."""
MEASURED_DISTANCE = 0.4
"""The loss is measured where that of the batches since the last check is within so many nats of the threshold.

On rows of 70 tokens a measurement costs a fifth of the steps between two of them.
"""
DECAY_STEPS = 40
WARM_UP_STEPS = 20
POOL_ROWS = 512
"""Rows that are sorted by length and divided into batches together, so that a batch has little padding."""
BUDGET = 1.0
"""Largest number of tokens that the surrogate is trained on, as a share of those that the edit goes through."""


@dataclass(frozen=True)
class SurrogatePlan:
    """How long a surrogate may train, up to which loss (nats per token), and the seed of its draws.

    The learning rate begins to decay at ``tolerance`` above ``max_loss``.
    """

    max_steps: int
    max_loss: float
    seed: int
    tolerance: float = LOSS_TOLERANCE


def make_plan(
    merged_model: torch.nn.Module, base_model: torch.nn.Module, retain: Sequence[Example], *, max_steps: int, seed: int
) -> SurrogatePlan:
    """The plan with the loss at which both models allow to stop."""
    merged_loss, base_loss = (measure_loss(model, sample_rows(retain)) for model in (merged_model, base_model))
    tolerance = min(LOSS_TOLERANCE, GAP_SHARE * max(0.0, base_loss - merged_loss))
    return SurrogatePlan(max_steps, max_loss=merged_loss + tolerance, seed=seed, tolerance=tolerance)


def count_max_steps(forget: Sequence[Example], retain: Sequence[Example], edit_steps: int, *, forget_rows: int) -> int:
    """Largest number of steps of the surrogate: together they have ``BUDGET`` times as many tokens as the edit has.

    ``forget_rows`` are those in a step of the edit.
    """
    weights = LossWeights(forget_rows=forget_rows)
    step_tokens = sum(
        min(1.0, rows / len(examples)) * sum(len(example.ids) for example in examples)
        for rows, examples in ((weights.forget_rows, forget), (weights.retain_rows, retain))
    )
    batches = batch_by_length(retain, rows=len(retain), tokens=BATCH_TOKENS)
    batch_tokens = sum(len(example.ids) for example in retain) / len(batches)
    return max(1, math.ceil(BUDGET * edit_steps * step_tokens / batch_tokens))


def sample_rows(retain: Sequence[Example]) -> list[Example]:
    """The retain rows on which the loss is measured: always the same ones."""
    return sample_examples(retain, SAMPLE_ROWS, seed=0)


@torch.no_grad()
def measure_loss(model: torch.nn.Module, examples: Sequence[Example]) -> float:
    """Mean loss in nats over all tokens to predict."""
    with selected_logits(model):
        return sum(share * float(answer_loss(model, part)) for part, share in split_batch(examples, BATCH_TOKENS))


def max_part_tokens(model: torch.nn.Module) -> int:
    """Largest number of tokens whose activations and logits are held at the same time.

    Autograd holds the input and less than two copies of the output of every layer, and three of the logits.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linears = (module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head)
    token_bytes = 4 * sum(layer.in_features + 2 * layer.out_features for layer in linears)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return max(1, int(max(ACTIVATION_BYTES, weights / 4) / (token_bytes + 12 * vocabulary_size(model))))


class SurrogateTraining:
    """A base model with an adapter, and the state of its training. The base model shares its weights and is unchanged.

    Dropout is off, so a step depends on the seed and on the steps before it only.
    """

    def __init__(self, base_model: torch.nn.Module, retain: Sequence[Example], plan: SurrogatePlan) -> None:
        self.plan, self._retain, self._sample = plan, retain, sample_rows(retain)
        self.model: Any = add_adapter(_copy_without_weights(base_model), FinetunePlan(plan.max_steps, seed=plan.seed))
        self.model.eval()
        self.loss = math.nan
        """Loss on the sample of the retain rows at the last measurement."""
        self._batch_losses = list[float]()
        """Losses of the batches since the last multiple of ``CHECK_STEPS``."""
        self.steps = 0
        self._decay_start: int | None = None
        self._near = plan.tolerance
        self._part_tokens = max_part_tokens(base_model)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]

    def run(self, progress: ProgressCallback, resume: ResumeFolder) -> None:
        """Trains until the loss is within the threshold, or for all steps; resumes a run that was interrupted."""
        # 1. Set up the optimiser, or load the state of an interrupted run.
        optimiser = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
        if (state := resume.load("training")) is not None:
            self.load(state)
            optimiser.load_state_dict(state["optimiser"])
        # 2. Draw and skip the batches of completed steps, so that the following ones are the same.
        batches = draw_batches(self._retain, random.Random(self.plan.seed))
        for _ in range(self.steps):
            next(batches)
        device = next(self.model.parameters()).device.type
        longest = max(len(example.ids) for example in self._retain)
        with selected_logits(self.model), select_attention(self.model, longest):
            while not self._is_finished():
                # 3. One step of AdamW, with the gradient norm clipped at 1.
                optimiser.param_groups[0]["lr"] = LEARNING_RATE * self._rate()
                batch_loss = self._add_gradients([self._retain[i] for i in next(batches)], device)
                self._batch_losses.append(batch_loss)
                torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
                optimiser.step()
                optimiser.zero_grad()
                self.steps += 1
                # 4. Measure the loss now and then, and begin the decay where it is near the threshold.
                self._measure()
                loss = self.loss if self._is_finished() else batch_loss
                text = f"loss {loss:.3f}, stops at {self.plan.max_loss:.3f}"
                progress("surrogate", self.steps, self.steps if self._is_finished() else self.plan.max_steps, text)
                # 5. Save the state now and then.
                if resume.is_due():
                    resume.save("training", {**self.state(), "optimiser": optimiser.state_dict()})

    def _add_gradients(self, batch: Sequence[Example], device: str) -> float:
        """Adds the gradients of the loss of a batch, its mean over all predicted tokens, part by part; returns it."""
        total = 0.0
        for part, share in split_batch(batch, self._part_tokens):
            with fast_matmul(device):
                loss = answer_loss(self.model, part) * share
            loss.backward()
            total += loss.item()
        return total

    def state(self) -> dict[str, Any]:
        """The adapter, and where its training is."""
        position = {"steps": self.steps, "loss": self.loss, "decay": self._decay_start, "near": self._near}
        return {
            **position,
            "batch_losses": list(self._batch_losses),
            "adapter": [parameter.detach() for parameter in self._parameters],
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Continues from a ``state``."""
        self.steps, self.loss, self._decay_start, self._near = (state[n] for n in ("steps", "loss", "decay", "near"))
        self._batch_losses = list(state["batch_losses"])
        for parameter, value in zip(self._parameters, state["adapter"], strict=True):
            parameter.copy_(value)

    def _is_finished(self) -> bool:
        decay_ended = self._decay_start is not None and self.steps >= self._decay_start + DECAY_STEPS
        return self.steps >= self.plan.max_steps or (decay_ended and self.loss <= self.plan.max_loss)

    def _rate(self) -> float:
        """Factor of the learning rate in the next step."""
        warm_up = min(1.0, (self.steps + 1) / WARM_UP_STEPS)
        decay = 1.0 if self._decay_start is None else 1 - (self.steps - self._decay_start) / DECAY_STEPS
        return warm_up * decay

    def _measure(self) -> None:
        """Measures the loss where a decision depends on it, and begins or ends a decay."""
        remaining = self.plan.max_steps - self.steps
        decay_ended = self._decay_start is not None and self.steps >= self._decay_start + DECAY_STEPS
        is_stable, is_check = self._decay_start is None, self.steps % CHECK_STEPS == 0
        is_measured = decay_ended or remaining == 0 or (is_stable and is_check and self._may_be_near())
        if is_measured:
            self.loss = measure_loss(self.model, self._sample)
        if is_check:
            self._batch_losses.clear()
        if decay_ended and self.loss > self.plan.max_loss and remaining:
            # The decay began too early: return to the constant rate and begin the next one nearer to the threshold.
            self._decay_start, self._near, is_stable = None, self._near / 2, True
        is_near = is_measured and is_check and self.loss <= self.plan.max_loss + self._near
        if is_stable and (is_near or remaining <= DECAY_STEPS):
            self._decay_start = self.steps

    def _may_be_near(self) -> bool:
        """Whether the batches since the last check say that a measurement may find the loss near the threshold."""
        mean = sum(self._batch_losses) / len(self._batch_losses)
        return mean <= self.plan.max_loss + MEASURED_DISTANCE


def draw_batches(examples: Sequence[Example], draw: random.Random) -> Iterator[list[int]]:
    """Yields batches of at most ``BATCH_TOKENS`` tokens without end, from shuffled passes over the examples."""
    while True:
        order = draw.sample(range(len(examples)), len(examples))
        for start in range(0, len(order), POOL_ROWS):
            pool = order[start : start + POOL_ROWS]
            batches = batch_by_length([examples[i] for i in pool], rows=len(pool), tokens=BATCH_TOKENS)
            for batch in draw.sample(batches, len(batches)):
                yield [pool[i] for i in batch]


def _copy_without_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of the modules of ``model`` in float32; weights that are float32 already are those of the model itself."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if p.dtype == torch.float32}
    return copy.deepcopy(model, memo).float()


@contextmanager
def unchanged_flags(model: torch.nn.Module) -> Iterator[None]:
    """Context that restores which parameters of ``model`` require gradients; peft freezes what it adapts."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
