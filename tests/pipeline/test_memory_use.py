"""Memory savings for large models give the same numbers as the plain computation."""

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
from lm_ortho.sieve.attribution import split_into_groups
from tests.support import tiny

torch.set_num_threads(1)


# --- by layer


def test_a_snapshot_holds_the_original_weights():
    model = tiny.llama()
    layers = find_linear(model)
    odd = next(iter(layers))
    with torch.no_grad():
        layers[odd].weight[0, 0] = 1 / 3  # no BF16 value
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    snapshot = snapshot_weights(layers)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.zero_()
    assert list(snapshot) == list(layers)
    assert len(snapshot) == len(layers)
    for name, weight in before.items():
        assert snapshot[name].dtype == torch.float32
        assert torch.equal(snapshot[name], weight)
    with pytest.raises(KeyError):
        LayerTensors(["a"], lambda _: torch.zeros(1))["b"]


@pytest.fixture
def documents(memorised_models):
    return memorised_models.examples()[1]


def compute_moments_per_layer(model, layers, examples):
    """Input moments of each layer, computed in its own passes of one document each."""
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


def test_moments_in_one_pass_and_in_many(memorised_models, documents, monkeypatch):
    model, layers = memorised_models.merged, find_linear(memorised_models.merged)
    expected = compute_moments_per_layer(model, layers, documents)
    full = InputMoments(model, layers, documents)
    assert full.passes == 1
    by_block = InputMoments(model, layers, documents, limit=4 * 3 * 64**2)
    assert by_block.passes == 1
    monkeypatch.setattr(by_layer, "supports_blockwise", lambda *_: False)
    few = InputMoments(model, layers, documents, limit=4 * 3 * 64**2)
    assert few.passes > 3
    for name in layers:
        torch.testing.assert_close(full[name].double(), expected[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(full[name], few[name])
        assert torch.equal(full[name], by_block[name])
    addresses = {name: moment.data_ptr() for name, moment in full.items()}
    block = "model.layers.0"
    assert len({addresses[f"{block}.self_attn.{part}_proj"] for part in "qkv"}) == 1
    assert addresses[f"{block}.mlp.gate_proj"] == addresses[f"{block}.mlp.up_proj"]
    assert addresses[f"{block}.self_attn.q_proj"] != addresses[f"{block}.self_attn.o_proj"]


def test_a_pass_ends_with_the_last_requested_layer(memorised_models, documents):
    layers = find_linear(memorised_models.merged)
    first = {name: layer for name, layer in layers.items() if ".layers.0." in name}
    calls = []
    handle = memorised_models.merged.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        moments = input_moments(memorised_models.merged, first, [*documents] * 20)
    finally:
        handle.remove()
    assert list(moments) == list(first)
    assert len(calls) == 1, "the first batch runs the full model, to check that each layer is called once"


class OnceSharedInput(nn.Module):
    """A model whose two layers get the same input tensor in the first call only."""

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
    model = OnceSharedInput()
    layers = {"a": model.a, "b": model.b}
    short = [type(documents[0])(tuple(i % 9 for i in e.ids), e.roles) for e in [*documents] * 10]
    moments = input_moments(model, layers, short)
    torch.testing.assert_close(moments["b"], 4 * moments["a"])


def test_moments_of_layers_called_twice(documents, memorised_models):
    class RepeatedLayer(OnceSharedInput):
        def forward(self, input_ids, use_cache=False):
            x = self.embed(input_ids)
            return self.a(self.a(x)) + self.b(x)

    model = RepeatedLayer()
    short = [type(documents[0])(tuple(i % 9 for i in e.ids), e.roles) for e in [*documents] * 10]
    moments = input_moments(model, {"a": model.a, "b": model.b}, short)
    total = torch.zeros(4, 4)
    with torch.no_grad():
        for example in short:
            x = model.embed(torch.tensor(example.ids))
            y = model.a(x)
            total += x.T @ x + y.T @ y
    torch.testing.assert_close(moments["a"], total / sum(len(e.ids) for e in short), rtol=1e-4, atol=1e-5)
    assert activations.DAMPING > 0


# --- selection


def select_by_sorting(scores, density):
    all_scores = torch.cat([score.flatten() for score in scores.values()])
    mask = torch.zeros_like(all_scores, dtype=torch.bool)
    mask[all_scores.argsort(descending=True, stable=True)[: int(density * all_scores.numel() + 1e-9)]] = True
    parts = mask.split([score.numel() for score in scores.values()])
    return [part.reshape(score.shape) for part, score in zip(parts, scores.values(), strict=True)]


@given(st.integers(0, 999), st.sampled_from([0.01, 0.1, 0.5, 0.9]), st.booleans(), st.sampled_from([1e-20, 1.0, 1e20]))
@settings(max_examples=80)
def test_the_selection_is_that_of_a_stable_sort(seed, density, ties, size):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"{i}": torch.randn(5, 7 + i, generator=generator) for i in range(3)}
    scores = {name: (score.round() if ties else score) * size for name, score in scores.items()}
    scores["1"][0], scores["2"][0] = -torch.inf, -0.0
    masks = select_support(scores, density)
    assert all(torch.equal(a, b) for a, b in zip(masks.values(), select_by_sorting(scores, density), strict=True))


# --- the objective of a large model


@pytest.fixture
def treat_as_large(monkeypatch):
    monkeypatch.setattr(objective_module, "LARGE", 0)


def make_objective(memorised_models, swap_distributions):
    model = copy.deepcopy(memorised_models.merged)
    layers = find_linear(model)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.weight.requires_grad_(True)
    forget, retain = memorised_models.examples()
    return Objective(model, layers, swap_distributions, forget, retain, penalty=GENTLE, weights=LossWeights(), seed=0)


def test_gradients_added_up_in_place(memorised_models, swap_distributions, treat_as_large):
    in_place = make_objective(memorised_models, swap_distributions)
    objective_module.LARGE = 2**40
    side_by_side = make_objective(memorised_models, swap_distributions)
    for _ in range(2):
        (one, *losses), (other, *same) = in_place.gradients(), side_by_side.gradients()
        assert losses == pytest.approx(same, rel=1e-5)
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=1e-4, atol=1e-7)
            assert in_place.layers[name].weight.grad is None


