"""Gradients on the support equal those of all weights there, and nothing below the first support is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lm_ortho.layer import find_linear, linear_form
from lm_ortho.objective import support_gradient
from lm_ortho.objective.batches import Budget
from lm_ortho.objective.support_gradient import SupportGradient, support_gradients
from lm_ortho.runtime.offload import offload_blocks
from lm_ortho.runtime.precision import fast_matmul, gradient_checkpointing
from tests.objective.test_parts import assert_same, make_objective, step
from tests.support import tiny
from tests.support.architectures import CASES
from tests.support.paths import REPOSITORY
from tests.support.scripts import load_script

torch.set_num_threads(1)


def draw_positions(layers: dict[str, nn.Linear], density: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(layer.weight.numel(), generator=generator) < density for name, layer in layers.items()}
    return {name: mask.nonzero()[:, 0] for name, mask in masks.items()}


def dense_gradients(layers: dict[str, nn.Linear], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    gradients = torch.autograd.grad(loss(), weights, materialize_grads=True)
    return dict(zip(layers, gradients, strict=True))


def sampled_gradients(
    layers: dict[str, nn.Linear], positions: dict[str, Tensor], loss: Callable[[], Tensor]
) -> dict[str, Tensor]:
    with support_gradients(layers, positions) as leaves:
        gradients = torch.autograd.grad(loss(), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True))


def assert_equal(sampled: dict[str, Tensor], dense: dict[str, Tensor], positions: dict[str, Tensor]) -> None:
    assert list(sampled) == list(dense)
    for name, gradient in dense.items():
        expected = gradient.flatten()[positions[name]]
        torch.testing.assert_close(sampled[name], expected, rtol=1e-9, atol=1e-12 * float(gradient.abs().max() + 1))


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(0, 40),
    st.sampled_from([0.0, 0.005, 0.02, 0.1, 0.2, 1.0]),
    st.integers(0, 99),
)
@settings(max_examples=80)
def test_a_sampled_product_is_the_whole_one_at_its_positions(rows, columns, tokens, density, seed):
    layer = nn.Linear(columns, rows, bias=False, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(tokens, width, dtype=torch.float64, generator=generator) for width in (rows, columns))
    positions = draw_positions({"a": layer}, density, seed)["a"]
    support = SupportGradient(layer, positions)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(support_gradient, "TOKEN_CHUNK", 16)
        result = support.compute(left, right)
    torch.testing.assert_close(result, (left.t() @ right).flatten()[positions], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral", "Falcon"])
@pytest.mark.parametrize("density", [0.05, 0.5])
def test_every_layer_has_the_gradients_of_the_plain_pass(name, density):
    """Also an expert that no token is routed to, layers in another shape, and outputs that are written to in place."""
    model = CASES[name].build().double().requires_grad_(False)
    ids = tiny.tokens(2, 9, seed=3) % 40

    def loss() -> Tensor:
        return model(input_ids=ids, use_cache=False).logits.square().mean()

    with linear_form(model):
        layers = find_linear(model)
        positions = draw_positions(layers, density)
        dense = dense_gradients(layers, loss)
        assert_equal(sampled_gradients(layers, positions, loss), dense, positions)
        with gradient_checkpointing(model):
            assert_equal(sampled_gradients(layers, positions, loss), dense, positions)
        with offload_blocks(model, "cpu"):
            assert_equal(sampled_gradients(layers, positions, loss), dense, positions)
        assert all("forward" not in vars(layer) for layer in layers.values())
        assert all(layer.weight.requires_grad for layer in layers.values())


class Repeated(nn.Module):
    """Layer ``a`` is called twice, ``b`` once, and ``c`` never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(12, 12, dtype=torch.float64) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.b(self.a(self.a(inputs).tanh())).square().sum()


def test_layers_called_twice_and_never():
    model, inputs = Repeated(), torch.randn(3, 5, 12, dtype=torch.float64)
    layers = {name: getattr(model, name) for name in "abc"}
    positions = draw_positions(layers, 0.1)
    dense = dense_gradients(layers, lambda: model(inputs))
    sampled = sampled_gradients(layers, positions, lambda: model(inputs))
    assert_equal(sampled, dense, positions)
    assert not sampled["c"].any()
    dense = dense_gradients(layers, lambda: model(inputs[0, 0]))
    assert_equal(sampled_gradients(layers, positions, lambda: model(inputs[0, 0])), dense, positions)


