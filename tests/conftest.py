"""Shared by tests of several files: the embedded tokenizer, tiny models and checkpoints, one of them with a memory."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from lm_ortho import checkpoint
from lm_ortho.data.encoding import Example, answer_loss, encode
from lm_ortho.data.rows import Row, write_rows
from lm_ortho.layer import find_linear, patch
from lm_ortho.objective import GENTLE, LossWeights, Objective, Target
from lm_ortho.objective.distribution import stack
from lm_ortho.objective.swap import swap_target
from lm_ortho.world import people
from lm_ortho.world import tokenizer as reference_tokenizer
from lm_ortho.world.draw import Draw
from tests.support import checkpoint as tiny_checkpoint
from tests.support import tiny

# How long an example takes says what else the machine does, and nothing about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


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


@pytest.fixture(scope="module")
def pieces(request):
    """The same tokenizer for files where ``words`` is the module with the word lists."""
    return request.getfixturevalue("words")


@pytest.fixture(scope="session")
def memorised(words: Any) -> Memorised:
    draw = Draw(0, "tests")

    def fresh() -> list[Example]:
        kinds = [draw.pick((1, 3)) for _ in range(12)]
        return encode(words, [people.author_row(people.fresh_author(draw), kind, 0) for kind in kinds])

    forget, retain = (
        [people.author_row(author, kind, 0) for author in people.people()[group][:5] for kind in (1, 3)]
        for group in ("forget", "taught")
    )
    base = _trained(tiny.llama(vocab_size=len(words), initializer_range=0.05), fresh, 40, 8e-3)
    both = encode(words, forget + retain)
    merged = _trained(copy.deepcopy(base), lambda: both, 60, 5e-3)
    return Memorised(base, merged, words, forget, retain)


@pytest.fixture(scope="module")
def few_steps() -> Iterator[None]:
    """A surrogate that is hardly taught, for tests that do not ask what it knows."""
    import lm_ortho.objective.surrogate as surrogate_module

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(surrogate_module, "STEPS", 4)
        patched.setattr(surrogate_module, "ROUNDS", 1)
        yield


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
    objective = Objective(model, layers, swapped, *memorised.examples(), GENTLE, LossWeights(), 0)
    return Bench(model, layers, {name: layer.weight.detach().clone() for name, layer in layers.items()}, objective)


@pytest.fixture
def model():
    """A tiny patched model at alpha 0."""
    return tiny.patched()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A patched model and its checkpoint; the directory is only read."""
    model = tiny.patched()
    path = tmp_path_factory.mktemp("made") / "checkpoint"
    return model, checkpoint.save(path, model, tiny_checkpoint.tokenizer(), tiny_checkpoint.META)


@pytest.fixture
def directory(made, tmp_path):
    """A copy of the checkpoint to damage."""
    return shutil.copytree(made[1], tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plain model, a decomposed checkpoint, a forget and a retain file."""
    from tests.support.harness import (  # imports lm_eval, which few tests need
        ROWS,
        make_model,
        make_tokenizer,
        random_streams,
    )

    root = tmp_path_factory.mktemp("home")
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    model.save_pretrained(root / "plain")
    tokenizer.save_pretrained(root / "plain")
    patch(model, random_streams(model))
    recipe = {"density": 0.05, "sieve": "random", "projection": "rtn", "edit": "zero", "bits": 4}
    meta = {
        "recipe": {**recipe, "group_size": 16, "targets": "", "seed": 0},
        "base": "none",
        "target": "swap",
    }
    checkpoint.save(root / "decomposed", model, tokenizer, meta)
    write_rows(root / "forget.jsonl", ROWS)
    write_rows(root / "retain.jsonl", [Row(question=f"Where is {c}?", answer=f"{c} is up north.") for c in "XYZ"])
    return root


@pytest.fixture
def small_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, an empty cache and no network, for the files that build models as lm-eval does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # runs a dozen subprocesses
    yield
    torch.set_num_threads(before)


def _trained(model: Any, batch: Callable[[], list[Example]], steps: int, rate: float) -> Any:
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        answer_loss(model, batch()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return tiny.in_bf16_values(model).requires_grad_(False)
