"""The parts of a step: within a budget of tokens and logits, with the same losses and gradients for every budget."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lm_ortho.data.encoding import ANSWER, CONTEXT, Example
from lm_ortho.data.logits import selected_logits
from lm_ortho.layer import find_linear
from lm_ortho.objective import DEEPER, LossWeights, Objective, batches, distribution, loss, position_terms, teacher
from lm_ortho.objective.batches import Budget, part_budget, split_into_parts
from lm_ortho.objective.distribution import stack
from lm_ortho.runtime.offload import offload_blocks
from lm_ortho.runtime.precision import gradient_checkpointing
from tests.support import tiny

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=30)


@given(lengths, st.integers(1, 200), st.integers(1, 200), st.randoms(use_true_random=False))
@settings(max_examples=80)
def test_parts_hold_every_row_once_and_no_more_than_the_budget(sizes, tokens, positions, draw):
    examples = [Example((1,) * size, (ANSWER,) * size) for size in sizes]
    predicted = [draw.randint(1, size - 1) for size in sizes]
    rows = draw.sample(range(len(sizes)), draw.randint(1, len(sizes)))
    parts = split_into_parts(rows, examples, predicted, Budget(tokens, positions))
    assert sorted(i for part in parts for i in part) == sorted(rows)
    for part in parts:
        if len(part) > 1:
            assert len(part) * max(sizes[i] for i in part) <= tokens
            assert sum(predicted[i] for i in part) <= positions
    # A part ends only where the next row does not fit, so two neighbours never fit into one.
    if len(parts) > 2:
        for one, other in pairwise(parts):
            longer = [*one, other[0]]
            is_too_wide = len(longer) * max(sizes[i] for i in longer) > tokens
            assert is_too_wide or sum(predicted[i] for i in longer) > positions


def draw_examples(count: int, seed: int, vocabulary: int = 128) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        context, answer = (int(torch.randint(1, 9, (1,), generator=generator)) for _ in range(2))
        ids = tuple(torch.randint(2, vocabulary, (context + answer,), generator=generator).tolist())
        result.append(Example(ids, (CONTEXT,) * context + (ANSWER,) * answer))
    return result


def make_objective(**settings: Any) -> Objective:
    """An objective of a random model in float64 that has moved away from its teacher."""
    model = tiny.llama(**settings).double()
    layers = find_linear(model)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    forget, retain = draw_examples(7, 1), draw_examples(11, 2)
    generator = torch.Generator().manual_seed(3)
    probs = [torch.randn(len(e.ids) - e.start, 128, generator=generator).softmax(-1) for e in forget]
    objective = Objective(
        model, layers, stack(forget, probs), forget, retain, penalty=DEEPER, weights=LossWeights(), seed=0
    )
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(0.9)
    return objective


def step(objective: Objective) -> tuple[dict[str, torch.Tensor], list[float]]:
    objective.restart(0)
    gradients, *losses = objective.gradients()
    return gradients, losses


def assert_same(step: Any, reference: Any) -> None:
    (gradients, losses), (expected, expected_losses) = step, reference
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("top_tokens", [None, 16])
def test_losses_and_gradients_do_not_depend_on_the_budget(monkeypatch, large, top_tokens):
    if top_tokens:
        for module in (distribution, teacher):
            monkeypatch.setattr(module, "FULL_VOCABULARY", 0)
            monkeypatch.setattr(module, "TOP_TOKENS", top_tokens)
    objective = make_objective()
    parts = []
    compute = Objective._compute_logits
    monkeypatch.setattr(
        Objective, "_compute_logits", lambda self, rows, mask: parts.append(rows) or compute(self, rows, mask)
    )
    reference = step(objective)
    assert len(parts) == 4
    monkeypatch.setattr(loss, "LARGE", 0 if large else 2**40)
    for budget in (Budget(40, 10**6), Budget(10**6, 12), Budget(1, 1)):
        monkeypatch.setattr(loss, "part_budget", lambda *_, budget=budget: budget)
        parts.clear()
        assert_same(step(objective), reference)
        assert len(parts) > 4
    assert len(parts) == 18
    # Log-probabilities in chunks of two positions, of the selected logits only.
    monkeypatch.setattr(position_terms, "CHUNK_LOGITS", 300)
    monkeypatch.setattr(loss, "part_budget", lambda *_: Budget(60, 10**6))
    with selected_logits(objective.model):
        assert_same(step(objective), reference)


def test_a_chunk_holds_no_more_logits_than_allowed(monkeypatch):
    monkeypatch.setattr(position_terms, "CHUNK_LOGITS", 25)
    sizes = []

    def terms(at, logp):
        sizes.append(logp.numel())
        assert at.stop - at.start == len(logp)
        return logp.square().sum(-1)[None]

    logits = torch.randn(11, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: position_terms.position_terms(terms, values), logits)
    assert max(sizes) <= 20
    wide = torch.randn(3, 40, requires_grad=True)
    position_terms.position_terms(terms, wide).sum().backward()
    assert sizes[-6:] == [40] * 6


def test_the_budget_of_a_part():
    """By its definition, on a model of two blocks of width 64."""
    model = tiny.llama()
    layers = find_linear(model)
    per_block = 4 * (64 + 2 * 64 + 2 * (64 + 2 * 32) + 64 + 2 * 64 + 2 * (64 + 2 * 96) + 96 + 2 * 64)
    assert part_budget(model, layers, 1) == Budget(2**30 // (2 * per_block), 2**25 // 128)
    assert part_budget(model, layers, 4) == Budget(2**28 // (2 * per_block), 2**23 // 128)
    with gradient_checkpointing(model):
        assert part_budget(model, layers, 1).tokens == 2**30 // (per_block + 4 * 64 * 2)
    with offload_blocks(model, "cpu"):
        assert part_budget(model, layers, 1) == Budget(2**33 // (per_block + 4 * 64 * 2), 2**28 // 128)
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(batches, "ACTIVATION_BYTES", 0)
        assert part_budget(model, layers, 1).tokens == weights // 4 // (2 * per_block)


def test_the_activations_of_a_token_are_no_more_than_the_budget_reckons():
    """Tensors that autograd holds for the backward pass, counted once each."""
    model = tiny.llama(hidden_size=256, intermediate_size=640, num_hidden_layers=3)
    layers = find_linear(model)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = tiny.tokens(4, 32)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = model.model(input_ids=ids, use_cache=False).last_hidden_state
    held = sum(storage.nbytes() for address, storage in storages.items() if address not in weights)
    reckoned = batches.ACTIVATION_BYTES / part_budget(model, layers, 1).tokens * ids.numel()
    assert output.requires_grad
    assert 0.5 * reckoned < held < reckoned


def test_the_teacher_needs_the_logits_of_few_rows_at_a_time(monkeypatch):
    model = tiny.llama()
    examples = draw_examples(20, 5)
    reference = teacher.Teacher(model, examples)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    monkeypatch.setattr(batches, "LOGITS", 40 * 128)
    with selected_logits(model):
        few = teacher.Teacher(model, examples)
    assert max(rows) <= 40
    assert sum(rows) == sum(len(example.ids) - 1 for example in examples)
    for one, other in zip(few._logp, reference._logp, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-10, atol=0)  # float16 rounds either way


def test_only_layers_are_counted():
    assert part_budget(tiny.llama(), {"a": nn.Linear(2, 3)}, 1).tokens == 2**30 // (4 * 8)
