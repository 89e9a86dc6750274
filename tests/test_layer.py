"""OrthoLinear inside models: the right numbers, and alpha that belongs to one request."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import io
import pickle
import threading
import weakref

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_ortho.kernels import calls, reset_calls
from torch import nn
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LogitsProcessor,
    LogitsProcessorList,
    OPTConfig,
    Qwen2Config,
)

from lm_ortho.errors import UserError
from lm_ortho.layer import (
    OrthoLinear,
    alpha_scope,
    find_linear,
    get_alpha,
    ortho_layers,
    patch,
    set_alpha,
    streams_of,
    survey,
    unpatch,
)
from lm_ortho.streams import LayerStreams, OrthoStream

torch.set_num_threads(1)

fast = settings(max_examples=40, deadline=None)


@pytest.fixture
def model():
    return tiny.patched()


def logits_at(model, alpha, **kwargs):
    with alpha_scope(alpha):
        return tiny.logits(model, **kwargs)


def standalone(out_features=24, in_features=40, bits=4, density=0.2, bias=True, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(out_features, in_features)
    streams = tiny.layer_streams(weight, bits, 8, density, torch.randn(out_features) if bias else None, seed=seed)
    return OrthoLinear.from_streams(streams), streams


# --- the layer


@fast
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
    layer, streams = standalone(out_features, in_features, bits, density, bias, seed)
    x = torch.randn(*leading, in_features)
    alphas = torch.linspace(0, 1, leading[0]) if alpha == "rows" else torch.tensor(alpha)
    with alpha_scope(alphas):
        y = layer(x)
    per_row = alphas.double().reshape(-1, *[1] * len(leading))
    wide = x.double()
    expected = wide @ streams.dense(0.0, torch.float64).t()
    expected = expected + per_row * (wide @ streams.ortho.to_dense(torch.float64).t())
    expected = expected + (streams.bias.double() if bias else 0)
    scale = 1 + wide.abs().sum(-1, keepdim=True) * (1 + streams.dense(1.0).abs().max() * 2)
    assert bool(((y.double() - expected).abs() <= 1e-6 * scale).all())


def test_layer_is_lossless():
    layer, streams = standalone()
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
    layer, _ = standalone()
    with pytest.raises(ValueError, match="ortho stream of shape"):
        layer.set_ortho(OrthoStream.empty((3, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 16])
def test_casting_never_touches_the_streams(dtype, bits):
    layer, streams = standalone(bits=bits)
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
    layer.float()  # the way back loses nothing but what the bias lost
    torch.testing.assert_close(layer(x), before, rtol=0, atol=2e-2 if dtype != torch.float64 else 1e-6)
    layer.to("meta")
    assert layer.ortho_vals.device.type == "meta"


def test_operands_follow_the_stored_tensors():
    layer, _ = standalone()
    other, other_streams = standalone(seed=1, density=0.3)
    x = torch.randn(5, 40)
    with alpha_scope(1.0):
        layer(x), other(x)
        layer.load_state_dict(other.state_dict())  # another number of non-zeros
        assert torch.equal(layer(x), other(x))
        layer.scales.mul_(2)
        assert not torch.equal(layer(x), other(x))
    layer, _ = standalone()
    with alpha_scope(1.0):
        layer(x)
        layer.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(layer(x), other(x))
    with alpha_scope(1.0):
        layer.set_ortho(OrthoStream.empty(other_streams.shape))
        assert torch.equal(layer(x), nn.functional.linear(x, other_streams.dense(0.0), layer.bias))


def test_inference_mode_first_and_gradients_later():
    layer, streams = standalone()
    x = torch.randn(2, 40)
    with torch.inference_mode(), alpha_scope(0.5):
        layer(x)
    wanted = streams.dense(0.5).sum(0).expand(2, -1)
    x.requires_grad_(True)
    with alpha_scope(0.5):
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad, wanted, rtol=1e-5, atol=1e-5)


def test_autocast():
    layer, _ = standalone()
    x = torch.randn(2, 40)
    with alpha_scope(0.5):
        plain = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = layer(x)
    torch.testing.assert_close(mixed.float(), plain, rtol=0.05, atol=0.3)


# --- patching


def test_patch_replaces_and_unpatch_gives_back(model):
    streams = streams_of(model)
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
    assert torch.equal(model.get_submodule(name).weight, streams[name].dense(0.5))


def test_streams_are_in_the_state_dict(model):
    """HISTORY 12: the streams were missing from it."""
    state = model.state_dict()
    for name, streams in streams_of(model).items():
        for part, tensor in streams.tensors().items():
            assert torch.equal(state[f"{name}.{part}"], tensor)
    other = tiny.patched(tiny.llama(seed=3), density=0.1)
    other.load_state_dict(state)
    assert torch.equal(logits_at(other, 1.0), logits_at(model, 1.0))


def test_alpha_zero_is_the_base_only_model_and_does_no_sparse_work(model):
    """HISTORY 13: alpha=0 once loaded both streams."""
    base_only = tiny.patched(with_ortho=False)
    reset_calls()
    said = logits_at(model, 0.0)
    assert calls() == {"reference.base": 14}
    assert torch.equal(said, tiny.logits(base_only))
    assert torch.equal(logits_at(model, [0.0, 0.0, 0.0]), said)
    assert set(calls()) == {"reference.base"}
    assert not torch.equal(logits_at(model, 1.0), said)
    assert calls().get("reference.merged", 0) + calls().get("reference.sparse", 0) == 14


def test_base_only_model_refuses_any_other_alpha():
    model = tiny.patched(with_ortho=False)
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
    model = tiny.patched(density=0.0)
    assert torch.equal(logits_at(model, 1.0), logits_at(model, 0.0))


def test_patch_is_all_or_nothing():
    model = tiny.llama()
    streams = tiny.model_streams(model)
    name, good = next(iter(streams.items()))
    bad = {
        "no module": {**streams, "model.layers.9.mlp.up_proj": good},
        "not an nn.Linear": {**streams, "model.norm": good},
        "has shape": {**streams, "model.layers.0.mlp.up_proj": good},
        "some have none": {**streams, name: LayerStreams(good.base, None)},
        "output embedding": {"lm_head": tiny.layer_streams(model.lm_head.weight.detach())},
        "empty": {},
    }
    for message, given_streams in bad.items():
        with pytest.raises(UserError, match=message):
            patch(model, given_streams)
        assert not ortho_layers(model)
        assert "forward" not in model.__dict__
    patch(model, {name: good})
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
    shared = nn.Linear(8, 8).requires_grad_(False)
    plain = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    patch(plain, {"a.0": tiny.layer_streams(shared.weight, group_size=8)})
    assert plain["a"][0] is plain["b"][0]
    assert isinstance(plain["b"][0], OrthoLinear)
    unpatch(plain)
    assert plain["a"][0] is plain["b"][0]


def test_tied_embeddings_stay_tied():
    model = tiny.patched(tiny.llama(tie_word_embeddings=True))
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
    tiny.patched(model, bits=16, density=1.0)
    torch.testing.assert_close(logits_at(model, 1.0), tiny.logits(unpatched(model, 1.0)), rtol=1e-3, atol=1e-4)
    per_row = logits_at(model, [0.0, 0.5, 1.0])
    for row, alpha in enumerate([0.0, 0.5, 1.0]):
        torch.testing.assert_close(per_row[row], logits_at(model, alpha)[row], rtol=1e-3, atol=1e-4)
    assert not torch.equal(tiny.logits(plain), tiny.logits(model))


def unpatched(model, alpha):
    model = copy.deepcopy(model)
    unpatch(model, alpha)
    return model


# --- copies and moves of whole models


def test_deepcopy_is_independent(model):
    twin = copy.deepcopy(model)
    set_alpha(twin, 1.0)
    assert (get_alpha(model), get_alpha(twin)) == (0.0, 1.0)
    assert torch.equal(tiny.logits(twin), logits_at(model, 1.0))
    assert twin.__dict__["forward"].model is twin
    twin.lm_head.weight.data.zero_()
    assert not tiny.logits(twin).any()
    assert tiny.logits(model).any()


def test_pickle_and_torch_save(model):
    set_alpha(model, 0.5)
    said = tiny.logits(model)
    data = pickle.dumps(model)
    assert len(data) < 1.5 * sum(t.nbytes for t in model.state_dict().values()) + 100_000  # no dense copies
    twin = pickle.loads(data)
    assert get_alpha(twin) == 0.5
    assert torch.equal(tiny.logits(twin), said)
    assert twin.__dict__["generate"].model is twin
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(tiny.logits(torch.load(buffer, weights_only=False)), said)


def test_a_dropped_model_is_freed_at_once():
    model = tiny.patched()
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
    said = logits_at(model, 1.0)
    stored = {k: v.clone() for k, v in model.state_dict().items() if "ortho_" in k or "scales" in k or "qweight" in k}
    model.to(torch.float64)
    torch.testing.assert_close(logits_at(model, 1.0).float(), said, rtol=1e-3, atol=1e-4)
    model.to(torch.float16).to(torch.float32)
    state = model.state_dict()
    assert all(
        torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in stored.items()
    )


def test_forward_keeps_its_signature(model):
    plain = tiny.llama()
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert inspect.signature(model.generate) == inspect.signature(plain.generate)


# --- alpha


def test_default_scope_and_nesting(model):
    zero, one = logits_at(model, 0.0), logits_at(model, 1.0)
    assert get_alpha(model) == 0.0
    assert torch.equal(tiny.logits(model), zero)
    set_alpha(model, 1)
    assert torch.equal(tiny.logits(model), one)
    with alpha_scope(0.0):
        assert torch.equal(tiny.logits(model), zero)
        with alpha_scope(torch.tensor(1.0)):
            assert torch.equal(tiny.logits(model), one)
        assert torch.equal(tiny.logits(model), zero)
        set_alpha(model, 0.5)  # the scope still decides
        assert torch.equal(tiny.logits(model), zero)
    assert get_alpha(model) == 0.5
    with pytest.raises(ZeroDivisionError), alpha_scope(0.25):
        raise ZeroDivisionError
    assert get_alpha(model) == 0.5


@pytest.mark.parametrize("alpha", [2, -0.1, float("nan"), float("inf"), "abc", None, [], [0.5, 2.0], [[0.5]], [None]])
def test_bad_alpha(model, alpha):
    with pytest.raises(UserError, match="alpha"), alpha_scope(alpha):
        pass
    with pytest.raises(UserError, match="alpha"):
        set_alpha(model, alpha)
    assert get_alpha(model) == 0.0


def test_set_alpha_takes_one_number(model):
    with pytest.raises(UserError, match="alpha_scope"):
        set_alpha(model, [0.5, 0.5])


def test_alpha_is_linear_in_the_weights(model):
    for alpha in (0.25, 0.5, 0.75):
        torch.testing.assert_close(logits_at(model, alpha), tiny.logits(unpatched(model, alpha)), rtol=1e-3, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=5), st.integers(1, 6))
def test_each_row_gets_what_it_gets_alone(alphas, length):
    model = shared_model()
    mixed = logits_at(model, alphas, rows=len(alphas), length=length)
    ids = tiny.tokens(len(alphas), length)
    for row, alpha in enumerate(alphas):
        with torch.no_grad(), alpha_scope(alpha):
            alone = model(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-4)


def shared_model(kept=[]):  # noqa: B006
    if not kept:
        kept.append(tiny.patched())
    return kept[0]


def test_per_row_alpha_must_fit_the_batch(model):
    for alphas in ([0.0, 1.0], [0.0, 1.0, 0.0, 1.0], [0.5, 0.5]):
        with pytest.raises(UserError, match="the batch has 3"):
            logits_at(model, alphas)
    layer, _ = standalone()
    with alpha_scope([0.0, 1.0]), pytest.raises(UserError, match="rows are not those"):
        layer(torch.randn(4, 40))
    tiny.logits(model)  # nothing is left behind by the errors
    assert get_alpha(model) == 0.0


def test_a_later_change_of_the_tensor_is_not_seen(model):
    alphas = torch.tensor([0.0, 1.0, 0.5])
    with alpha_scope(alphas):
        before = tiny.logits(model)
        alphas.fill_(0.0)
        assert torch.equal(tiny.logits(model), before)


class Flattened(nn.Module):
    """A model that sees its tokens as one matrix, and a layer that sees only some of them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.all = nn.Linear(8, 8, bias=False)
        self.some = nn.Linear(8, 8, bias=False)
        self.pick = None

    def forward(self, input_ids):
        flat = self.all(self.embed(input_ids).view(-1, 8))
        if self.pick is not None:
            flat = self.some(flat[self.pick])
        return flat


