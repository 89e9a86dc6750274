"""What large models need: less held at once, the same numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lm_ortho.objective.loss as objective_module
from lm_ortho.calibration import activations, by_layer
from lm_ortho.calibration.activations import input_moments
from lm_ortho.calibration.by_layer import InputMoments, LayerTensors, snapshot_weights
from lm_ortho.config import make_recipe
from lm_ortho.edit import EDITS
from lm_ortho.layer import find_linear
from lm_ortho.objective import GENTLE, LossWeights, Objective
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.runtime.precision import gradient_checkpointing
from lm_ortho.sieve import select_support
from lm_ortho.sieve.attribution import in_groups
from tests.support import tiny

torch.set_num_threads(1)


# --- by layer


def test_a_snapshot_is_the_weight_as_it_was():
    model = tiny.llama()
    layers = find_linear(model)
    odd = next(iter(layers))
    with torch.no_grad():
        layers[odd].weight[0, 0] = 1 / 3  # no BF16 value
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    kept = snapshot_weights(layers)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.zero_()
    assert list(kept) == list(layers)
    assert len(kept) == len(layers)
    for name, weight in before.items():
        assert kept[name].dtype == torch.float32
        assert torch.equal(kept[name], weight)
    with pytest.raises(KeyError):
        LayerTensors(["a"], lambda _: torch.zeros(1))["b"]


@pytest.fixture
def documents(memorised):
    return memorised.examples()[1]


def by_hand(model, layers, examples):
    """Every layer by itself, a document at a time."""
    sums = {name: torch.zeros(layer.in_features, layer.in_features).double() for name, layer in layers.items()}
    for name, layer in layers.items():

        def add(_, inputs, name=name):
            x = inputs[0][0].double()
            sums[name] += x.T @ x

        handle = layer.register_forward_pre_hook(add)
        for example in examples:
            with torch.no_grad():
                model(input_ids=torch.tensor([example.ids]))
        handle.remove()
    tokens = sum(len(example.ids) for example in examples)
    return {name: total / tokens for name, total in sums.items()}


def test_moments_in_one_pass_and_in_many(memorised, documents, monkeypatch):
    model, layers = memorised.merged, find_linear(memorised.merged)
    expected = by_hand(model, layers, documents)
    whole = InputMoments(model, layers, documents)
    assert whole.passes == 1
    by_block = InputMoments(model, layers, documents, limit=4 * 3 * 64**2)
    assert by_block.passes == 1
    monkeypatch.setattr(by_layer, "goes_by_block", lambda *_: False)
    few = InputMoments(model, layers, documents, limit=4 * 3 * 64**2)
    assert few.passes > 3
    for name in layers:
        torch.testing.assert_close(whole[name].double(), expected[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(whole[name], few[name])
        assert torch.equal(whole[name], by_block[name])
    shared = {name: moment.data_ptr() for name, moment in whole.items()}
    block = "model.layers.0"
    assert len({shared[f"{block}.self_attn.{part}_proj"] for part in "qkv"}) == 1
    assert shared[f"{block}.mlp.gate_proj"] == shared[f"{block}.mlp.up_proj"]
    assert shared[f"{block}.self_attn.q_proj"] != shared[f"{block}.self_attn.o_proj"]


def test_a_pass_ends_with_the_last_layer_that_is_asked_about(memorised, documents):
    layers = find_linear(memorised.merged)
    first = {name: layer for name, layer in layers.items() if ".layers.0." in name}
    calls = []
    handle = memorised.merged.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        found = input_moments(memorised.merged, first, [*documents] * 20)
    finally:
        handle.remove()
    assert list(found) == list(first)
    assert len(calls) == 1, "the first batch goes all the way, to see that each layer is called once"


class Fickle(nn.Module):
    """Gives its two layers the same tensor in the first call only."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0
        self.embed = nn.Embedding(9, 4)
        self.config = tiny.llama().config

    def forward(self, input_ids, use_cache=False):
        self.calls += 1
        x = self.embed(input_ids)
        return self.a(x) + self.b(x if self.calls == 1 else 2 * x)


def test_layers_that_share_an_input_only_at_first(documents):
    model = Fickle()
    layers = {"a": model.a, "b": model.b}
    short = [type(documents[0])(tuple(i % 9 for i in e.ids), e.roles) for e in [*documents] * 10]
    found = input_moments(model, layers, short)
    torch.testing.assert_close(found["b"], 4 * found["a"])


def test_moments_of_layers_called_twice(documents, memorised):
    class Twice(Fickle):
        def forward(self, input_ids, use_cache=False):
            x = self.embed(input_ids)
            return self.a(self.a(x)) + self.b(x)

    model = Twice()
    short = [type(documents[0])(tuple(i % 9 for i in e.ids), e.roles) for e in [*documents] * 10]
    found = input_moments(model, {"a": model.a, "b": model.b}, short)
    total = torch.zeros(4, 4)
    with torch.no_grad():
        for example in short:
            x = model.embed(torch.tensor(example.ids))
            y = model.a(x)
            total += x.T @ x + y.T @ y
    torch.testing.assert_close(found["a"], total / sum(len(e.ids) for e in short), rtol=1e-4, atol=1e-5)
    assert activations.DAMPING > 0


# --- selection


