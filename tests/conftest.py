"""Fixtures of several test files: the embedded tokenizer, tiny models and checkpoints, one of them with a memory."""

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
from lm_ortho.world.draw import SeededRandom
from tests.support import checkpoint as tiny_checkpoint
from tests.support import tiny

# The time of an example depends on the load of the machine, so hypothesis has no deadline.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@dataclass(frozen=True)
class MemorisedModels:
    """A 2-layer Llama before and after it memorised ten forget and ten retain questions. Tests must not change it."""

    base: torch.nn.Module
    merged: torch.nn.Module
    tokenizer: Any
    forget: list[Row]
    retain: list[Row]

    def examples(self) -> tuple[list[Example], list[Example]]:
        return encode(self.tokenizer, self.forget), encode(self.tokenizer, self.retain)


@dataclass(frozen=True)
class ForgettingSetup:
    """A copy of the memorised model that a test may change, with the forgetting objective for it."""

    model: torch.nn.Module
    layers: dict[str, torch.nn.Linear]
    weights: dict[str, torch.Tensor]
    objective: Objective

    def losses(self) -> tuple[float, float]:
        """Forget and retain loss in nats at the model's weights, over all examples."""
        _, forget_loss, retain_loss = self.objective.gradients()
        return forget_loss, retain_loss


@pytest.fixture(scope="session")
def words() -> Any:
    """The embedded tokenizer, built from the word lists."""
    return reference_tokenizer.build_tokenizer()


@pytest.fixture(scope="module")
def embedded_tokenizer(request):
    """The same tokenizer, for test files that import the module ``words`` with the word lists."""
    return request.getfixturevalue("words")


@pytest.fixture(scope="session")
def memorised_models(words: Any) -> MemorisedModels:
    draw = SeededRandom(0, "tests")

    def draw_fresh_examples() -> list[Example]:
        kinds = [draw.choice((1, 3)) for _ in range(12)]
        return encode(words, [people.make_author_row(people.draw_author(draw), kind, 0) for kind in kinds])

    forget, retain = (
        [people.make_author_row(author, kind, 0) for author in people.draw_groups()[group][:5] for kind in (1, 3)]
        for group in ("forget", "taught")
    )
    untrained_model = tiny.llama(vocab_size=len(words), initializer_range=0.05)
    base = _train(untrained_model, draw_fresh_examples, steps=40, rate=8e-3)
    examples = encode(words, forget + retain)
    merged = _train(copy.deepcopy(base), lambda: examples, steps=60, rate=5e-3)
    return MemorisedModels(base, merged, words, forget=forget, retain=retain)


@pytest.fixture(scope="module")
def short_surrogate_training() -> Iterator[None]:
    """Few surrogate training steps, for tests that do not depend on what the surrogate knows."""
    from lm_ortho.objective import surrogate_training

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(surrogate_training, "BUDGET", 0.1)
        yield


@pytest.fixture(scope="session")
def swap_distributions(memorised_models: MemorisedModels) -> Target:
    """Target b: distributions of the memorised model with other subjects in the rows."""
    examples, _ = memorised_models.examples()
    rows = memorised_models.forget
    return stack(
        examples,
        swap_target(memorised_models.merged, memorised_models.tokenizer, rows, examples=examples, seed=0, subjects=4),
    )


@pytest.fixture(autouse=True, scope="session")
def same_precision_everywhere():
    """Turns BF16 products off, so that the numbers in tests do not depend on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


@pytest.fixture
def forgetting_setup(memorised_models: MemorisedModels, swap_distributions: Target) -> ForgettingSetup:
    model = copy.deepcopy(memorised_models.merged)
    layers = find_linear(model)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    forget, retain = memorised_models.examples()
    objective = Objective(
        model, layers, swap_distributions, forget=forget, retain=retain, penalty=GENTLE, weights=LossWeights(), seed=0
    )
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    return ForgettingSetup(model, layers, weights, objective=objective)


@pytest.fixture
def model():
    """A tiny patched model at alpha 0."""
    return tiny.patched_model()


@pytest.fixture(scope="module")
def saved_checkpoint(tmp_path_factory):
    """A patched model and its checkpoint; tests must not write to the directory."""
    model = tiny.patched_model()
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    return model, checkpoint.save(path, model, tiny_checkpoint.tokenizer(), meta=tiny_checkpoint.META)


@pytest.fixture
def directory(saved_checkpoint, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return shutil.copytree(saved_checkpoint[1], tmp_path / "checkpoint")


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
    checkpoint.save(root / "decomposed", model, tokenizer, meta=meta)
    write_rows(root / "forget.jsonl", ROWS)
    write_rows(root / "retain.jsonl", [Row(question=f"Where is {c}?", answer=f"{c} is up north.") for c in "XYZ"])
    return root


@pytest.fixture
def isolated_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, an empty cache and no network, for test files that build models through lm-eval."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("LM_ORTHO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # runs a dozen subprocesses
    yield
    torch.set_num_threads(threads)


def _train(model: Any, draw_batch: Callable[[], list[Example]], *, steps: int, rate: float) -> Any:
    """Trains the model in place with AdamW, rounds it to BF16 values and returns it."""
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        answer_loss(model, draw_batch()).backward()
        optimiser.step()
        optimiser.zero_grad()
    return tiny.round_to_bf16(model).requires_grad_(False)
