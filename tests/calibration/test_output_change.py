"""How far the outputs move with the weights, against random movements in float64, and the rates that follow."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from lm_ortho.calibration import output_change
from lm_ortho.calibration.output_change import measure_output_changes, peak_rates
from lm_ortho.data.encoding import ANSWER, Example
from lm_ortho.layer import find_linear
from lm_ortho.runtime.progress import no_progress
from tests.support import tiny
from tests.support.architectures import CASES


def draw_examples(count):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    return [Example(tuple(torch.randint(2, 100, (n,), generator=generator).tolist()), (ANSWER,) * n) for n in lengths]


def test_the_change_is_that_of_movements_of_random_signs():
    model = tiny.llama()
    layers, examples = find_linear(model), draw_examples(6)
    progress = []
    changes = measure_output_changes(model, layers, examples, lambda *report: progress.append(report))
    assert progress == [("outputs", number, 6, "") for number in range(1, 7)]
    assert not any(layer._forward_hooks for layer in layers.values())
    name = "model.layers.1.mlp.down_proj"
    layer, inputs = layers[name], []
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].double()))
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([example.ids]))
    handle.remove()
    x, generator = torch.cat(inputs), torch.Generator().manual_seed(0)
    squares = []
    for _ in range(200):
        signs = torch.randint(0, 2, layer.weight.shape, generator=generator).double() * 2 - 1
        squares.append(float((x @ signs.T).square().mean()))
    expected = (sum(squares) / len(squares) / float((x @ layer.weight.detach().double().T).square().mean())) ** 0.5
    assert changes[name] == pytest.approx(expected, rel=0.05)


def test_a_layer_without_outputs_has_no_change():
    model = tiny.llama()
    layers = find_linear(model)
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        layers[name].weight.zero_()
    changes = measure_output_changes(model, layers, draw_examples(2), no_progress)
    assert changes[name] == 0
    assert all(change > 0 for other, change in changes.items() if other not in (name, name.replace("up", "down")))


def test_a_bias_and_experts_without_tokens_count_for_nothing():
    model = CASES["Mixtral"].build()
    layers = find_linear(model)
    changes = measure_output_changes(model, layers, draw_examples(1), no_progress)
    assert all(math.isfinite(change) for change in changes.values())
    layer = torch.nn.Linear(4, 3)
    embedding = torch.nn.Embedding(100, 4)

    class Model(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=layer(embedding(input_ids)))

    model = Model()
    model.layer, examples = layer, draw_examples(3)
    with_bias = measure_output_changes(model, {"layer": layer}, examples, no_progress)
    layer.bias.data.zero_()
    without_bias = measure_output_changes(model, {"layer": layer}, examples, no_progress)
    assert without_bias == pytest.approx(with_bias, rel=1e-4)
    with pytest.raises(ValueError, match="examples: at least one"):
        measure_output_changes(model, {"layer": layer}, [], no_progress)


def test_rates_are_equal_in_step_units_and_change_the_outputs_by_the_learning_rate():
    changes, units = {"a": 3.0, "b": 4.0, "c": 0.0}, {"a": 0.5, "b": 1.0, "c": 2.0}
    rates = peak_rates(0.01, changes, units)
    assert sum((rates[name] * changes[name]) ** 2 for name in rates) ** 0.5 == pytest.approx(0.01)
    assert len({rates[name] / units[name] for name in rates}) == 1
    # Where little would change, a rate is limited to a part of a step.
    assert peak_rates(100.0, changes, units)["b"] == output_change.MAX_RATE
    assert peak_rates(0.01, dict.fromkeys(changes, 0.0), units)["c"] == 2 * output_change.MAX_RATE