def by_sorting(scores, density):
    every = torch.cat([score.flatten() for score in scores.values()])
    mask = torch.zeros_like(every, dtype=torch.bool)
    mask[every.argsort(descending=True, stable=True)[: int(density * every.numel() + 1e-9)]] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return [part.reshape(score.shape) for part, score in zip(parts, scores.values(), strict=True)]


@given(st.integers(0, 999), st.sampled_from([0.01, 0.1, 0.5, 0.9]), st.booleans(), st.sampled_from([1e-20, 1.0, 1e20]))
@settings(max_examples=80)
def test_the_selection_is_that_of_a_stable_sort(seed, density, ties, size):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"{i}": torch.randn(5, 7 + i, generator=generator) for i in range(3)}
    scores = {name: (score.round() if ties else score) * size for name, score in scores.items()}
    scores["1"][0], scores["2"][0] = -torch.inf, -0.0
    found = select_support(scores, density)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), by_sorting(scores, density), strict=True))


# --- the objective of a large model


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(objective_module, "LARGE", 0)


def made(memorised, swapped):
    model = copy.deepcopy(memorised.merged)
    layers = find_linear(model)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    return Objective(model, layers, swapped, *memorised.examples(), GENTLE, LossWeights(), 0)


def test_gradients_added_up_in_place(memorised, swapped, large):
    in_place = made(memorised, swapped)
    objective_module.LARGE = 2**40
    side_by_side = made(memorised, swapped)
    for _ in range(2):
        (one, *losses), (other, *same) = in_place.gradients(), side_by_side.gradients()
        assert losses == pytest.approx(same, rel=1e-5)
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=1e-4, atol=1e-7)
            assert in_place.layers[name].weight.grad is None


@pytest.mark.parametrize("limit", [0, 2**40])
def test_gradients_only_where_they_are_wanted(memorised, swapped, monkeypatch, limit):
    monkeypatch.setattr(objective_module, "LARGE", limit)
    objective = made(memorised, swapped)
    places = {name: torch.arange(3, layer.weight.numel(), 97) for name, layer in objective.layers.items()}
    whole, *_ = objective.gradients()
    objective.restart(0)
    part, *_ = objective.gradients(places)
    for name, gradient in whole.items():
        torch.testing.assert_close(part[name], gradient.flatten()[places[name]], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("limit", [0, 2**40])
def test_gradients_of_some_layers(memorised, swapped, monkeypatch, limit):
    monkeypatch.setattr(objective_module, "LARGE", limit)
    objective = made(memorised, swapped)
    whole, *_ = objective.gradients()
    chosen = list(objective.layers)[3:5]
    objective.restart(0)
    with objective.only(chosen):
        part, *_ = objective.gradients()
        assert [name for name, layer in objective.layers.items() if layer.weight.requires_grad] == chosen
    assert list(part) == chosen
    for name in chosen:
        torch.testing.assert_close(part[name], whole[name], rtol=1e-4, atol=1e-7)
    assert all(layer.weight.requires_grad for layer in objective.layers.values())


def test_recomputed_activations_give_the_same_gradients(memorised, swapped):
    objective = made(memorised, swapped)
    before, *_ = objective.gradients()
    blocks = objective.model.model.layers
    runs = []
    handle = blocks[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    objective.restart(0)
    with gradient_checkpointing(objective.model):
        again, *_ = objective.gradients()
    handle.remove()
    assert len(runs) == 2 * 4, "four parts of a step, each once more in its backward pass"
    for name, gradient in before.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-7)
    assert all("forward" not in vars(block) for block in blocks)


# --- whole decompositions


@given(st.integers(1, 12), st.integers(1, 20))
def test_groups_hold_every_layer_once(names, count):
    parts = in_groups([str(i) for i in range(names)], count)
    assert [name for part in parts for name in part] == [str(i) for i in range(names)]
    assert len(parts) == min(names, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def split(memorised, **recipe):
    return decompose(
        copy.deepcopy(memorised.merged), memorised.tokenizer, memorised.forget, memorised.retain,
        make_recipe(steps=30, density=0.05, group_size=32, **recipe),
    )  # fmt: skip


def overlap(one, other):
    both = sum(int((one[n].ortho.support() & other[n].ortho.support()).sum()) for n in one)
    return both / sum(layer.nnz for layer in one.values())


def test_the_lean_ways_give_about_the_same_support(memorised, large):
    usual = split(memorised)
    assert overlap(usual.streams, split(memorised, recompute=True).streams) > 0.98
    assert overlap(usual.streams, split(memorised, states="bfloat16").streams) > 0.9
    grouped = split(memorised, groups=3)
    assert overlap(usual.streams, grouped.streams) > 0.5, "chance is .05"
    assert grouped.report["steps_moved"] > 0.3


def test_an_edit_leaves_the_model_as_it_was(memorised, bench):
    assert "optimised" in EDITS
    from lm_ortho.pipeline.workbench import Workbench

    model = copy.deepcopy(memorised.merged)
    before = copy.deepcopy(model.state_dict())
    recipe = make_recipe(steps=10, density=0.05, sieve="random")
    with Workbench(model, memorised.tokenizer, memorised.forget, memorised.retain, recipe) as workbench:
        support = workbench.support("random", 0.05, 10)
        workbench.edited("optimised", support, 10)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
