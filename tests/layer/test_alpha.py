"""Alpha of a decomposed model: one per request or row, and invisible to other threads, tasks and models."""

from __future__ import annotations

import asyncio
import copy
import pickle
import re
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList

from lm_ortho.errors import UserError
from lm_ortho.layer import alpha_scope, get_alpha, ortho_layers, patch, set_alpha
from tests.support import tiny
from tests.support.tiny import logits_at, standalone_layer, unpatched_model

torch.set_num_threads(1)


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
        set_alpha(model, 0.5)  # the scope takes precedence
        assert torch.equal(tiny.logits(model), zero)
    assert get_alpha(model) == 0.5
    with pytest.raises(ZeroDivisionError), alpha_scope(0.25):
        raise ZeroDivisionError
    assert get_alpha(model) == 0.5


BAD_ALPHAS = [
    *(2, -0.1, float("nan"), float("inf"), -float("inf"), 10**400, 1j),
    *("abc", "0.5", "memory:1", b"1", "x" * 10**6, None, object(), True, False, set()),
    *(
        [],
        [0.5, 2.0],
        [[0.5]],
        [None],
        ["0", "1"],
        [True, False],
        [0.5, True],
        [0.0, float("nan")],
        [10**400],
        (0.5, -1),
    ),
    *(torch.tensor(True), torch.tensor([1j]), torch.zeros(0), torch.zeros(1, 1), torch.tensor(float("nan"))),
    torch.zeros(2, device="meta"),
    *({}, {"memory": True}, {"memory": "1"}, {"memory": {"memory": 1}}, {"memory": float("nan")}, {"memory": None}),
]


@pytest.mark.parametrize("alpha", BAD_ALPHAS, ids=lambda alpha: re.sub(r" at 0x.*", "", str(alpha)[:30]))
def test_bad_alpha(model, alpha):
    with pytest.raises(UserError, match=r"^alpha") as error, alpha_scope(alpha):
        pass
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"^alpha"):
        set_alpha(model, alpha)
    assert get_alpha(model) == 0.0


def test_the_row_of_a_bad_alpha_is_named():
    with pytest.raises(UserError, match=r"alpha of row 2=1\.5"), alpha_scope([0.0, 1.0, 1.5]):
        pass


@pytest.mark.parametrize("alpha", [{"alice": 1.0}, {"memory": 0.5, "alice": [0.0, 0.5, 1.0]}])
def test_an_unknown_memory_is_named(model, alpha):
    with pytest.raises(UserError, match="the model has no memory 'alice'; it has 'memory'"), alpha_scope(alpha):
        tiny.logits(model)
    with pytest.raises(UserError, match="alpha"):
        set_alpha(model, alpha)
    assert get_alpha(model) == 0.0


def test_a_model_with_alphas_by_name_can_be_copied_and_pickled(model):
    set_alpha(model, {"memory": 0.5})
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert get_alpha(again) == {"memory": 0.5}
        assert torch.equal(tiny.logits(again), tiny.logits(model))


def test_set_alpha_takes_one_number(model):
    with pytest.raises(UserError, match="alpha_scope"):
        set_alpha(model, [0.5, 0.5])


def test_alpha_is_linear_in_the_weights(model):
    for alpha in (0.25, 0.5, 0.75):
        torch.testing.assert_close(
            logits_at(model, alpha), tiny.logits(unpatched_model(model, alpha)), rtol=1e-3, atol=1e-3
        )