def test_flattened_positions_follow_their_row():
    torch.manual_seed(0)
    plain = Flattened().requires_grad_(False)
    patch(
        plain,
        {n: tiny.layer_streams(getattr(plain, n).weight, group_size=8, density=0.5) for n in ("all", "some")},
    )
    ids = torch.randint(0, 10, (2, 5))
    with alpha_scope([0.0, 1.0]):
        mixed = plain(ids).view(2, 5, 8)
    for row, alpha in enumerate((0.0, 1.0)):
        with alpha_scope(alpha):
            torch.testing.assert_close(mixed[row], plain(ids[row : row + 1]), rtol=1e-5, atol=1e-5)
    plain.pick = torch.tensor([0, 3, 4, 7])  # as in a mixture of experts: rows of the batch cannot be told
    with alpha_scope([0.0, 1.0]), pytest.raises(UserError, match="one alpha for the whole batch"):
        plain(ids)


def test_threads_do_not_see_each_other(model):
    wanted = {alpha: logits_at(model, alpha) for alpha in (0.0, 0.5, 1.0)}
    wrong = []

    def work(alpha):
        for _ in range(5):
            if not torch.equal(logits_at(model, alpha), wanted[alpha]):
                wrong.append(alpha)

    threads = [threading.Thread(target=work, args=(alpha,)) for alpha in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_started_in_a_scope_sees_the_default(model):
    seen = []
    with alpha_scope(1.0):
        thread = threading.Thread(target=lambda: seen.append(get_alpha(model)))
        thread.start()
        thread.join()
    assert seen == [0.0]


def test_tasks_do_not_see_each_other(model):
    async def ask(alpha):
        with alpha_scope(alpha):
            await asyncio.sleep(0)
            seen = [get_alpha(model)]
            await asyncio.sleep(0)
            seen.append(get_alpha(model))
            return seen

    async def all_of_them():
        return await asyncio.gather(*(ask(a) for a in (0.0, 0.5, 1.0)))

    assert asyncio.run(all_of_them()) == [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]


def test_a_running_forward_never_sees_a_change(model):
    """Another thread turns the dial while the forward stands between two layers."""
    one = logits_at(model, 1.0)
    set_alpha(model, 1.0)
    reached, turned = threading.Event(), threading.Event()

    def wait(*_):
        reached.set()
        assert turned.wait(20)

    handle = model.model.layers[1].register_forward_pre_hook(wait)
    said = []
    thread = threading.Thread(target=lambda: said.append(tiny.logits(model)))
    thread.start()
    assert reached.wait(20)
    set_alpha(model, 0.0)
    turned.set()
    thread.join()
    handle.remove()
    assert torch.equal(said[0], one)
    assert get_alpha(model) == 0.0


def test_a_running_forward_does_not_see_its_own_thread_either(model):
    one = logits_at(model, 1.0)
    set_alpha(model, 1.0)
    scopes = []

    def meddle(*_):
        set_alpha(model, 0.0)
        scope = alpha_scope(0.0)
        scope.__enter__()
        scopes.append(scope)

    handle = model.model.layers[1].register_forward_pre_hook(meddle)
    said = tiny.logits(model)
    handle.remove()
    scopes.pop().__exit__(None, None, None)
    assert torch.equal(said, one)


class During(LogitsProcessor):
    """Runs ``action`` once, in the middle of a generation."""

    def __init__(self, action):
        self.action = action
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 3:
            self.action()
        return scores


def generate(model, processor=None, **kwargs):
    extra = {"logits_processor": LogitsProcessorList([processor])} if processor else {}
    settings_of_search = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ids = tiny.tokens(2, 4)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**settings_of_search, **extra, **kwargs})


