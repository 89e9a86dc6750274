"""Layers and models with several memories, each with an alpha of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_ortho.errors import UserError
from lm_ortho.kernels import several_linear, sparse_operand
from lm_ortho.layer import OrthoLinear, alpha_scope, get_alpha, get_streams, patch, set_alpha, unpatch
from lm_ortho.streams import DEFAULT_MEMORY, LayerStreams, OrthoStream
from tests.support import tiny
from tests.support.checkpoint import assert_same_model
from tests.support.memories import split_stream, two_memories

torch.set_num_threads(1)
fewer_examples = settings(max_examples=40)


# --- one layer


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("alpha", [{"a": 1, "b": 0}, {"a": 0.25, "b": 0.75}, {"b": 1}, 0.5, 0.0, 1.0])
def test_a_layer_computes_with_the_weights_of_its_alphas(rows, alpha):
    _, streams = tiny.standalone_layer()
    streams = split_stream(streams)
    layer = OrthoLinear.from_streams(streams)
    assert layer.memories == ("a", "b")
    x = torch.randn(rows, layer.in_features, generator=torch.Generator().manual_seed(1))
    with alpha_scope(alpha):
        y = layer(x)
    expected = torch.nn.functional.linear(x.double(), streams.to_dense(alpha, torch.float64), streams.bias.double())
    assert torch.allclose(y.double(), expected, atol=1e-5)
    if alpha == 0.0:
        assert torch.equal(y, OrthoLinear.from_streams(LayerStreams(streams.base, None, streams.bias))(x))


def test_one_alpha_for_all_memories_gives_the_undivided_stream():
    _, whole = tiny.standalone_layer()
    for alpha in (0.0, 0.3, 1.0):
        assert torch.equal(split_stream(whole).to_dense(alpha), whole.to_dense(alpha))
    assert split_stream(whole).nnz == whole.nnz


@fewer_examples
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5))
def test_a_row_of_a_batch_gets_the_output_it_gets_alone(rows):
    _, streams = tiny.standalone_layer()
    layer = OrthoLinear.from_streams(split_stream(streams))
    x = torch.randn(len(rows), 2, layer.in_features, generator=torch.Generator().manual_seed(2))
    a, b = ([row[i] for row in rows] for i in (0, 1))
    with alpha_scope({"a": a, "b": b}):
        batch_output = layer(x)
    for i in range(len(rows)):
        with alpha_scope({"a": a[i], "b": b[i]}):
            # products of more rows add up in another order
            assert torch.allclose(layer(x[i : i + 1]), batch_output[i : i + 1], atol=2e-5)


def test_a_row_at_alpha_zero_equals_the_base_stream_bit_for_bit():
    _, streams = tiny.standalone_layer()
    layer = OrthoLinear.from_streams(split_stream(streams))
    x = torch.randn(2, 3, layer.in_features)
    base = layer(x)
    with alpha_scope({"a": [0.0, 1.0], "b": [0.0, 0.5]}):
        y = layer(x)
    assert torch.equal(y[0], base[0])
    assert not torch.equal(y[1], base[1])


def test_several_linear_merges_for_many_rows_and_adds_for_few():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 24, generator=generator)
    parts = [torch.randn(16, 24, generator=generator) * (torch.arange(24) % 3 == i) for i in range(2)]
    streams = [OrthoStream.from_dense(part, part != 0) for part in parts]
    operands = [sparse_operand(s.rowptr, s.cols, s.vals, 24) for s in streams]
    dense = weight + 0.5 * streams[0].to_dense() + 1.0 * streams[1].to_dense()
    for rows in (1, 2, 400):
        x = torch.randn(rows, 24, generator=generator)
        y = several_linear(x, weight, [(operands[0], 0.5), (operands[1], 1.0)])
        assert torch.allclose(y, x @ dense.T, atol=1e-4)
    assert torch.equal(several_linear(x, weight, []), x @ weight.T)


def test_streams_that_do_not_fit_together():
    _, whole = tiny.standalone_layer()
    memories = split_stream(whole).named_memories
    with pytest.raises(ValueError, match="two memories hold the same position"):
        LayerStreams(whole.base, whole.ortho, None, memories)
    for name in ("hub", DEFAULT_MEMORY, "Upper", "with space", ""):
        with pytest.raises(ValueError, match="memory name"):
            LayerStreams(whole.base, None, None, {name: memories["a"]})
    with pytest.raises(ValueError, match="differ in shape"):
        LayerStreams(whole.base, None, None, {"a": OrthoStream.empty((3, 3))})
    with pytest.raises(ValueError, match="without an ortho stream of c"):
        split_stream(whole).to_dense({"c": 1.0})


# --- a model


def test_alphas_of_a_model():
    model, _ = two_memories()
    off, on = tiny.logits_at(model, 0.0), tiny.logits_at(model, 1.0)
    set_alpha(model, {"a": 1})
    assert get_alpha(model) == {"a": 1.0}
    only_a = tiny.logits(model)
    assert torch.equal(only_a, tiny.logits_at(model, {"a": 1, "b": 0}))
    assert not torch.equal(only_a, off)
    assert not torch.equal(only_a, on)
    assert torch.equal(tiny.logits_at(model, {"a": 0, "b": 0}), off)
    with alpha_scope({"a": [1.0, 0.0, 1.0], "b": 0.0}):
        batch_logits = tiny.logits(model)
    assert torch.allclose(batch_logits[0], only_a[0], atol=1e-4)
    assert torch.equal(batch_logits[1], off[1])


def test_unknown_memories_are_refused():
    model, _ = two_memories()
    with pytest.raises(UserError, match="no memory 'c'; it has 'a', 'b'"):
        set_alpha(model, {"c": 1})
    with pytest.raises(UserError, match="no memory 'c'"):
        tiny.logits_at(model, {"c": 0.5})
    with pytest.raises(UserError, match="different numbers of rows"), alpha_scope({"a": [0, 1], "b": [0, 1, 1]}):
        pass
    with pytest.raises(UserError, match="names no memory"), alpha_scope({}):
        pass
    with pytest.raises(UserError, match="not another mapping"):
        set_alpha(model, {"a": {"x": 1}})
    with pytest.raises(UserError, match="weights have one alpha"):
        unpatch(model, {"a": torch.tensor([0.0, 1.0])})
    other = tiny.patched_model()
    with pytest.raises(UserError, match="no memory 'a'; it has 'memory'"):
        set_alpha(other, {"a": 1})
    set_alpha(other, {"memory": 1})
    assert torch.equal(tiny.logits(other), tiny.logits_at(other, 1.0))


def test_unpatch_at_one_alpha_for_each_memory():
    model, _ = two_memories()
    expected = tiny.logits_at(model, {"b": 1})
    plain = copy.deepcopy(model)
    unpatch(plain, {"b": 1})
    assert torch.allclose(tiny.logits(plain), expected, atol=1e-4)


def test_copies_pickles_and_state_dicts_keep_every_memory(tmp_path):
    model, _ = two_memories()
    assert_same_model(copy.deepcopy(model), model)
    torch.save(model, tmp_path / "whole.pt")
    assert_same_model(torch.load(tmp_path / "whole.pt", weights_only=False), model)
    other = tiny.llama()
    patch(other, {n: LayerStreams(s.base, None, s.bias) for n, s in get_streams(model).items()})
    other.load_state_dict(model.state_dict())
    assert_same_model(other, model, ({"a": 1}, {"b": 0.5}, 1.0))