@settings(max_examples=10)
@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=5), st.integers(1, 6))
def test_each_row_gets_the_logits_it_gets_alone(alphas, length):
    model = shared_model()
    batch_logits = logits_at(model, alphas, rows=len(alphas), length=length)
    ids = tiny.tokens(len(alphas), length)
    for row, alpha in enumerate(alphas):
        with torch.no_grad(), alpha_scope(alpha):
            row_logits = model(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(batch_logits[row], row_logits, rtol=1e-4, atol=1e-4)


def shared_model(cache=[]):  # noqa: B006
    if not cache:
        cache.append(tiny.patched_model())
    return cache[0]


def test_per_row_alpha_must_fit_the_batch(model):
    for alphas in ([0.0, 1.0], [0.0, 1.0, 0.0, 1.0], [0.5, 0.5]):
        with pytest.raises(UserError, match="the batch has 3"):
            logits_at(model, alphas)
    layer, _ = standalone_layer()
    with alpha_scope([0.0, 1.0]), pytest.raises(UserError, match="rows are not those"):
        layer(torch.randn(4, 40))
    tiny.logits(model)  # the errors leave no state behind
    assert get_alpha(model) == 0.0


def test_a_later_change_of_the_tensor_is_not_seen(model):
    alphas = torch.tensor([0.0, 1.0, 0.5])
    with alpha_scope(alphas):
        before = tiny.logits(model)
        alphas.fill_(0.0)
        assert torch.equal(tiny.logits(model), before)


class FlattenedModel(nn.Module):
    """A model whose first layer gets the tokens as one matrix, and whose second layer gets only some of them."""

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
    plain = FlattenedModel().requires_grad_(False)
    patch(
        plain,
        {n: tiny.layer_streams(getattr(plain, n).weight, group_size=8, density=0.5) for n in ("all", "some")},
    )
    ids = torch.randint(0, 10, (2, 5))
    with alpha_scope([0.0, 1.0]):
        batch_output = plain(ids).view(2, 5, 8)
    for row, alpha in enumerate((0.0, 1.0)):
        with alpha_scope(alpha):
            torch.testing.assert_close(batch_output[row], plain(ids[row : row + 1]), rtol=1e-5, atol=1e-5)
    plain.pick = torch.tensor([0, 3, 4, 7])  # as in a mixture of experts: the rows of the batch are unknown
    with alpha_scope([0.0, 1.0]), pytest.raises(UserError, match="one alpha for the whole batch"):
        plain(ids)


def test_threads_do_not_see_each_other(model):
    logits_by_alpha = {alpha: logits_at(model, alpha) for alpha in (0.0, 0.5, 1.0)}
    wrong_alphas = []

    def work(alpha):
        for _ in range(5):
            if not torch.equal(logits_at(model, alpha), logits_by_alpha[alpha]):
                wrong_alphas.append(alpha)

    threads = [threading.Thread(target=work, args=(alpha,)) for alpha in logits_by_alpha]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong_alphas


def test_a_thread_started_in_a_scope_sees_the_default(model):
    alphas_seen = []
    with alpha_scope(1.0):
        thread = threading.Thread(target=lambda: alphas_seen.append(get_alpha(model)))
        thread.start()
        thread.join()
    assert alphas_seen == [0.0]


def test_tasks_do_not_see_each_other(model):
    async def call_model(alpha):
        with alpha_scope(alpha):
            await asyncio.sleep(0)
            alphas_seen = [get_alpha(model)]
            await asyncio.sleep(0)
            alphas_seen.append(get_alpha(model))
            return alphas_seen

    async def run_all():
        return await asyncio.gather(*(call_model(a) for a in (0.0, 0.5, 1.0)))

    assert asyncio.run(run_all()) == [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]


def test_a_running_forward_never_sees_a_change(model):
    """Another thread sets alpha while the forward pass is between two layers."""
    one = logits_at(model, 1.0)
    set_alpha(model, 1.0)
    first_layer_done, alpha_changed = threading.Event(), threading.Event()

    def wait(*_):
        first_layer_done.set()
        assert alpha_changed.wait(20)

    handle = model.model.layers[1].register_forward_pre_hook(wait)
    logits = []
    thread = threading.Thread(target=lambda: logits.append(tiny.logits(model)))
    thread.start()
    assert first_layer_done.wait(20)
    set_alpha(model, 0.0)
    alpha_changed.set()
    thread.join()
    handle.remove()
    assert torch.equal(logits[0], one)
    assert get_alpha(model) == 0.0


def test_a_running_forward_does_not_see_its_own_thread_either(model):
    one = logits_at(model, 1.0)
    set_alpha(model, 1.0)
    scopes = []

    def change_alpha(*_):
        set_alpha(model, 0.0)
        scope = alpha_scope(0.0)
        scope.__enter__()
        scopes.append(scope)

    handle = model.model.layers[1].register_forward_pre_hook(change_alpha)
    logits = tiny.logits(model)
    handle.remove()
    scopes.pop().__exit__(None, None, None)
    assert torch.equal(logits, one)


class CallbackDuringGeneration(LogitsProcessor):
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
    search_options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ids = tiny.tokens(2, 4)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**search_options, **extra, **kwargs})


