"""Shared by all tests: the embedded tokenizer, and a tiny model that holds a memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch

from lm_ortho.calibration.documents import Row
from lm_ortho.calibration.examples import Example, answer_loss, encode
from lm_ortho.layer import find_linear
from lm_ortho.reference import tokenizer as reference_tokenizer
from lm_ortho.reference import world
from lm_ortho.reference.draw import Draw
from lm_ortho.target import GENTLE, Objective, Target, Weights
from lm_ortho.target.distribution import stack
from lm_ortho.target.swap import swap_target


@dataclass(frozen=True)
class Memorised:
    """A 2-layer Llama before and after it learnt ten forget and ten retain questions by heart. Do not change."""

    base: torch.nn.Module
    merged: torch.nn.Module
    tokenizer: Any
    forget: list[Row]
    retain: list[Row]

    def examples(self) -> tuple[list[Example], list[Example]]:
        return encode(self.tokenizer, self.forget), encode(self.tokenizer, self.retain)


@dataclass(frozen=True)
class Bench:
    """A copy of the memorised model that a test may change, and the objective of forgetting on it."""

    model: torch.nn.Module
    layers: dict[str, torch.nn.Linear]
    weights: dict[str, torch.Tensor]
    objective: Objective

    def losses(self) -> tuple[float, float]:
        """Forget and retain loss in nats at the model's weights, over all examples."""
        _, lost, kept = self.objective.gradients()
        return lost, kept


@pytest.fixture(scope="session")
def words() -> Any:
    """The embedded tokenizer, built from the word lists."""
    return reference_tokenizer.build()


@pytest.fixture(scope="session")
def memorised(words: Any) -> Memorised:
    draw = Draw(0, "tests")

    def fresh() -> list[Example]:
        kinds = [draw.pick((1, 3)) for _ in range(12)]
        return encode(words, [world.author_row(world.fresh_author(draw), kind, 0) for kind in kinds])

    forget, retain = (
        [world.author_row(author, kind, 0) for author in world.people()[group][:5] for kind in (1, 3)]
        for group in ("forget", "taught")
    )
    base = _trained(tiny.llama(vocab_size=len(words), initializer_range=0.05), fresh, 40, 8e-3)
    both = encode(words, forget + retain)
    merged = _trained(copy.deepcopy(base), lambda: both, 60, 5e-3)
    return Memorised(base, merged, words, forget, retain)


@pytest.fixture(scope="session")
def swapped(memorised: Memorised) -> Target:
    """What the memorised model would say about others: target b."""
    examples, _ = memorised.examples()
    rows = memorised.forget
    return stack(examples, swap_target(memorised.merged, memorised.tokenizer, rows, examples, seed=0, subjects=4))


@pytest.fixture(autouse=True, scope="session")
def same_precision_everywhere():
    """Numbers in tests do not depend on whether the CPU has BF16 products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture
def bench(memorised: Memorised, swapped: Target) -> Bench:
    model = copy.deepcopy(memorised.merged)
    layers = find_linear(model)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    objective = Objective(model, layers, swapped, *memorised.examples(), GENTLE, Weights(), 0)
    return Bench(model, layers, {name: layer.weight.detach().clone() for name, layer in layers.items()}, objective)


def _trained(model: Any, batch: Callable[[], list[Example]], steps: int, rate: float) -> Any:
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        answer_loss(model, batch()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return tiny.in_bf16_values(model).requires_grad_(False)