@pytest.mark.parametrize("limit", [0, 2**40])
def test_gradients_at_selected_positions(memorised_models, swap_distributions, monkeypatch, limit):
    monkeypatch.setattr(objective_module, "LARGE", limit)
    objective = make_objective(memorised_models, swap_distributions)
    places = {name: torch.arange(3, layer.weight.numel(), 97) for name, layer in objective.layers.items()}
    full_gradients, *_ = objective.gradients()
    objective.restart(0)
    with objective.restrict_to_support(places):
        part, *_ = objective.gradients()
    for name, gradient in full_gradients.items():
        torch.testing.assert_close(part[name], gradient.flatten()[places[name]], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("limit", [0, 2**40])
def test_gradients_of_some_layers(memorised_models, swap_distributions, monkeypatch, limit):
    monkeypatch.setattr(objective_module, "LARGE", limit)
    objective = make_objective(memorised_models, swap_distributions)
    full_gradients, *_ = objective.gradients()
    names = list(objective.layers)[3:5]
    objective.restart(0)
    with objective.restrict_to(names):
        part, *_ = objective.gradients()
        assert [name for name, layer in objective.layers.items() if layer.weight.requires_grad] == names
    assert list(part) == names
    for name in names:
        torch.testing.assert_close(part[name], full_gradients[name], rtol=1e-4, atol=1e-7)
    assert all(layer.weight.requires_grad for layer in objective.layers.values())


def test_recomputed_activations_give_the_same_gradients(memorised_models, swap_distributions):
    objective = make_objective(memorised_models, swap_distributions)
    before, *_ = objective.gradients()
    blocks = objective.model.model.layers
    runs = []
    handle = blocks[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
    objective.restart(0)
    with gradient_checkpointing(objective.model):
        again, *_ = objective.gradients()
    handle.remove()
    assert len(runs) == 2 * 4, "a step has four parts, each computed again in its backward pass"
    for name, gradient in before.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-4, atol=1e-7)
    assert all("forward" not in vars(block) for block in blocks)


# --- full decompositions


@given(st.integers(1, 12), st.integers(1, 20))
def test_groups_hold_every_layer_once(names, count):
    parts = split_into_groups([str(i) for i in range(names)], count)
    assert [name for part in parts for name in part] == [str(i) for i in range(names)]
    assert len(parts) == min(names, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def split(memorised_models, **recipe):
    return decompose(
        copy.deepcopy(memorised_models.merged),
        memorised_models.tokenizer,
        memorised_models.forget,
        memorised_models.retain,
        make_recipe(steps=30, density=0.05, group_size=32, **recipe),
    )


def overlap(one, other):
    both = sum(int((one[n].ortho.support() & other[n].ortho.support()).sum()) for n in one)
    return both / sum(layer.nnz for layer in one.values())


def test_the_memory_savings_give_about_the_same_support(memorised_models, treat_as_large):
    default = split(memorised_models)
    assert overlap(default.streams, split(memorised_models, recompute=True).streams) > 0.98
    assert overlap(default.streams, split(memorised_models, states="bfloat16").streams) > 0.9
    grouped_decomposition = split(memorised_models, groups=3)
    assert overlap(default.streams, grouped_decomposition.streams) > 0.5, "a random support would overlap by 0.05"
    assert grouped_decomposition.report["steps_moved"] > 0.3


def test_an_edit_restores_the_model(memorised_models, forgetting_setup):
    assert "optimised" in EDITS
    from lm_ortho.pipeline.workbench import Workbench

    model = copy.deepcopy(memorised_models.merged)
    before = copy.deepcopy(model.state_dict())
    recipe = make_recipe(steps=10, density=0.05, sieve="random")
    with Workbench(
        model, memorised_models.tokenizer, memorised_models.forget, memorised_models.retain, recipe=recipe
    ) as workbench:
        support = workbench.select_support("random", 0.05, 10)
        workbench.edit_codes("optimised", workbench.project(support), support, steps=10)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
