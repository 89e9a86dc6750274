"""An offloaded model has the same outputs, gradients and decomposition as one in a single place."""

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
from lm_ortho.objective import surrogate_training
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.runtime import offload
from lm_ortho.runtime.offload import is_offloaded, offload_blocks
from lm_ortho.runtime.precision import transformer_blocks
from lm_ortho.runtime.progress import no_progress
from tests.support.architectures import CASES, RETAIN, tokenizer

torch.set_num_threads(1)
IDS = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))


def logits_and_gradients(model):
    """Logits of ``IDS`` and the gradients of every parameter."""
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return logits.detach(), gradients


@pytest.mark.parametrize("name", CASES)
def test_the_same_logits_and_gradients(name):
    model = CASES[name].build()
    with linear_form(model):
        logits, gradients = logits_and_gradients(model)
        with offload_blocks(model, "cpu"):
            assert is_offloaded(model)
            offloaded_logits, offloaded_gradients = logits_and_gradients(model)
            with torch.no_grad():
                assert torch.equal(model(input_ids=IDS, use_cache=False).logits, logits)
    assert torch.equal(offloaded_logits, logits)
    assert offloaded_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(offloaded_gradients[key], gradient, rtol=1e-5, atol=1e-8)
    assert not is_offloaded(model)
    assert all("forward" not in vars(block) for block in transformer_blocks(model))


def test_recomputation_draws_the_same_dropout_mask():
    model = CASES["GPT-2"].build().train()
    assert any(
        isinstance(part, nn.Dropout) and part.p > 0 for block in transformer_blocks(model) for part in block.modules()
    )
    torch.manual_seed(0)
    logits, gradients = logits_and_gradients(model)
    with offload_blocks(model, "cpu"):
        torch.manual_seed(0)
        offloaded_logits, offloaded_gradients = logits_and_gradients(model)
    assert torch.equal(offloaded_logits, logits)
    for key, gradient in gradients.items():
        torch.testing.assert_close(offloaded_gradients[key], gradient, rtol=1e-5, atol=1e-8)


def test_weights_are_fetched_and_never_read_in_place(monkeypatch):
    """The weights of the blocks are zero here, so only fetched copies give the right result."""
    model = CASES["Llama"].build()
    logits, gradients = logits_and_gradients(model)
    inside = [part for block in transformer_blocks(model) for part in block.parameters()]
    weights = {id(part): part.detach().clone() for part in inside}
    own_tensors, fetched_names = offload._OffloadedForward._tensors, []

    def restore_weights(forward):
        for name, tensor in own_tensors(forward):
            fetched_names.append(name)
            weight = weights.get(id(tensor))
            yield name, tensor if weight is None else tensor + (weight - tensor.detach().nan_to_num())

    with torch.no_grad():
        for part in inside:
            part.zero_()
    monkeypatch.setattr(offload._OffloadedForward, "_tensors", restore_weights)
    with offload_blocks(model, "cpu"):
        offloaded_logits, offloaded_gradients = logits_and_gradients(model)
    assert torch.equal(offloaded_logits, logits)
    assert len(fetched_names) == 2 * len(inside), "once in the forward pass, once more for the recomputation"
    for key, gradient in gradients.items():
        torch.testing.assert_close(offloaded_gradients[key], gradient, rtol=1e-5, atol=1e-8)


def test_a_block_is_fetched_once_for_many_documents_and_again_after_a_change(monkeypatch):
    model = CASES["Llama"].build()
    rows = encode(tokenizer(), RETAIN * 40)
    layers = find_linear(model)
    fetch_count = 0
    original_to = torch.Tensor.to
    expected_moments = input_moments(model, layers, rows)
    with offload_blocks(model, "cpu"):
        weight = next(iter(layers.values())).weight

        def count_fetches(tensor, *args, **kwargs):
            nonlocal fetch_count
            if tensor is weight:
                fetch_count += 1
                return original_to(tensor, *args, **kwargs).clone()  # another device would give a copy, too
            return original_to(tensor, *args, **kwargs)

        moments = InputMoments(model, layers, rows, limit=1)
        monkeypatch.setattr(torch.Tensor, "to", count_fetches)
        for name in layers:
            assert torch.equal(moments[name], expected_moments[name])
        assert fetch_count == 1
        with torch.no_grad():
            before = model(input_ids=IDS, use_cache=False).logits
            weight.mul_(2)
            assert not torch.equal(model(input_ids=IDS, use_cache=False).logits, before)
            weight.data = weight.data / 2
            assert torch.equal(model(input_ids=IDS, use_cache=False).logits, before)


@pytest.mark.parametrize("with_base", [False, True])
def test_a_decomposition_is_the_same(memorised_models, with_base, monkeypatch):
    monkeypatch.setattr(surrogate_training, "BUDGET", 0.1)
    tokenizer_and_rows = memorised_models.tokenizer, memorised_models.forget, memorised_models.retain
    recipe = make_recipe(steps=20, density=0.05, group_size=32, recompute=True)
    base = memorised_models.base if with_base else None
    expected = decompose(memorised_models.merged, *tokenizer_and_rows, recipe=recipe, base_model=base)
    model, base_copy = copy.deepcopy(memorised_models.merged), copy.deepcopy(base)
    with offload_blocks(model, "cpu"):
        if base_copy is None:
            result = decompose(model, *tokenizer_and_rows, recipe=recipe)
        else:
            with offload_blocks(base_copy, "cpu"):
                result = decompose(model, *tokenizer_and_rows, recipe=recipe, base_model=base_copy)
    assert result.report["target"] == expected.report["target"]
    for name, streams in expected.streams.items():
        equal_codes = result.streams[name].base.codes() == streams.base.codes()
        assert equal_codes.float().mean() > 0.999, name


def test_an_adapter_is_trained_on_a_copy(memorised_models):
    model = copy.deepcopy(memorised_models.base)
    examples = memorised_models.examples()[1]
    expected = train_adapter(model, examples, FinetunePlan(steps=5, rows=4), progress=no_progress)
    with offload_blocks(model, "cpu"):
        adapted_model = train_adapter(model, examples, FinetunePlan(steps=5, rows=4), progress=no_progress)
    for (name, weight), expected_weight in zip(adapted_model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, expected_weight, rtol=1e-4, atol=1e-6, msg=name)
        if "lora_B" in name:
            assert weight.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), memorised_models.base.parameters(), strict=True))


def test_a_model_without_blocks_is_refused():
    with (
        pytest.raises(UserError, match="offload: Linear has no list of blocks"),
        offload_blocks(nn.Linear(2, 2), "cpu"),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_holds_only_one_block(memorised_models):
    model = CASES["Llama"].build()
    logits, gradients = logits_and_gradients(model)
    with offload_blocks(model, "cuda"):
        allocated_bytes = torch.cuda.memory_allocated()
        offloaded_logits = model(input_ids=IDS.cuda(), use_cache=False).logits
        offloaded_logits.square().mean().backward()
        assert allocated_bytes < sum(4 * p.numel() for p in model.parameters())
        for block in transformer_blocks(model):
            assert {p.device.type for p in block.parameters()} == {"cpu"}
            assert {p.grad.device.type for p in block.parameters()} == {"cpu"}
    torch.testing.assert_close(offloaded_logits.cpu(), logits, rtol=1e-3, atol=1e-4)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        torch.testing.assert_close(parameter.grad.cpu(), gradients[name], rtol=1e-2, atol=1e-5)
