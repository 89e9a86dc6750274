"""RepSelect: forget gradients whose principal directions are damped."""

from __future__ import annotations

import copy

import torch

from lm_ortho.baselines import Run
from lm_ortho.baselines.losses import nll_loss
from lm_ortho.baselines.repselect import compute_forget_gradients, damp_principal_directions
from lm_ortho.baselines.training import compute_answer_logps

torch.set_num_threads(1)


def test_principal_directions_are_divided_by_their_singular_value_on_both_sides():
    """Against the singular value decomposition in float64, for tall, wide and deficient matrices."""
    generator = torch.Generator().manual_seed(3)
    for shape in ((12, 7), (7, 12)):
        gradient = torch.randn(shape, generator=generator)
        for count in (0, 1, 3, 7, 40):
            outputs, values, inputs = torch.linalg.svd(gradient.double(), full_matrices=False)
            last = values[min(count, 7) - 1]
            damped = torch.where(torch.arange(7) < count, last.square() / values, values)
            expected = (outputs * damped) @ inputs
            torch.testing.assert_close(
                damp_principal_directions(gradient, count).double(), expected, rtol=1e-5, atol=1e-6
            )
    # a gradient of rank 2 has no third direction to divide by
    thin = torch.randn(9, 2, generator=generator) @ torch.randn(2, 8, generator=generator)
    values = torch.linalg.svdvals(thin.double())
    result = torch.linalg.svdvals(damp_principal_directions(thin, 5).double())
    torch.testing.assert_close(result[:2], torch.stack([values[1], values[1] ** 2 / values[0]]), rtol=1e-5, atol=0)
    assert not damp_principal_directions(torch.zeros(3, 4), 2).any()


def test_the_forget_gradient_is_that_of_the_loss_and_the_adapter_leaves_no_trace(sets, memorised_models):
    name = "model.layers.1.mlp.up_proj"
    model = copy.deepcopy(memorised_models.merged)
    run = Run()
    gradient = compute_forget_gradients(model, [name], sets, adapter_lr=0.0, run=run)[name]
    reference = copy.deepcopy(memorised_models.merged).double().requires_grad_(True)
    logps, counts = compute_answer_logps(reference, sets.forget, range(10))
    (expected,) = torch.autograd.grad(-nll_loss(logps, counts), reference.get_submodule(name).weight)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    tokens = sum(len(example.ids) for example in sets.forget)
    assert run.tokens.total == tokens
    with_adapter = compute_forget_gradients(model, [name], sets, adapter_lr=0.5, run=run)[name]
    assert run.tokens.total == 3 * tokens
    assert not torch.allclose(with_adapter, gradient)
    assert model.state_dict().keys() == memorised_models.merged.state_dict().keys()
    assert all(torch.equal(t, memorised_models.merged.state_dict()[at]) for at, t in model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
