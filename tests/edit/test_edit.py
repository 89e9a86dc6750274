"""Edits: only the support moves, codes stay in range, and the default one lowers what it is to lower."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lm_ortho.edit import EDITS, EditInput
from lm_ortho.errors import UserError
from lm_ortho.layer import find_linear
from lm_ortho.projection.lattice import code_range, compute_scales, dequantise, layer_units, round_to_codes


def lattice(weights, bits=4, group_size=32):
    scales = {name: compute_scales(weight, bits, group_size) for name, weight in weights.items()}
    codes = {name: round_to_codes(weight, scales[name], bits, group_size) for name, weight in weights.items()}
    return codes, scales


def supports(weights, density):
    generator = torch.Generator().manual_seed(7)
    return {name: torch.rand(weight.shape, generator=generator) < density for name, weight in weights.items()}


@pytest.fixture
def read(bench, memorised):
    codes, scales = lattice(bench.weights)
    base = {name: layer.weight.detach() for name, layer in find_linear(memorised.base).items()}
    return EditInput(
        bench.model, bench.layers, bench.weights, base, codes, scales, supports(bench.weights, 0.2), {}, 4, 32,
        layer_units(scales), 3, lambda: bench.objective, 0, lambda *_: None,
    )  # fmt: skip


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", list(EDITS))
def test_off_the_support_nothing_moves_and_codes_stay_in_range(read, name, bits):
    codes, scales = lattice(read.weights, bits)
    given = dataclasses.replace(read, codes=codes, scales=scales, bits=bits)
    before = {layer: code.clone() for layer, code in codes.items()}
    edited = EDITS.get(name)(given)
    low, high = code_range(bits)
    assert list(edited) == list(codes)
    for layer, code in edited.items():
        assert torch.equal(codes[layer], before[layer])
        assert code.dtype == torch.int8
        assert code.shape == codes[layer].shape
        off = ~given.support[layer]
        assert torch.equal(code[off], codes[layer][off])
        assert low <= int(code.min())
        assert int(code.max()) <= high


def test_fixed_edits_are_what_they_are_called(read):
    name = "model.layers.0.mlp.down_proj"
    on, codes, scales = read.support[name], read.codes[name], read.scales[name]
    assert torch.equal(EDITS.get("none")(read)[name], codes)
    assert not EDITS.get("zero")(read)[name][on].any()
    before = round_to_codes(read.base_weights[name], scales, 4, 32)
    assert torch.equal(EDITS.get("w0")(read)[name][on], before[on])
    mean = EDITS.get("mean")(read)[name]
    for row, column in on.nonzero()[:50].tolist():
        group = column // 32
        average = float(read.weights[name][row, group * 32 : (group + 1) * 32].mean())
        nearest = round(average / float(scales[row, group]))
        assert int(mean[row, column]) == max(-8, min(7, nearest))


def test_the_mean_of_a_short_last_group_is_over_its_own_weights(read):
    weight = torch.full((2, 40), 0.7)
    scales = torch.full((2, 2), 0.1)
    codes = {"a": torch.full((2, 40), 2, dtype=torch.int8)}
    support = {"a": torch.ones(2, 40, dtype=torch.bool)}
    given = dataclasses.replace(read, weights={"a": weight}, codes=codes, scales={"a": scales}, support=support)
    assert (EDITS.get("mean")(given)["a"] == 7).all()


def test_w0_without_the_base_model_is_refused(read):
    with pytest.raises(UserError, match="edit='w0' needs the model before fine-tuning"):
        EDITS.get("w0")(dataclasses.replace(read, base_weights=None))


def test_an_unknown_edit_lists_the_known_ones():
    with pytest.raises(UserError, match=r"known: mean, none, optimised, w0, zero\. Did you mean 'optimised'\?"):
        EDITS.get("optimized")


def test_the_optimised_edit_lowers_the_objective(read, bench):
    """HISTORY 6: rounding alone forgets nothing."""
    told = []
    given = dataclasses.replace(
        read, steps=25, progress=lambda stage, step, steps, text: told.append((stage, step, steps))
    )
    total = {}
    for name in ("none", "optimised"):
        edited = EDITS.get(name)(given)
        with torch.no_grad():
            for layer, module in bench.layers.items():
                module.weight.copy_(dequantise(edited[layer], read.scales[layer], 32))
        lost, kept = bench.losses()
        total[name] = lost + 2 * kept
    assert total["optimised"] < 0.7 * total["none"]
    assert told == [("edit", step, 25) for step in range(1, 26)]


def test_the_optimised_edit_repeats_itself(read):
    first, second = (EDITS.get("optimised")(read) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], read.codes[name]) for name in first)


def test_other_memories_stay_on_while_one_is_edited(read):
    taken = {name: ~mask & torch.rand(mask.shape).lt(0.3) for name, mask in read.support.items()}
    edited = EDITS.get("optimised")(dataclasses.replace(read, taken=taken))
    for name, layer in read.layers.items():
        other = taken[name]
        assert torch.equal(layer.weight[other], read.weights[name][other])
        assert torch.equal(edited[name][other], read.codes[name][other])


def test_a_base_stream_that_was_damaged_is_told(read, caplog, monkeypatch):
    EDITS.get("optimised")(read)
    assert "the base stream is damaged" not in caplog.text
    monkeypatch.setattr("lm_ortho.edit.optimised.LEARNING_RATE", 50.0)
    EDITS.get("optimised")(dataclasses.replace(read, support={n: torch.ones_like(m) for n, m in read.support.items()}))
    assert "edit: what should stay is " in caplog.text
    assert "the base stream is damaged" in caplog.text


SMALLER = 64
"""A power of two: the codes of a layer with as much smaller weights are the same."""


def uneven(bench):
    """The same function: what reads a norm has smaller weights and the norm makes up for it."""
    with torch.no_grad():
        for block in bench.model.model.layers:
            for norm, names in ((block.input_layernorm, "qkv"), (block.post_attention_layernorm, ("gate", "up"))):
                norm.weight.mul_(SMALLER)
                for name in names:
                    module = getattr(block.self_attn if name in "qkv" else block.mlp, f"{name}_proj")
                    module.weight.div_(SMALLER)
    bench.weights.update({name: layer.weight.detach().clone() for name, layer in bench.layers.items()})


def test_layers_of_small_weights_are_not_thrown_about(read, bench):
    """A rate that is the same for all layers is many steps at once where the lattice is fine."""

    def moved(given, unit):
        """Mean distance on the support of the layers that become small, in steps of their lattice."""
        edited = EDITS.get("optimised")(dataclasses.replace(given, unit=unit))
        with torch.no_grad():
            for name, layer in given.layers.items():
                layer.weight.copy_(given.weights[name])
        small = [name for name in edited if not name.endswith(("o_proj", "down_proj"))]
        far = [(edited[name] - given.codes[name])[given.support[name]].abs().float() for name in small]
        return float(torch.cat(far).mean())

    before = moved(read, read.unit)
    uneven(bench)
    codes, scales = lattice(bench.weights)
    assert all(torch.equal(codes[name], read.codes[name]) for name in codes)
    given = dataclasses.replace(read, weights=bench.weights, codes=codes, scales=scales)
    mean = float(torch.cat([each.flatten() for each in scales.values()]).mean())
    one, own = moved(given, dict.fromkeys(scales, mean)), moved(given, layer_units(scales))
    assert own < 3 * before
    assert one > 10 * before