def test_a_generation_keeps_its_alpha(model):
    with alpha_scope(1.0):
        wanted = generate(model)
    with alpha_scope(0.0):
        assert not torch.equal(generate(model), wanted)
    set_alpha(model, 1.0)
    assert torch.equal(generate(model, During(lambda: set_alpha(model, 0.0))), wanted)
    assert get_alpha(model) == 0.0


def test_a_model_asked_inside_its_own_generation(model):
    """A scope opened inside (contrastive decoding, say) holds for the calls made in it."""
    zero, one = logits_at(model, 0.0), logits_at(model, 1.0)
    seen = []

    def ask():
        seen.append(tiny.logits(model))
        seen.append(logits_at(model, 0.0))

    with alpha_scope(1.0):
        wanted = generate(model)
        assert torch.equal(generate(model, During(ask)), wanted)
    assert torch.equal(seen[0], one)
    assert torch.equal(seen[1], zero)


def test_generation_with_an_alpha_per_row(model):
    alone = []
    for row, alpha in enumerate((0.0, 1.0)):
        with alpha_scope(alpha):
            alone.append(generate(model)[row])
    with alpha_scope([0.0, 1.0]):
        assert torch.equal(generate(model), torch.stack(alone))
        beams = generate(model, num_beams=3, num_return_sequences=2)
        sampled = generate(model, do_sample=True, num_return_sequences=3)
    assert beams.shape[0] == 4
    assert sampled.shape[0] == 6
    for row, alpha in enumerate((0.0, 1.0)):
        with alpha_scope(alpha):
            wanted = generate(model, num_beams=3, num_return_sequences=2)[2 * row : 2 * row + 2]
        assert torch.equal(beams[2 * row : 2 * row + 2], wanted)
    with alpha_scope([0.0, 1.0, 0.0]), pytest.raises(UserError, match="the batch has 2"):
        generate(model)


