"""A model whose blocks come to the device in turn says, learns and decomposes into the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lm_ortho.calibration.activations import input_moments
from lm_ortho.calibration.by_layer import InputMoments
from lm_ortho.config import make_recipe
from lm_ortho.data.encoding import encode
from lm_ortho.errors import UserError
from lm_ortho.finetune import FinetunePlan, train_adapter
from lm_ortho.layer import find_linear, linear_form
from lm_ortho.objective import surrogate
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.runtime import offload
from lm_ortho.runtime.offload import is_offloaded, offload_blocks
from lm_ortho.runtime.precision import transformer_blocks
from tests.support.architectures import CASES, RETAIN, tokenizer

torch.set_num_threads(1)
IDS = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))


def learnt(model):
    """Logits and the gradients of every parameter."""
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), found


@pytest.mark.parametrize("name", CASES)
def test_the_same_words_and_gradients(name):
    model = CASES[name].build()
    with linear_form(model):
        logits, gradients = learnt(model)
        with offload_blocks(model, "cpu"):
            assert is_offloaded(model)
            again, same = learnt(model)
            with torch.no_grad():
                assert torch.equal(model(input_ids=IDS, use_cache=False).logits, logits)
    assert torch.equal(again, logits)
    assert same.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(same[key], gradient, rtol=1e-5, atol=1e-8)
    assert not is_offloaded(model)
    assert all("forward" not in vars(block) for block in transformer_blocks(model))


def test_dropout_falls_on_the_same_places_when_computed_again():
    model = CASES["GPT-2"].build().train()
    assert any(
        isinstance(part, nn.Dropout) and part.p > 0 for block in transformer_blocks(model) for part in block.modules()
    )
    torch.manual_seed(0)
    logits, gradients = learnt(model)
    with offload_blocks(model, "cpu"):
        torch.manual_seed(0)
        again, same = learnt(model)
    assert torch.equal(again, logits)
    for key, gradient in gradients.items():
        torch.testing.assert_close(same[key], gradient, rtol=1e-5, atol=1e-8)


def test_weights_are_fetched_and_never_read_in_place(monkeypatch):
    """The copies of the blocks stand elsewhere: what the blocks hold themselves is not a number here."""
    model = CASES["Llama"].build()
    logits, gradients = learnt(model)
    inside = [part for block in transformer_blocks(model) for part in block.parameters()]
    true = {id(part): part.detach().clone() for part in inside}
    plain, fetched = offload._Visit._tensors, []

    def elsewhere(visit):
        for name, tensor in plain(visit):
            fetched.append(name)
            yield name, tensor + (true[id(tensor)] - tensor.detach().nan_to_num()) if id(tensor) in true else tensor

    with torch.no_grad():
        for part in inside:
            part.zero_()
    monkeypatch.setattr(offload._Visit, "_tensors", elsewhere)
    with offload_blocks(model, "cpu"):
        again, same = learnt(model)
    assert torch.equal(again, logits)
    assert len(fetched) == 2 * len(inside), "once forward, and once more to compute again what was not kept"
    for key, gradient in gradients.items():
        torch.testing.assert_close(same[key], gradient, rtol=1e-5, atol=1e-8)


def test_a_block_is_fetched_once_for_many_documents_and_anew_when_it_changed(monkeypatch):
    model = CASES["Llama"].build()
    rows = encode(tokenizer(), RETAIN * 40)
    layers = find_linear(model)
    fetched = []
    plain = torch.Tensor.to
    expected = input_moments(model, layers, rows)
    with offload_blocks(model, "cpu"):
        weight = next(iter(layers.values())).weight

        def watched(tensor, *args, **kwargs):
            if tensor is weight:
                fetched.append(1)
                return plain(tensor, *args, **kwargs).clone()  # another device gives a copy, too
            return plain(tensor, *args, **kwargs)

        moments = InputMoments(model, layers, rows, limit=1)
        monkeypatch.setattr(torch.Tensor, "to", watched)
        for name in layers:
            assert torch.equal(moments[name], expected[name])
        assert len(fetched) == 1
        with torch.no_grad():
            before = model(input_ids=IDS, use_cache=False).logits
            weight.mul_(2)
            assert not torch.equal(model(input_ids=IDS, use_cache=False).logits, before)
            weight.data = weight.data / 2
            assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)


@pytest.mark.parametrize("known", [False, True])
def test_a_decomposition_is_the_same(memorised, known, monkeypatch):
    monkeypatch.setattr(surrogate, "STEPS", 5)
    given = memorised.tokenizer, memorised.forget, memorised.retain
    recipe = make_recipe(steps=20, density=0.05, group_size=32, recompute=True)
    base = memorised.base if known else None
    plain = decompose(memorised.merged, *given, recipe, base_model=base)
    model, before = copy.deepcopy(memorised.merged), copy.deepcopy(base)
    with offload_blocks(model, "cpu"):
        if before is None:
            made = decompose(model, *given, recipe)
        else:
            with offload_blocks(before, "cpu"):
                made = decompose(model, *given, recipe, base_model=before)
    assert made.report["target"] == plain.report["target"]
    for name, streams in plain.streams.items():
        same = made.streams[name].base.codes() == streams.base.codes()
        assert same.float().mean() > 0.999, name


def test_an_adapter_is_trained_on_a_copy(memorised):
    model = copy.deepcopy(memorised.base)
    examples = memorised.examples()[1]
    plain = train_adapter(model, examples, FinetunePlan(steps=5, rows=4), lambda *_: None)
    with offload_blocks(model, "cpu"):
        made = train_adapter(model, examples, FinetunePlan(steps=5, rows=4), lambda *_: None)
    for (name, mine), theirs in zip(made.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)
        if "lora_B" in name:
            assert mine.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), memorised.base.parameters(), strict=True))


def test_a_model_without_blocks_is_refused():
    with (
        pytest.raises(UserError, match="offload: Linear has no list of blocks"),
        offload_blocks(nn.Linear(2, 2), "cpu"),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_only_one_block_is_there(memorised):
    model = CASES["Llama"].build()
    logits, gradients = learnt(model)
    with offload_blocks(model, "cuda"):
        held = torch.cuda.memory_allocated()
        found = model(input_ids=IDS.cuda(), use_cache=False).logits
        found.square().mean().backward()
        assert held < sum(4 * p.numel() for p in model.parameters())
        for block in transformer_blocks(model):
            assert {p.device.type for p in block.parameters()} == {"cpu"}
            assert {p.grad.device.type for p in block.parameters()} == {"cpu"}
    torch.testing.assert_close(found.cpu(), logits, rtol=1e-3, atol=1e-4)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        torch.testing.assert_close(parameter.grad.cpu(), gradients[name], rtol=1e-2, atol=1e-5)