def test_a_generation_keeps_its_alpha(model):
    with alpha_scope(1.0):
        generated_ids = generate(model)
    with alpha_scope(0.0):
        assert not torch.equal(generate(model), generated_ids)
    set_alpha(model, 1.0)
    assert torch.equal(generate(model, CallbackDuringGeneration(lambda: set_alpha(model, 0.0))), generated_ids)
    assert get_alpha(model) == 0.0


def test_a_generation_keeps_its_streams(model):
    """Like alpha, a stream that is written to during a generation changes the next one, and not this one."""

    def negate_values():
        for layer in ortho_layers(model).values():
            layer.ortho_vals.neg_()

    with alpha_scope(1.0):
        generated_ids = generate(model)
        assert torch.equal(generate(model, CallbackDuringGeneration(negate_values)), generated_ids)
        assert not torch.equal(generate(model), generated_ids)


def test_a_model_called_inside_its_own_generation(model):
    """A scope opened inside (as in contrastive decoding) applies to the calls in it."""
    zero, one = logits_at(model, 0.0), logits_at(model, 1.0)
    results = []

    def call_model():
        results.append(tiny.logits(model))
        results.append(logits_at(model, 0.0))

    with alpha_scope(1.0):
        generated_ids = generate(model)
        assert torch.equal(generate(model, CallbackDuringGeneration(call_model)), generated_ids)
    assert torch.equal(results[0], one)
    assert torch.equal(results[1], zero)


def test_generation_with_an_alpha_per_row(model):
    row_outputs = []
    for row, alpha in enumerate((0.0, 1.0)):
        with alpha_scope(alpha):
            row_outputs.append(generate(model)[row])
    with alpha_scope([0.0, 1.0]):
        assert torch.equal(generate(model), torch.stack(row_outputs))
        beams = generate(model, num_beams=3, num_return_sequences=2)
        samples = generate(model, do_sample=True, num_return_sequences=3)
    assert beams.shape[0] == 4
    assert samples.shape[0] == 6
    for row, alpha in enumerate((0.0, 1.0)):
        with alpha_scope(alpha):
            row_beams = generate(model, num_beams=3, num_return_sequences=2)[2 * row : 2 * row + 2]
        assert torch.equal(beams[2 * row : 2 * row + 2], row_beams)
    with alpha_scope([0.0, 1.0, 0.0]), pytest.raises(UserError, match="the batch has 2"):
        generate(model)


def test_two_models_in_one_generation(model):
    """Each model has its own current alpha: a draft model does not change that of the large model."""
    draft = tiny.patched_model(tiny.llama(seed=1))
    set_alpha(model, 1.0)
    generated_ids = generate(model)
    alphas_seen = []

    def call_draft():
        alphas_seen.append((get_alpha(model), get_alpha(draft)))
        generate(draft)

    assert torch.equal(generate(model, CallbackDuringGeneration(call_draft)), generated_ids)
    assert alphas_seen == [(1.0, 0.0)]


def test_an_interruption_leaves_no_state_behind(model):
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
        full = model.model(ids).last_hidden_state
        with alpha_scope(1.0):
            assert not torch.equal(model.model(ids).last_hidden_state, full)