def test_two_models_in_one_generation(model):
    """Each model has its own running alpha: a draft model changes nothing for the large one."""
    draft = tiny.patched(tiny.llama(seed=1))
    set_alpha(model, 1.0)
    wanted = generate(model)
    seen = []

    def ask_the_other():
        seen.append((get_alpha(model), get_alpha(draft)))
        generate(draft)

    assert torch.equal(generate(model, During(ask_the_other)), wanted)
    assert seen == [(1.0, 0.0)]


def test_an_interruption_leaves_nothing_behind(model):
    def stop(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        tiny.logits(model)
    handle.remove()
    set_alpha(model, 1.0)
    assert torch.equal(tiny.logits(model), logits_at(model, 1.0))


def test_parts_of_a_model_can_be_called(model):
    ids = tiny.tokens()
    with torch.no_grad():
        whole = model.model(ids).last_hidden_state
        with alpha_scope(1.0):
            assert not torch.equal(model.model(ids).last_hidden_state, whole)


# --- targets


def test_all_linear_layers_but_the_head():
    model = tiny.llama()
    found, skipped = survey(model)
    assert len(found) == 14
    assert all(found[name] is model.get_submodule(name) for name in found)
    assert skipped == {"lm_head": "output embedding"}


@pytest.mark.parametrize(
    ("globs", "count"),
    [
        ("", 14), ("+", 14), ("down_proj", 2), ("mlp.*", 6), ("*.layers.0.*", 7), ("q_proj + k_proj", 4),
        ("model.layers.1.mlp.up_proj", 1), ("down_proj+mlp.*", 6),
    ],
)  # fmt: skip
def test_globs(globs, count):
    assert len(find_linear(tiny.llama(), globs)) == count


@pytest.mark.parametrize(
    ("globs", "message"),
    [
        ("down_prj", "closest: .*down_proj"),
        (
            "down_proj+nothing_like_it",
            "'nothing_like_it' matches no linear layer; last parts of the names: down_proj",
        ),
        ("lm_head", "output embedding"),
    ],
)
def test_a_glob_without_a_match(globs, message):
    with pytest.raises(UserError, match=message):
        find_linear(tiny.llama(), globs)


def test_conv1d_is_listed_as_skipped():
    model = tiny.from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=128, n_positions=32))
    found, skipped = survey(model)
    assert not found
    assert sum("Conv1D" in reason for reason in skipped.values()) == 4
    with pytest.raises(UserError, match="Conv1D"):
        find_linear(model)


