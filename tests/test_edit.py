"""Edits: only the support moves, codes stay in range, and the default one lowers what it is to lower."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lm_ortho.edit import EDITS, EditInput
from lm_ortho.errors import UserError
from lm_ortho.layer import find_linear
from lm_ortho.projection.lattice import code_range, group_scales, nearest_codes, values


def lattice(weights, bits=4, group_size=32):
    scales = {name: group_scales(weight, bits, group_size) for name, weight in weights.items()}
    codes = {name: nearest_codes(weight, scales[name], bits, group_size) for name, weight in weights.items()}
    return codes, scales


def supports(weights, density):
    generator = torch.Generator().manual_seed(7)
    return {name: torch.rand(weight.shape, generator=generator) < density for name, weight in weights.items()}


@pytest.fixture
def read(bench, memorised):
    codes, scales = lattice(bench.weights)
    base = {name: layer.weight.detach() for name, layer in find_linear(memorised.base).items()}
    step = float(torch.cat([s.flatten() for s in scales.values()]).mean())
    return EditInput(
        bench.model, bench.layers, bench.weights, base, codes, scales, supports(bench.weights, 0.2), {}, 4, 32,
        step, 3, lambda: bench.objective, 0, lambda *_: None,
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
    before = nearest_codes(read.base_weights[name], scales, 4, 32)
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
        read, steps=25, notify=lambda stage, step, steps, text: told.append((stage, step, steps))
    )
    total = {}
    for name in ("none", "optimised"):
        edited = EDITS.get(name)(given)
        with torch.no_grad():
            for layer, module in bench.layers.items():
                module.weight.copy_(values(edited[layer], read.scales[layer], 32))
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
