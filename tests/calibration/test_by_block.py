"""Documents that go through a model a block at a time give the moments of whole passes, whatever the architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lm_ortho.calibration.activations import input_moments
from lm_ortho.calibration.by_block import Halted, goes_by_block
from lm_ortho.calibration.by_layer import InputMoments
from lm_ortho.data.encoding import encode
from lm_ortho.layer import find_linear, linear_form
from lm_ortho.runtime.precision import transformer_blocks
from tests.support.architectures import CASES, RETAIN, tokenizer

torch.set_num_threads(1)
WHOLE_ONLY: set[str] = set()
"""Architectures whose blocks cannot be gone through one at a time."""


def documents():
    return encode(tokenizer(), RETAIN * 3)


def counted(model):
    """How often each block computes, from now on; one that stands in for itself does not."""
    calls = [0] * len(blocks := transformer_blocks(model))
    for number, block in enumerate(blocks):

        def add(*_, number=number):
            calls[number] += 1

        block.mlp.down_proj.register_forward_pre_hook(add)
    return calls


@pytest.mark.parametrize("name", CASES)
def test_moments_of_every_architecture(name):
    model = CASES[name].build()
    with linear_form(model):
        layers = find_linear(model)
        whole = input_moments(model, layers, documents())
        few = InputMoments(model, layers, documents(), limit=1)
        assert goes_by_block(model, transformer_blocks(model), documents()) == (name not in WHOLE_ONLY)
        inside = {id(part) for block in transformer_blocks(model) for part in block.modules()}
        outside = sum(id(layer) not in inside for layer in layers.values())
        assert few.passes == (len(layers) if name in WHOLE_ONLY else 1 + outside)
        for layer, moment in whole.items():
            torch.testing.assert_close(few[layer], moment, rtol=1e-4, atol=1e-6)


def test_each_block_is_gone_through_once():
    model = CASES["Llama"].build()
    layers, rows = find_linear(model), documents()
    moments = InputMoments(model, layers, rows, limit=1)
    assert moments.passes == 1
    calls = counted(model)
    for name in layers:
        moments[name]
    batches = len(moments._by_block._halted.batches)
    assert calls == [batches] * len(calls)
    assert len(list(moments.values())) == len(layers)  # from the beginning
    assert calls == [2 * batches] * len(calls)


def test_an_interruption_leaves_the_documents_where_they_were():
    model = CASES["Llama"].build()
    halted = Halted(model, transformer_blocks(model), [documents()[:2], documents()[2:]])
    halted.advance()

    seen = []

    def stop(batch):
        seen.append(batch)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halted.advance(stop)
    assert halted.at == 1
    assert all("forward" not in vars(block) for block in halted.blocks)
    halted.advance()
    whole = model(input_ids=halted._ids(1), use_cache=False).logits
    assert torch.equal(halted.rest(1).logits, whole)


def tangled():
    """A model whose second block reads what the first one left behind while it computed."""
    model = CASES["Llama"].build()
    first, second = transformer_blocks(model)[:2]
    left = {}
    first.mlp.register_forward_hook(lambda *given: left.update(behind=given[2]))
    second.mlp.register_forward_hook(lambda _, __, output: output + left["behind"].flip(-1))
    return model


@pytest.mark.parametrize("alike", [False, True], ids=["lengths differ", "one length"])
def test_where_blocks_hand_on_more_whole_passes_are_made(alike):
    model = tangled()
    layers, rows = find_linear(model), documents()
    if alike:
        shortest = min(len(row.ids) for row in rows)
        rows = [replace(row, ids=row.ids[:shortest], roles=row.roles[:shortest]) for row in rows]
    expected = input_moments(model, layers, rows)
    moments = InputMoments(model, layers, rows, limit=1)
    assert moments.passes > 1
    for name in layers:
        torch.testing.assert_close(moments[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_layer_that_blocks_share_is_seen_in_all_of_them():
    model = CASES["Llama"].build()
    first, second = transformer_blocks(model)[:2]
    second.mlp.down_proj = first.mlp.down_proj
    layers, rows = find_linear(model), documents()
    expected = input_moments(model, layers, rows)
    moments = InputMoments(model, layers, rows, limit=1)
    assert moments.passes == 2
    for name in layers:
        torch.testing.assert_close(moments[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_tensor_that_was_written_to_is_another_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.embed = nn.Embedding(99, 4)
            self.config = CASES["Llama"].build().config

        def forward(self, input_ids, use_cache=False):
            x = self.embed(input_ids) + 0
            x += self.a(x)
            return self.b(x)

    model, rows = InPlace(), documents()
    found = input_moments(model, {"a": model.a, "b": model.b}, rows)
    with torch.no_grad():
        given = torch.cat([model.embed(torch.tensor(row.ids)) for row in rows])
        given = given + model.a(given)
    torch.testing.assert_close(found["b"], given.T @ given / len(given), rtol=1e-4, atol=1e-5)


def test_experts_that_see_some_of_the_tokens_in_a_later_block():
    model = CASES["Mixtral"].build()
    rows = documents()
    assert len({len(row.ids) for row in rows}) > 1
    with linear_form(model):
        layers = find_linear(model)
        attention = {name: layer for name, layer in layers.items() if "experts" not in name}
        chosen = {**attention, **{name: layer for name, layer in layers.items() if ".1." in name}}
        expected = input_moments(model, chosen, rows)
        moments = InputMoments(model, chosen, rows, limit=1)
        for name in reversed(list(chosen)):  # against the order: begins again for every block
            torch.testing.assert_close(moments[name], expected[name], rtol=1e-4, atol=1e-6)