def test_tied_and_unusual_layers_are_skipped():
    class Odd(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain = nn.ModuleDict(
        {"embed": nn.Embedding(8, 4), "out": nn.Linear(4, 8), "odd": Odd(4, 4), "ok": nn.Linear(4, 4)}
    )
    plain["out"].weight = plain["embed"].weight
    found, skipped = survey(plain)
    assert set(found) == {"ok"}
    assert "tied" in skipped["out"]
    assert "forward of its own" in skipped["odd"]


def test_adapters_are_refused():
    """HISTORY 14: wrappers were once sieved as weights."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"q_proj.*un-merged adapter.*merge_and_unload"):
        find_linear(model)
    assert len(find_linear(model.merge_and_unload())) == 14


class Linear4bit(nn.Linear):
    pass


class QuantLinear(nn.Module):
    pass


def packed_variants():
    eight = nn.Linear(4, 4)
    eight.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    fp8 = nn.Linear(4, 4)
    fp8.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    foreign = nn.Module()
    foreign.register_buffer("qweight", torch.zeros(4, 2, dtype=torch.int32))
    return {"class": Linear4bit(4, 4), "gptq": QuantLinear(), "int8": eight, "fp8": fp8, "buffer": foreign}


@pytest.mark.parametrize("kind", ["class", "gptq", "int8", "fp8", "buffer"])
def test_packed_weights_are_refused_by_name(kind):
    """HISTORY 14: packed bytes were once sieved as weights."""
    plain = nn.ModuleDict({"fine": nn.Linear(4, 4), "packed": packed_variants()[kind]})
    with pytest.raises(UserError, match=r"'packed' is quantised already"):
        find_linear(plain)


def test_other_models_that_cannot_be_decomposed(model):
    with pytest.raises(UserError, match="decomposed already"):
        find_linear(model)
    with pytest.raises(UserError, match="no weights in memory"):
        find_linear(nn.Sequential(nn.Linear(4, 4, device="meta")))
    marked = tiny.llama()
    marked.config.quantization_config = {"quant_method": "awq"}
    with pytest.raises(UserError, match="awq"):
        find_linear(marked)
    with pytest.raises(UserError, match="no linear layer"):
        find_linear(nn.Sequential(nn.ReLU()))
