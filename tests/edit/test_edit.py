"""Edits: only codes on the support change, codes stay in range, and the default edit lowers the objective."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lm_ortho.calibration.activations import input_moments
from lm_ortho.edit import EDITS, EditInput
from lm_ortho.edit.input_metric import InputMetric
from lm_ortho.errors import UserError
from lm_ortho.layer import find_linear
from lm_ortho.projection.lattice import compute_scales, dequantise, layer_units, round_to_codes
from lm_ortho.runtime.progress import no_progress
from lm_ortho.streams import code_range


def make_lattice(weights, bits=4, group_size=32):
    scales = {name: compute_scales(weight, bits, group_size) for name, weight in weights.items()}
    codes = {name: round_to_codes(weight, scales[name], bits, group_size) for name, weight in weights.items()}
    return codes, scales


def draw_supports(weights, density):
    generator = torch.Generator().manual_seed(7)
    return {name: torch.rand(weight.shape, generator=generator) < density for name, weight in weights.items()}


def compute_metrics(layers, support, moments):
    return {name: InputMetric(support[name], moments[name], layer.weight.detach()) for name, layer in layers.items()}


@pytest.fixture
def inputs(forgetting_setup, memorised_models):
    codes, scales = make_lattice(forgetting_setup.weights)
    support = draw_supports(forgetting_setup.weights, 0.2)
    model, layers = forgetting_setup.model, forgetting_setup.layers
    moments = input_moments(model, layers, memorised_models.examples()[1])
    metrics = compute_metrics(layers, support, moments)
    return EditInput(
        model=model,
        layers=layers,
        weights=forgetting_setup.weights,
        base_weights={name: layer.weight.detach() for name, layer in find_linear(memorised_models.base).items()},
        codes=codes,
        scales=scales,
        support=support,
        other_supports={},
        metrics=lambda: metrics,
        bits=4,
        group_size=32,
        step_units=layer_units(scales),
        steps=3,
        lr=0.032,
        objective=lambda: forgetting_setup.objective,
        seed=0,
        progress=no_progress,
    )


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", list(EDITS))
def test_off_the_support_nothing_moves_and_codes_stay_in_range(inputs, name, bits):
    codes, scales = make_lattice(inputs.weights, bits)
    before = {layer: code.clone() for layer, code in codes.items()}
    edited_codes = EDITS.get(name)(dataclasses.replace(inputs, codes=codes, scales=scales, bits=bits))
    low, high = code_range(bits)
    assert list(edited_codes) == list(codes)
    for layer, code in edited_codes.items():
        assert torch.equal(codes[layer], before[layer])
        assert code.dtype == torch.int8
        assert code.shape == codes[layer].shape
        off_support = ~inputs.support[layer]
        assert torch.equal(code[off_support], codes[layer][off_support])
        assert low <= int(code.min())
        assert int(code.max()) <= high


def test_fixed_edits_follow_their_definition(inputs):
    name = "model.layers.0.mlp.down_proj"
    on_support, codes, scales = inputs.support[name], inputs.codes[name], inputs.scales[name]
    assert torch.equal(EDITS.get("none")(inputs)[name], codes)
    assert not EDITS.get("zero")(inputs)[name][on_support].any()
    base_codes = round_to_codes(inputs.base_weights[name], scales, 4, 32)
    assert torch.equal(EDITS.get("w0")(inputs)[name][on_support], base_codes[on_support])
    mean = EDITS.get("mean")(inputs)[name]
    for row, column in on_support.nonzero()[:50].tolist():
        group = column // 32
        average = float(inputs.weights[name][row, group * 32 : (group + 1) * 32].mean())
        nearest = round(average / float(scales[row, group]))
        assert int(mean[row, column]) == max(-8, min(7, nearest))


def test_the_mean_of_a_short_last_group_is_over_its_own_weights(inputs):
    weight = torch.full((2, 40), 0.7)
    scales = torch.full((2, 2), 0.1)
    codes = {"a": torch.full((2, 40), 2, dtype=torch.int8)}
    support = {"a": torch.ones(2, 40, dtype=torch.bool)}
    short = dataclasses.replace(inputs, weights={"a": weight}, codes=codes, scales={"a": scales}, support=support)
    assert (EDITS.get("mean")(short)["a"] == 7).all()


def test_w0_without_the_base_model_is_refused(inputs):
    with pytest.raises(UserError, match="edit='w0' needs the model before fine-tuning"):
        EDITS.get("w0")(dataclasses.replace(inputs, base_weights=None))


def test_an_unknown_edit_lists_the_known_ones():
    with pytest.raises(UserError, match=r"known: mean, none, optimised, w0, zero\. Did you mean 'optimised'\?"):
        EDITS.get("optimized")


def test_the_optimised_edit_lowers_the_objective(inputs, forgetting_setup):
    """HISTORY 6: rounding alone forgets nothing."""
    reports = []
    inputs = dataclasses.replace(
        inputs, steps=25, progress=lambda stage, step, steps, text: reports.append((stage, step, steps))
    )
    total = {}
    for name in ("none", "optimised"):
        codes = EDITS.get(name)(inputs)
        with torch.no_grad():
            for layer, module in forgetting_setup.layers.items():
                module.weight.copy_(dequantise(codes[layer], inputs.scales[layer], 32))
        forget_loss, retain_loss = forgetting_setup.losses()
        total[name] = forget_loss + 2 * retain_loss
    assert total["optimised"] < 0.7 * total["none"]
    assert reports == [("edit", step, 25) for step in range(1, 26)]


def test_the_optimised_edit_repeats_itself(inputs):
    first, second = (EDITS.get("optimised")(inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], inputs.codes[name]) for name in first)


def test_other_memories_stay_on_while_one_is_edited(inputs):
    other_supports = {name: ~mask & torch.rand(mask.shape).lt(0.3) for name, mask in inputs.support.items()}
    codes = EDITS.get("optimised")(dataclasses.replace(inputs, other_supports=other_supports))
    for name, layer in inputs.layers.items():
        other = other_supports[name]
        assert torch.equal(layer.weight[other], inputs.weights[name][other])
        assert torch.equal(codes[name][other], inputs.codes[name][other])


def test_a_damaged_base_stream_is_a_warning(inputs, caplog, monkeypatch):
    EDITS.get("optimised")(inputs)
    assert "the base stream is damaged" not in caplog.text
    monkeypatch.setattr("lm_ortho.calibration.output_change.MAX_RATE", 50.0)
    full_support = {name: torch.ones_like(mask) for name, mask in inputs.support.items()}
    metrics = compute_metrics(
        inputs.layers, full_support, {name: torch.eye(mask.shape[1]) for name, mask in full_support.items()}
    )
    EDITS.get("optimised")(dataclasses.replace(inputs, support=full_support, lr=500.0, metrics=lambda: metrics))
    assert "edit: the retain loss ended at " in caplog.text
    assert " nats per token" in caplog.text
    assert "the base stream is damaged" in caplog.text


SHRINKAGE = 64
"""Factor between the weights; a power of two, so the codes of the smaller weights are the same."""


def shrink_weights(forgetting_setup):
    """Shrinks the weights of layers that inputs a norm and scales the norm up, so that the function stays the same."""
    with torch.no_grad():
        for block in forgetting_setup.model.model.layers:
            for norm, names in ((block.input_layernorm, "qkv"), (block.post_attention_layernorm, ("gate", "up"))):
                norm.weight.mul_(SHRINKAGE)
                for name in names:
                    module = getattr(block.self_attn if name in "qkv" else block.mlp, f"{name}_proj")
                    module.weight.div_(SHRINKAGE)
    forgetting_setup.weights.update(
        {name: layer.weight.detach().clone() for name, layer in forgetting_setup.layers.items()}
    )


def test_layers_of_small_weights_do_not_use_up_the_rate(inputs, forgetting_setup, memorised_models):
    """With the same rate for all layers, those of small weights would change the outputs as far as the rate allows."""

    def mean_distance(inputs, step_units):
        """Mean distance on the support of the layers with unchanged weights, in steps of their lattice."""
        codes = EDITS.get("optimised")(dataclasses.replace(inputs, step_units=step_units))
        with torch.no_grad():
            for name, layer in inputs.layers.items():
                layer.weight.copy_(inputs.weights[name])
        large = [name for name in codes if name.endswith(("o_proj", "down_proj"))]
        distances = [(codes[name] - inputs.codes[name])[inputs.support[name]].abs().float() for name in large]
        return float(torch.cat(distances).mean())

    before = mean_distance(inputs, inputs.step_units)
    shrink_weights(forgetting_setup)
    codes, scales = make_lattice(forgetting_setup.weights)
    assert all(torch.equal(codes[name], inputs.codes[name]) for name in codes)
    moments = input_moments(inputs.model, inputs.layers, memorised_models.examples()[1])
    metrics = compute_metrics(inputs.layers, inputs.support, moments)
    uneven = dataclasses.replace(
        inputs, weights=forgetting_setup.weights, codes=codes, scales=scales, metrics=lambda: metrics
    )
    mean_step = float(torch.cat([layer_scales.flatten() for layer_scales in scales.values()]).mean())
    with_units = mean_distance(uneven, layer_units(scales))
    without_units = mean_distance(uneven, dict.fromkeys(scales, mean_step))
    assert with_units > before / 8  # the unit is up to twice the mean step, and so the others have half the change
    assert without_units < with_units / 8
