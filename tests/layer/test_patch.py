"""OrthoLinear, alone and in place of the linear layers of a model: correct numbers and no loss of information."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPTNeoXConfig, OPTConfig, Qwen2Config

from lm_ortho import checkpoint
from lm_ortho.errors import UserError
from lm_ortho.kernels import calls, reset_calls
from lm_ortho.layer import (
    OrthoLinear,
    alpha_scope,
    get_alpha,
    get_dense_weights,
    get_streams,
    ortho_layers,
    patch,
    set_alpha,
    unpatch,
)
from lm_ortho.streams import LayerStreams, OrthoStream
from tests.support import tiny
from tests.support.tiny import logits_at, standalone_layer, unpatched_model

torch.set_num_threads(1)

fewer_examples = settings(max_examples=40)


# --- the layer


@fewer_examples
@given(
    st.integers(1, 50),
    st.integers(1, 70),
    st.sampled_from([3, 4, 8, 16]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.booleans(),
    st.sampled_from([0.0, 0.25, 1.0, "rows"]),
    st.sampled_from([(1,), (4,), (3, 5), (2, 60)]),
    st.integers(0, 1000),
)
def test_layer_against_float64(out_features, in_features, bits, density, bias, alpha, leading, seed):
    layer, streams = standalone_layer(out_features, in_features, bits, density=density, bias=bias, seed=seed)
    x = torch.randn(*leading, in_features)
    alphas = torch.linspace(0, 1, leading[0]) if alpha == "rows" else torch.tensor(alpha)
    with alpha_scope(alphas):
        y = layer(x)
    per_row = alphas.double().reshape(-1, *[1] * len(leading))
    wide = x.double()
    expected_y = wide @ streams.to_dense(0.0, torch.float64).t()
    expected_y = expected_y + per_row * (wide @ streams.ortho.to_dense(torch.float64).t())
    expected_y = expected_y + (streams.bias.double() if bias else 0)
    scale = 1 + wide.abs().sum(-1, keepdim=True) * (1 + streams.to_dense(1.0).abs().max() * 2)
    assert bool(((y.double() - expected_y).abs() <= 1e-6 * scale).all())


def test_layer_is_lossless():
    layer, streams = standalone_layer()
    again = layer.streams()
    assert again.tensors().keys() == streams.tensors().keys()
    for name, tensor in streams.tensors().items():
        assert torch.equal(again.tensors()[name], tensor), name
    assert set(layer.state_dict()) == {
        "qweight",
        "scales",
        "ortho_rowptr",
        "ortho_cols",
        "ortho_vals",
        "bias",
    }
    assert "ortho=" in repr(layer)


def test_ortho_of_another_shape_is_refused():
    layer, _ = standalone_layer()
    with pytest.raises(ValueError, match="ortho stream of shape"):
        layer.set_ortho(OrthoStream.empty((3, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 16])
def test_casting_never_touches_the_streams(dtype, bits):
    layer, streams = standalone_layer(bits=bits)
    x = torch.randn(3, 40)
    before = layer(x)
    layer.to(dtype)
    for name, tensor in streams.tensors().items():
        if name == "bias":
            assert layer.bias.dtype == dtype
        else:
            assert torch.equal(getattr(layer, name), tensor), name
            assert getattr(layer, name).dtype == tensor.dtype
    assert layer(x.to(dtype)).dtype == dtype
    layer.float()  # only the bias has lost precision
    torch.testing.assert_close(layer(x), before, rtol=0, atol=2e-2 if dtype != torch.float64 else 1e-6)
    layer.to("meta")
    assert layer.ortho_vals.device.type == "meta"


def test_operands_follow_the_stored_tensors():
    layer, _ = standalone_layer()
    other, other_streams = standalone_layer(seed=1, density=0.3)
    x = torch.randn(5, 40)
    with alpha_scope(1.0):
        layer(x), other(x)
        layer.load_state_dict(other.state_dict())  # another number of non-zeros
        assert torch.equal(layer(x), other(x))
        layer.scales.mul_(2)
        assert not torch.equal(layer(x), other(x))
    layer, _ = standalone_layer()
    with alpha_scope(1.0):
        layer(x)
        layer.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(layer(x), other(x))
    with alpha_scope(1.0):
        layer.set_ortho(OrthoStream.empty(other_streams.shape))
        assert torch.equal(layer(x), nn.functional.linear(x, other_streams.to_dense(0.0), layer.bias))


def test_inference_mode_first_and_gradients_later():
    layer, streams = standalone_layer()
    x = torch.randn(2, 40)
    with torch.inference_mode(), alpha_scope(0.5):
        layer(x)
    expected_gradient = streams.to_dense(0.5).sum(0).expand(2, -1)
    x.requires_grad_(True)
    with alpha_scope(0.5):
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad, expected_gradient, rtol=1e-5, atol=1e-5)


def test_autocast():
    layer, _ = standalone_layer()
    x = torch.randn(2, 40)
    with alpha_scope(0.5):
        plain = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast_output = layer(x)
    torch.testing.assert_close(autocast_output.float(), plain, rtol=0.05, atol=0.3)


# --- patching


def test_patch_replaces_layers_and_unpatch_restores_them(model):
    streams = get_streams(model)
    assert len(streams) == 14
    assert isinstance(model.lm_head, nn.Linear)
    half = logits_at(model, 0.5)
    names = unpatch(model, alpha=0.5)
    assert names == list(streams)
    assert not ortho_layers(model)
    assert {"forward", "generate"}.isdisjoint(model.__dict__)
    torch.testing.assert_close(tiny.logits(model), half, rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters())
    name = names[0]
    assert torch.equal(model.get_submodule(name).weight, streams[name].to_dense(0.5))


def test_streams_are_in_the_state_dict(model):
    """HISTORY 12: the streams were missing from it."""
    state = model.state_dict()
    for name, streams in get_streams(model).items():
        for part, tensor in streams.tensors().items():
            assert torch.equal(state[f"{name}.{part}"], tensor)
    other = tiny.patched_model(tiny.llama(seed=3), density=0.1)
    other.load_state_dict(state)
    assert torch.equal(logits_at(other, 1.0), logits_at(model, 1.0))


def test_alpha_zero_is_the_base_only_model_and_does_no_sparse_work(model):
    """HISTORY 13: alpha=0 once loaded both streams."""
    base_only = tiny.patched_model(with_ortho=False)
    reset_calls()
    logits = logits_at(model, 0.0)
    assert calls() == {"reference.base": 14}
    assert torch.equal(logits, tiny.logits(base_only))
    assert torch.equal(logits_at(model, [0.0, 0.0, 0.0]), logits)
    assert set(calls()) == {"reference.base"}
    assert not torch.equal(logits_at(model, 1.0), logits)
    assert calls().get("reference.merged", 0) + calls().get("reference.sparse", 0) == 14


def test_base_only_model_refuses_any_other_alpha():
    model = tiny.patched_model(with_ortho=False)
    set_alpha(model, 0)
    with pytest.raises(UserError, match="only its base stream"):
        set_alpha(model, 0.5)
    for alpha in (0.5, [0.0, 0.0, 1.0]):
        with pytest.raises(UserError, match="only its base stream"):
            logits_at(model, alpha)
    with pytest.raises(UserError, match="only its base stream"):
        unpatch(model)
    unpatch(model, alpha=0)


def test_an_empty_stream_is_not_a_missing_one():
    model = tiny.patched_model(density=0.0)
    assert torch.equal(logits_at(model, 1.0), logits_at(model, 0.0))


def test_patch_is_all_or_nothing():
    model = tiny.llama()
    streams = tiny.model_streams(model)
    name, first_streams = next(iter(streams.items()))
    invalid_cases = {
        "no module": {**streams, "model.layers.9.mlp.up_proj": first_streams},
        "not an nn.Linear": {**streams, "model.norm": first_streams},
        "has shape": {**streams, "model.layers.0.mlp.up_proj": first_streams},
        "some have none": {**streams, name: LayerStreams(first_streams.base, None)},
        "output embedding": {"lm_head": tiny.layer_streams(model.lm_head.weight.detach())},
        "empty": {},
    }
    for message, invalid_streams in invalid_cases.items():
        with pytest.raises(UserError, match=message):
            patch(model, invalid_streams)
        assert not ortho_layers(model)
        assert "forward" not in model.__dict__
    patch(model, {name: first_streams})
    with pytest.raises(UserError, match="some have none"):
        patch(model, {list(streams)[1]: LayerStreams(streams[list(streams)[1]].base)})
    patch(model, {other: layer for other, layer in streams.items() if other != name})  # in two steps
    assert len({layer.dial for layer in ortho_layers(model).values()}) == 1
    with pytest.raises(UserError, match="not decomposed"):
        set_alpha(tiny.llama(), 0)
    with pytest.raises(UserError, match="not decomposed"):
        unpatch(tiny.llama())


def test_the_bias_of_the_model_stays():
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    biases = [layer.bias.clone() for layer in plain]
    patch(plain, {name: tiny.layer_streams(plain[int(name)].weight, group_size=8) for name in "01"})
    assert all(torch.equal(layer.bias, bias.bfloat16().float()) for layer, bias in zip(plain, biases, strict=True))


def test_a_layer_shared_by_two_blocks_is_replaced_in_both():
    shared_layer = nn.Linear(8, 8).requires_grad_(False)
    plain = nn.ModuleDict({"a": nn.Sequential(shared_layer), "b": nn.Sequential(shared_layer)})
    patch(plain, {"a.0": tiny.layer_streams(shared_layer.weight, group_size=8)})
    assert plain["a"][0] is plain["b"][0]
    assert isinstance(plain["b"][0], OrthoLinear)
    unpatch(plain)
    assert plain["a"][0] is plain["b"][0]


def test_tied_embeddings_stay_tied():
    model = tiny.patched_model(tiny.llama(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    unpatch(model, 0)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=128,
        ),
        GPTNeoXConfig(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=128),
        OPTConfig(
            hidden_size=32,
            ffn_dim=40,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=128,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures(config):
    model = tiny.from_config(config)
    plain = copy.deepcopy(model)
    tiny.patched_model(model, bits=16, density=1.0)
    torch.testing.assert_close(logits_at(model, 1.0), tiny.logits(unpatched_model(model, 1.0)), rtol=1e-3, atol=1e-4)
    per_row = logits_at(model, [0.0, 0.5, 1.0])
    for row, alpha in enumerate([0.0, 0.5, 1.0]):
        torch.testing.assert_close(per_row[row], logits_at(model, alpha)[row], rtol=1e-3, atol=1e-4)
    assert not torch.equal(tiny.logits(plain), tiny.logits(model))


# --- copies and moves of whole models


def test_deepcopy_is_independent(model):
    model_copy = copy.deepcopy(model)
    set_alpha(model_copy, 1.0)
    assert (get_alpha(model), get_alpha(model_copy)) == (0.0, 1.0)
    assert torch.equal(tiny.logits(model_copy), logits_at(model, 1.0))
    assert model_copy.__dict__["forward"].model is model_copy
    model_copy.lm_head.weight.data.zero_()
    assert not tiny.logits(model_copy).any()
    assert tiny.logits(model).any()


def test_pickle_and_torch_save(model):
    set_alpha(model, 0.5)
    logits = tiny.logits(model)
    data = pickle.dumps(model)
    assert len(data) < 1.5 * sum(t.nbytes for t in model.state_dict().values()) + 100_000  # no dense copies
    model_copy = pickle.loads(data)
    assert get_alpha(model_copy) == 0.5
    assert torch.equal(tiny.logits(model_copy), logits)
    assert model_copy.__dict__["generate"].model is model_copy
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(tiny.logits(torch.load(buffer, weights_only=False)), logits)


def test_a_dropped_model_is_freed_at_once():
    model = tiny.patched_model()
    tiny.logits(model)
    layer = weakref.ref(next(iter(ortho_layers(model).values())))
    gc.collect()
    gc.disable()
    try:
        del model
        assert layer() is None
    finally:
        gc.enable()


def test_casting_a_model(model):
    logits = logits_at(model, 1.0)
    tensors_before = {
        k: v.clone() for k, v in model.state_dict().items() if "ortho_" in k or "scales" in k or "qweight" in k
    }
    model.to(torch.float64)
    torch.testing.assert_close(logits_at(model, 1.0).float(), logits, rtol=1e-3, atol=1e-4)
    model.to(torch.float16).to(torch.float32)
    state = model.state_dict()
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
        for name, tensor in tensors_before.items()
    )


@pytest.mark.parametrize("cast", ["float", "half", "bfloat16", "double"])
def test_casting_a_loaded_model(saved_checkpoint, cast):
    """transformers refuses float() and half() of a quantised model; here they cast what is outside the streams."""
    model = checkpoint.load(saved_checkpoint[1], dtype=torch.bfloat16)
    before = {name: layer.streams().tensors() for name, layer in ortho_layers(model).items()}
    assert getattr(model, cast)() is model
    dtype = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}[cast]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # The parameters hold BF16 values, so no cast loses anything; the rest is the rounding of the products.
    tolerance = {"float": 1e-5, "double": 1e-5, "half": 0.02, "bfloat16": 0.2}[cast]
    for alpha in (0.0, 1.0):
        exact = logits_at(saved_checkpoint[0], alpha)
        assert logits_at(model, alpha).dtype == dtype
        assert (logits_at(model, alpha) - exact).abs().max() <= tolerance
    for name, layer in ortho_layers(model).items():
        after = layer.streams().tensors()
        assert all(torch.equal(after[key], tensor) for key, tensor in before[name].items())
    # An unpatched model is one of transformers again, and a copy of a model casts itself.
    again = getattr(copy.deepcopy(model), cast)()
    assert torch.equal(logits_at(again, 1.0), logits_at(model, 1.0))
    unpatch(model, 1.0)
    assert getattr(model, cast)() is model
    assert not {"float", "half"} & set(vars(model))


def test_forward_keeps_its_signature(model):
    plain = tiny.llama()
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert inspect.signature(model.generate) == inspect.signature(plain.generate)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_dense_copy_has_the_weights_of_alpha_and_does_not_change_the_model(alpha):
    model = tiny.llama()
    streams = tiny.model_streams(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense_copy = get_dense_weights(model, streams, alpha)
    for name, layer in streams.items():
        assert torch.equal(dense_copy.state_dict()[f"{name}.weight"], layer.to_dense(alpha, torch.float32))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_keeps_one_dense_copy_of_its_weights(model):
    """Evaluations change alpha by ``set_alpha``; each alpha must not leave its weights behind."""

    def count_copies():
        caches = [layer._cache for layer in ortho_layers(model).values()]
        tensors = [operand.value for cache in caches for operand in cache.operands.values()]
        merged = [cache.merged for cache in caches if cache.merged is not None]
        return len([tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]), len(merged)

    for alpha, copies in ((0.0, (14, 0)), (1.0, (0, 14)), (0.5, (0, 14)), (0.0, (14, 0))):
        set_alpha(model, alpha)
        tiny.logits(model)
        assert count_copies() == copies
