"""The coordinates of an edit: a rotation of each row in which all directions cost the retain rows the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_ortho.edit import input_metric
from lm_ortho.edit.input_metric import DAMPING, InputMetric


def draw_moments(width, generator, rank=None):
    """E[x x^T] of inputs whose directions have very different sizes."""
    sizes = torch.logspace(0, -3, width)
    inputs = torch.randn(rank or 4 * width, width, generator=generator) * sizes
    inputs = inputs @ torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    return inputs.T @ inputs / len(inputs)


def draw_support(out, width, density, generator):
    support = torch.rand(out, width, generator=generator) < density
    support[0], support[1] = False, True  # a row without a position, and a whole row
    return support


@settings(deadline=None, max_examples=30)
@given(
    out=st.integers(2, 12),
    width=st.integers(1, 24),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
    most=st.integers(1, 32),
    batch=st.integers(1, 8),
)
def test_a_rotation_keeps_lengths_and_is_undone(out, width, density, seed, most, batch):
    generator = torch.Generator().manual_seed(seed)
    support = draw_support(out, width, density, generator)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(input_metric, "MAX_POSITIONS", most)
        monkeypatch.setattr(input_metric, "BATCH", batch)
        metric = InputMetric(support, draw_moments(width, generator), torch.ones(out, width))
    values = torch.randn(int(support.sum()), generator=generator)
    coordinates = metric.rotate(values)
    assert torch.allclose(metric.rotate_back(coordinates), values, atol=1e-5)
    assert coordinates.norm() == pytest.approx(float(values.norm()), rel=1e-4)
    assert metric.step_lengths.square().mean() == pytest.approx(1, rel=1e-4)
    assert (metric.step_lengths > 0).all()


def test_a_step_along_any_coordinate_costs_the_same(monkeypatch):
    monkeypatch.setattr(input_metric, "DAMPING", 0.0)
    generator = torch.Generator().manual_seed(0)
    support, moments = draw_support(6, 20, 0.4, generator), draw_moments(20, generator)
    metric = InputMetric(support, moments, torch.ones(6, 20))
    costs = []
    for number in range(int(support.sum())):
        step = torch.zeros(int(support.sum()))
        step[number] = metric.step_lengths[number]
        change = torch.zeros(6, 20, dtype=torch.float64)
        change[support] = metric.rotate_back(step).double()
        costs.append(float((change @ moments.double() * change).sum()))
    assert max(costs) / min(costs) == pytest.approx(1, rel=0.01)


def test_a_step_is_that_of_the_eigenbasis_in_float64():
    generator = torch.Generator().manual_seed(1)
    support, moments = draw_support(5, 16, 0.5, generator), draw_moments(16, generator)
    metric = InputMetric(support, moments, torch.ones(5, 16))
    gradient = torch.randn(int(support.sum()), generator=generator)
    step = metric.rotate_back(metric.rotate(gradient) * metric.step_lengths**2).double()
    # H^-1 g of each row, on its own positions
    expected, start = [], 0
    floor = DAMPING * moments.double().diagonal().mean()
    for row in support:
        columns = row.nonzero()[:, 0]
        part = gradient[start : start + len(columns)].double()
        block = moments.double()[columns][:, columns] + floor * torch.eye(len(columns), dtype=torch.float64)
        expected.append(torch.linalg.solve(block, part))
        start += len(columns)
    reference = torch.cat(expected)
    scale = (step @ reference) / (reference @ reference)
    assert torch.allclose(step, scale * reference, atol=1e-4 * float(step.abs().max()))


def test_the_relative_change_is_that_of_the_outputs_in_float64():
    generator = torch.Generator().manual_seed(2)
    support, weights = draw_support(5, 16, 0.5, generator), torch.randn(5, 16, generator=generator)
    inputs = torch.randn(200, 16, generator=generator) * torch.logspace(0, -2, 16)
    metric = InputMetric(support, inputs.T @ inputs / len(inputs), weights)
    # The mean over steps of either sign along every coordinate, drawn many times.
    squares = []
    for _ in range(400):
        signs = torch.randint(0, 2, (int(support.sum()),), generator=generator) * 2.0 - 1
        change = torch.zeros(5, 16, dtype=torch.float64)
        change[support] = metric.rotate_back(signs * metric.step_lengths).double()
        squares.append(float((inputs.double() @ change.T).square().mean()))
    outputs = float((inputs.double() @ weights.double().T).square().mean())
    assert metric.relative_change == pytest.approx((sum(squares) / len(squares) / outputs) ** 0.5, rel=0.03)


@pytest.mark.parametrize("moments", [torch.zeros(8, 8), torch.eye(8), torch.ones(8, 8)])
def test_inputs_that_never_occur_or_are_all_alike_have_finite_steps(moments):
    support = torch.ones(3, 8, dtype=torch.bool)
    metric = InputMetric(support, moments, torch.ones(3, 8))
    assert metric.relative_change >= 0
    assert metric.step_lengths.isfinite().all()
    values = torch.arange(24.0)
    assert torch.allclose(metric.rotate_back(metric.rotate(values)), values, atol=1e-4)


@given(lengths=st.lists(st.integers(1, 128), max_size=200))
def test_rows_of_a_batch_have_similar_lengths(lengths):
    lengths.sort()
    sizes = input_metric._group_lengths(lengths)
    assert sum(sizes) == len(lengths)
    for size in sizes:
        batch, lengths = lengths[:size], lengths[size:]
        assert size <= input_metric.BATCH
        assert batch[-1] <= 1.25 * batch[0] + 1


def test_a_layer_without_support_has_no_coordinates():
    metric = InputMetric(torch.zeros(3, 8, dtype=torch.bool), torch.eye(8), torch.ones(3, 8))
    assert metric.relative_change == 0
    assert metric.rotate(torch.zeros(0)).shape == (0,)
