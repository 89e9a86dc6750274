"""Adam by hand against the optimiser of PyTorch, and its learning rates against their formula."""

from __future__ import annotations

import pytest
import torch

from lm_ortho.runtime.optim import BETAS, Adam, restore, scheduled_rate


def draw_gradients(steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)} for _ in range(steps)
    ]


@pytest.mark.parametrize("epsilon", [1e-8, 1e-10])
def test_updates_are_those_of_torch(epsilon):
    parameters = {"a": torch.nn.Parameter(torch.ones(3, 4)), "b": torch.nn.Parameter(torch.zeros(5))}
    tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    reference = torch.optim.Adam(parameters.values(), lr=0.05, betas=BETAS, eps=epsilon)
    adam = Adam(tensors, epsilon=epsilon)
    for step, gradients in enumerate(draw_gradients(20), 1):
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.clone()
            tensors[name] += adam.compute_update(name, gradient, step=step, rate=0.05)
        reference.step()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, parameters[name].detach(), rtol=1e-5, atol=1e-6)


def test_moments_in_bfloat16_give_float32_updates_near_those_of_float32():
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    full, half = Adam(tensors, epsilon=1e-8), Adam(tensors, epsilon=1e-8, dtype=torch.bfloat16)
    assert half.first["a"].dtype == half.second["a"].dtype == torch.bfloat16
    for step, gradients in enumerate(draw_gradients(3), 1):
        expected, update = (adam.compute_update("a", gradients["a"], step=step, rate=0.1) for adam in (full, half))
        assert update.dtype == torch.float32
        torch.testing.assert_close(update, expected, rtol=0.1, atol=5e-3)
    assert not half.first["b"].any(), "a tensor without a gradient keeps its moments"


def test_restored_moments_go_on_with_the_same_updates():
    gradients = draw_gradients(6)
    one, other = (Adam({"a": torch.zeros(3, 4)}, epsilon=1e-8) for _ in range(2))
    for step in range(1, 5):
        one.compute_update("a", gradients[step]["a"], step=step, rate=0.1)
    restore(other.first, one.first)
    restore(other.second, one.second)
    updates = [adam.compute_update("a", gradients[5]["a"], step=5, rate=0.1) for adam in (one, other)]
    assert torch.equal(*updates)


def test_rates_rise_over_five_steps_and_fall_to_the_floor():
    rates = [scheduled_rate(2.0, step, 100, floor=0.1) for step in range(1, 101)]
    assert rates[0] == pytest.approx(2.0 * 0.2 * 0.99)
    assert rates[4] == pytest.approx(2.0 * 0.95)
    assert rates[49] == pytest.approx(2.0 * 0.5)
    assert rates[-10:] == [0.2] * 10
