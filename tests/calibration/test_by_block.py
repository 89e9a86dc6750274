"""Block-wise passes give the moments of whole passes, whatever the architecture."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from lm_ortho.calibration import by_layer
from lm_ortho.calibration.activations import input_moments
from lm_ortho.calibration.by_block import BlockwisePass, supports_blockwise
from lm_ortho.calibration.by_layer import InputMoments
from lm_ortho.data.encoding import encode
from lm_ortho.layer import find_linear, linear_form
from lm_ortho.runtime.precision import transformer_blocks
from tests.support.architectures import CASES, RETAIN, tokenizer

torch.set_num_threads(1)
UNSUPPORTED: set[str] = set()
"""Architectures that do not support block-wise passes."""


def documents():
    return encode(tokenizer(), RETAIN * 3)


def count_block_calls(model):
    """The number of computations of each block from now on, without those that return a stored output."""
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
        expected = input_moments(model, layers, documents())
        moments = InputMoments(model, layers, documents(), limit=1)
        assert supports_blockwise(model, transformer_blocks(model), documents()) == (name not in UNSUPPORTED)
        inside = {id(part) for block in transformer_blocks(model) for part in block.modules()}
        outside = sum(id(layer) not in inside for layer in layers.values())
        assert moments.passes == (len(layers) if name in UNSUPPORTED else 1 + outside)
        for layer, moment in expected.items():
            torch.testing.assert_close(moments[layer], moment, rtol=1e-4, atol=1e-6)


def test_each_block_is_computed_once():
    model = CASES["Llama"].build()
    layers, rows = find_linear(model), documents()
    moments = InputMoments(model, layers, rows, limit=1)
    assert moments.passes == 1
    calls = count_block_calls(model)
    for name in layers:
        moments[name]
    batches = len(moments._block_moments._blockwise_pass.batches)
    assert calls == [batches] * len(calls)
    assert len(list(moments.values())) == len(layers)  # starts a new pass
    assert calls == [2 * batches] * len(calls)


def test_an_interruption_leaves_the_pass_as_it_was():
    model = CASES["Llama"].build()
    blockwise_pass = BlockwisePass(model, transformer_blocks(model), [documents()[:2], documents()[2:]])
    blockwise_pass.advance()

    batches = []

    def interrupt_second_batch(batch):
        batches.append(batch)
        if len(batches) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        blockwise_pass.advance(interrupt_second_batch)
    assert blockwise_pass.next_block == 1
    assert all("forward" not in vars(block) for block in blockwise_pass.blocks)
    blockwise_pass.advance()
    expected = model(input_ids=blockwise_pass.input_ids(1), use_cache=False).logits
    assert torch.equal(blockwise_pass.finish(1).logits, expected)


def model_with_side_channel():
    """A model whose second block reads a tensor that the first one stored instead of returning it."""
    model = CASES["Llama"].build()
    first, second = transformer_blocks(model)[:2]
    storage = {}
    first.mlp.register_forward_hook(lambda _, __, output: storage.update(output=output))
    second.mlp.register_forward_hook(lambda _, __, output: output + storage["output"].flip(-1))
    return model


@pytest.mark.parametrize("same_length", [False, True], ids=["lengths differ", "one length"])
def test_blocks_that_pass_on_more_than_their_output_get_whole_passes(same_length):
    model = model_with_side_channel()
    layers, rows = find_linear(model), documents()
    if same_length:
        shortest = min(len(row.ids) for row in rows)
        rows = [replace(row, ids=row.ids[:shortest], roles=row.roles[:shortest]) for row in rows]
    expected = input_moments(model, layers, rows)
    moments = InputMoments(model, layers, rows, limit=1)
    assert moments.passes > 1
    for name in layers:
        torch.testing.assert_close(moments[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_layer_that_blocks_share_counts_in_all_of_them():
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
    moments = input_moments(model, {"a": model.a, "b": model.b}, rows)
    with torch.no_grad():
        x = torch.cat([model.embed(torch.tensor(row.ids)) for row in rows])
        x = x + model.a(x)
    torch.testing.assert_close(moments["b"], x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_experts_of_a_later_block_that_receive_some_of_the_tokens():
    model = CASES["Mixtral"].build()
    rows = documents()
    assert len({len(row.ids) for row in rows}) > 1
    with linear_form(model):
        layers = find_linear(model)
        attention = {name: layer for name, layer in layers.items() if "experts" not in name}
        tested_layers = {**attention, **{name: layer for name, layer in layers.items() if ".1." in name}}
        expected = input_moments(model, tested_layers, rows)
        moments = InputMoments(model, tested_layers, rows, limit=1)
        for name in reversed(list(tested_layers)):  # in reverse order, so every block starts a new pass
            torch.testing.assert_close(moments[name], expected[name], rtol=1e-4, atol=1e-6)


def test_large_moments_are_released_and_computed_again(monkeypatch):
    model, rows = CASES["Llama"].build(), documents()
    layers = find_linear(model)
    moments = InputMoments(model, layers, rows)
    expected = {name: moments[name] for name in layers}
    moments.release()
    assert all(moments[name] is expected[name] for name in layers)
    monkeypatch.setattr(by_layer, "SMALL_MOMENT_BYTES", 0)
    moments.release()
    for name in layers:
        assert moments[name] is not expected[name]
        torch.testing.assert_close(moments[name], expected[name])


def test_the_statistics_do_not_hold_the_inputs_of_all_layers():
    model, rows = CASES["Llama"].build(), documents()
    layers, inputs, most = find_linear(model), [], []

    def count(_, args):
        inputs.append(weakref.ref(args[0]))
        most.append(len({id(tensor) for reference in inputs if (tensor := reference()) is not None}))

    for layer in layers.values():
        layer.register_forward_pre_hook(count)
    input_moments(model, layers, rows)
    assert max(most) <= 3  # of four in each block


def test_the_inputs_of_blocks_are_released(monkeypatch):
    model, rows = CASES["Llama"].build(), documents()
    layers = find_linear(model)
    moments = InputMoments(model, layers, rows, limit=1)
    names = list(layers)
    expected = {name: moments[name] for name in names}
    assert moments._block_moments._blockwise_pass.next_block > 0
    moments.release()
    assert moments._block_moments._blockwise_pass.next_block == 0
    for name in names:
        torch.testing.assert_close(moments[name], expected[name])


def test_the_statistics_compute_no_logits_but_those_of_the_first_tokens():
    model, rows = CASES["Llama"].build(), documents()
    shapes = []
    head = model.get_output_embeddings().register_forward_hook(lambda *call: shapes.append(call[2].shape[1]))
    input_moments(model, find_linear(model), rows)
    head.remove()
    assert set(shapes) == {1}
