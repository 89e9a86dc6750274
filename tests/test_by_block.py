"""Documents that go through a model a block at a time give the moments of whole passes, whatever the architecture."""

from __future__ import annotations

import pytest
import torch
from architectures import CASES, RETAIN, tokenizer
from torch import nn

from lm_ortho.calibration.activations import input_moments
from lm_ortho.calibration.by_block import Halted, goes_by_block
from lm_ortho.calibration.by_layer import Moments
from lm_ortho.calibration.examples import encode
from lm_ortho.calibration.precision import blocks_of
from lm_ortho.layer import find_linear, linear_form

torch.set_num_threads(1)
WHOLE_ONLY: set[str] = set()
"""Architectures whose blocks cannot be gone through one at a time."""


def documents():
    return encode(tokenizer(), RETAIN * 3)


def counted(model):
    """How often each block is called, from now on."""
    calls = [0] * len(blocks := blocks_of(model))
    for number, block in enumerate(blocks):

        def add(*_, number=number):
            calls[number] += 1

        block.register_forward_pre_hook(add)
    return calls


@pytest.mark.parametrize("name", CASES)
def test_moments_of_every_architecture(name):
    model = CASES[name].build()
    with linear_form(model):
        layers = find_linear(model)
        whole = input_moments(model, layers, documents())
        few = Moments(model, layers, documents(), limit=1)
        assert goes_by_block(model, blocks_of(model), documents()[0]) == (name not in WHOLE_ONLY)
        inside = {id(part) for block in blocks_of(model) for part in block.modules()}
        outside = sum(id(layer) not in inside for layer in layers.values())
        assert few.passes == (len(layers) if name in WHOLE_ONLY else 1 + outside)
        for layer, moment in whole.items():
            torch.testing.assert_close(few[layer], moment, rtol=1e-4, atol=1e-6)


def test_each_block_is_gone_through_once():
    model = CASES["Llama"].build()
    layers, rows = find_linear(model), documents()
    moments = Moments(model, layers, rows, limit=1)
    assert moments.passes == 1
    calls = counted(model)
    for name in layers:
        moments[name]
    held = {id(moment) for moment in moments.values()}
    assert held
    batches = len(moments._by_block._halted.batches)
    # stand-ins are called, too: block 0 once by itself and once while each later one is gone through, in both readings
    blocks = len(calls)
    assert calls == [2 * batches * (blocks - number) for number in range(blocks)]


def test_an_interruption_leaves_the_documents_where_they_were():
    model = CASES["Llama"].build()
    halted = Halted(model, blocks_of(model), [documents()[:2], documents()[2:]])
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


class Tangled(nn.Module):
    """Blocks that tell one another more than they return."""

    def __init__(self, model):
        super().__init__()
        self.inner = model
        self.config = model.config
        self.seen = []
        first, second = blocks_of(model)[:2]
        first.register_forward_hook(lambda *given: self.seen.append(given[2]))
        second.register_forward_hook(lambda _, __, output: output + self.seen.pop().flip(-1))

    def forward(self, input_ids, use_cache=False):
        return self.inner(input_ids=input_ids, use_cache=use_cache)


def test_where_blocks_hand_on_more_whole_passes_are_made():
    model = Tangled(CASES["Llama"].build())
    layers, rows = find_linear(model), documents()
    expected = input_moments(model, layers, rows)
    model.seen.clear()
    moments = Moments(model, layers, rows, limit=1)
    assert moments.passes > 1
    for name in layers:
        model.seen.clear()
        torch.testing.assert_close(moments[name], expected[name], rtol=1e-4, atol=1e-6)


def test_experts_that_see_some_of_the_tokens_in_a_later_block():
    model = CASES["Mixtral"].build()
    rows = documents()
    assert len({len(row.ids) for row in rows}) > 1
    with linear_form(model):
        layers = find_linear(model)
        attention = {name: layer for name, layer in layers.items() if "experts" not in name}
        chosen = {**attention, **{name: layer for name, layer in layers.items() if ".1." in name}}
        expected = input_moments(model, chosen, rows)
        moments = Moments(model, chosen, rows, limit=1)
        for name in reversed(list(chosen)):  # against the order: begins again for every block
            torch.testing.assert_close(moments[name], expected[name], rtol=1e-4, atol=1e-6)