def test_threads_do_not_share_gradients():
    model = Repeated()
    layers = {name: getattr(model, name) for name in "abc"}
    positions = draw_positions(layers, 0.1)
    batches = torch.randn(8, 5, 12, dtype=torch.float64)
    expected = [dense_gradients(layers, lambda inputs=inputs: model(inputs)) for inputs in batches]
    with support_gradients(layers, positions) as leaves, ThreadPoolExecutor(4) as pool:
        results = pool.map(
            lambda inputs: torch.autograd.grad(model(inputs), list(leaves.values()), materialize_grads=True), batches
        )
    for gradients, dense in zip(results, expected, strict=True):
        assert_equal(dict(zip(layers, gradients, strict=True)), dense, positions)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """The gradients that every backward pass of a layer with support needs."""
    calls: list[tuple[bool, ...]] = []
    backward = support_gradient._SupportLinear.backward

    def record(ctx: Any, gradient: Tensor) -> Any:
        calls.append(tuple(ctx.needs_input_grad[:2]))
        return backward(ctx, gradient)

    monkeypatch.setattr(support_gradient._SupportLinear, "backward", staticmethod(record))
    return calls


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_below_the_first_support_is_differentiated_or_computed_again(monkeypatch, recompute):
    model = tiny.llama(num_hidden_layers=4).double().requires_grad_(False)
    layers = find_linear(model)
    positions = draw_positions(layers, 0.05)
    for name in layers:
        if int(name.split(".")[2]) < 2 or ("q_proj" not in name and "layers.2." in name):
            positions[name] = positions[name][:0]

    def loss() -> Tensor:
        return model(input_ids=tiny.tokens(), use_cache=False).logits.square().mean()

    dense = dense_gradients(layers, loss)
    calls = count_calls(monkeypatch)
    runs = []
    for number, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    if recompute:
        with gradient_checkpointing(model):
            sampled = sampled_gradients(layers, positions, loss)
    else:
        sampled = sampled_gradients(layers, positions, loss)
    assert_equal(sampled, dense, positions)
    # The query of block 2 is the first layer with support: its input needs no gradient, all others' do.
    assert sorted(calls) == [(False, True)] + [(True, True)] * 7
    assert sorted(runs) == ([0, 1, 2, 2, 3, 3] if recompute else [0, 1, 2, 3])


@pytest.mark.parametrize(("density", "is_sampled"), [(0.05, True), (0.5, False)])
def test_a_dense_support_takes_the_whole_product(monkeypatch, density, is_sampled):
    layer = nn.Linear(40, 30, bias=False)
    products = []
    sampled = torch.sparse.sampled_addmm
    monkeypatch.setattr(torch.sparse, "sampled_addmm", lambda *operands: products.append(1) or sampled(*operands))
    support_gradient.has_sampled_product()
    products.clear()
    positions = draw_positions({"a": layer}, density)
    sampled_gradients({"a": layer}, positions, lambda: layer(torch.ones(2, 40)).sum())
    assert bool(products) == is_sampled


def test_without_a_sampled_product_the_whole_one_is_computed(monkeypatch):
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("Calling sampled_addmm on a CPU without MKL")

    support_gradient.has_sampled_product.cache_clear()
    monkeypatch.setattr(torch.sparse, "sampled_addmm", refuse)
    try:
        test_layers_called_twice_and_never()
    finally:
        support_gradient.has_sampled_product.cache_clear()


def test_bfloat16_products_are_those_of_autocast(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    torch.manual_seed(0)
    first, second = nn.Linear(32, 48), nn.Linear(48, 16)
    layers = {"first": first, "second": second}
    positions = draw_positions(layers, 0.02)
    inputs = torch.randn(10, 32)

    def loss() -> Tensor:
        with fast_matmul():
            return second(first(inputs).relu()).float().square().sum()

    dense, values = dense_gradients(layers, loss), loss()
    with support_gradients(layers, positions):
        assert torch.equal(loss(), values)
    for name, gradient in sampled_gradients(layers, positions, loss).items():
        assert gradient.dtype == torch.float32
        expected = dense[name].flatten()[positions[name]]
        torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=2**-7 * float(dense[name].abs().max()))


def test_positions_must_be_ascending():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="ascending"), support_gradients({"a": layer}, {"a": torch.tensor([3, 1])}):
        pass
    assert "forward" not in vars(layer)
    assert layer.weight.requires_grad


@pytest.mark.parametrize("large", [False, True])
def test_the_objective_on_a_support(monkeypatch, large):
    """In small and in large models, in few and in many parts."""
    monkeypatch.setattr("lm_ortho.objective.loss.LARGE", 0 if large else 2**40)
    objective = make_objective()
    positions = draw_positions(objective.layers, 0.05)
    positions["model.layers.0.self_attn.q_proj"] = torch.empty(0, dtype=torch.long)
    gradients, losses = step(objective)
    expected = {name: gradient.flatten()[positions[name]] for name, gradient in gradients.items()}
    with objective.restrict_to_support(positions):
        assert_same(step(objective), (expected, losses))
        monkeypatch.setattr("lm_ortho.objective.loss.part_budget", lambda *_: Budget(40, 20))
        assert_same(step(objective), (expected, losses))
    assert_same(step(objective), (gradients, losses))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_benchmark_of_a_step(recompute):
    benchmark = load_script(REPOSITORY / "benchmarks/step.py")
    for kind in benchmark.KINDS:
        result = benchmark.measure("tiny", kind, density=0.05, steps=1, recompute=recompute, threads=1)
        assert set(result) == {"cpu_seconds", "seconds", "before_gb", "peak_gb"}
        assert result["peak_gb"] >= result["before_gb"] > 0
        assert result["cpu_seconds"] > 0
