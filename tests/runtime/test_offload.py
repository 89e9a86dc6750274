"""An offloaded model has the same outputs, gradients and decomposition as one in a single place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lm_ortho.calibration.activations import input_moments
from lm_ortho.calibration.by_layer import InputMoments
from lm_ortho.config import make_recipe, make_spec
from lm_ortho.data.encoding import encode
from lm_ortho.data.logits import compute_logits, selected_logits
from lm_ortho.errors import UserError
from lm_ortho.finetune import FinetunePlan, train_adapter
from lm_ortho.layer import find_linear, get_streams, linear_form
from lm_ortho.objective import surrogate_training
from lm_ortho.pipeline import build
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.pipeline.spec import resolve
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


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_logits_at_a_mask_and_their_gradients_are_the_same(name):
    """The output embedding is outside the blocks: it computes on the device, at the positions of the mask only."""
    model = CASES[name].build()
    mask = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.4

    def masked_logits_and_gradients():
        logits = compute_logits(model, IDS, mask)
        logits.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return logits.detach(), gradients

    with linear_form(model):
        whole_logits, expected_gradients = masked_logits_and_gradients()
        with offload_blocks(model, "cpu"), selected_logits(model):
            logits, gradients = masked_logits_and_gradients()
    assert logits.shape == (int(mask.sum()), whole_logits.shape[-1])
    torch.testing.assert_close(logits, whole_logits, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma 2", "GPT-NeoX"])
def test_everything_that_a_pass_reads_is_on_the_device(name, monkeypatch):
    """On another device than the CPU a tensor that stayed there would raise; the device ``meta`` needs no hardware."""
    model = CASES[name].build()

    def move_to_meta(tensors, device):  # ``data`` of a parameter cannot be set to a tensor of this device
        for module in tensors._modules:
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.to(device))
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(device)

    monkeypatch.setattr(offload._NonBlockTensors, "move_to", move_to_meta)
    monkeypatch.setattr(offload._NonBlockTensors, "move_back", lambda self: None)  # nothing comes back from ``meta``
    # transformers would read whether positions start again inside a row.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with linear_form(model), offload_blocks(model, "meta"), torch.no_grad():
        for block in transformer_blocks(model):
            assert {p.device.type for p in block.parameters()} == {"cpu"}
        logits = compute_logits(model, IDS.to("meta"))
    assert logits.device.type == "meta"
    assert logits.shape[:2] == IDS.shape


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


def test_the_command_offloads_both_models(home):
    """``lm-ortho decompose --offload``, with blocks that are fetched to the CPU in the place of a GPU."""
    files = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    recipe = {"sieve": "residual", "projection": "rtn", "edit": "w0", "density": 0.02, "group_size": 16}
    plain = str(home / "plain")
    resolved = resolve(make_spec(recipe, pretrained=plain, base=plain, force=True, **files))
    offloaded_models = []
    with pytest.MonkeyPatch.context() as patch:

        def record(model, device):
            offloaded_models.append(model)
            return offload_blocks(model, device)

        patch.setattr(build, "offload_blocks", record)
        expected, _, expected_meta = build.decompose_model(resolved, no_progress, device="cpu")
        assert not offloaded_models
        model, _, meta = build.decompose_model(resolved, no_progress, device="cpu", offload=True)
    assert len(offloaded_models) == 2
    assert not any(is_offloaded(network) for network in offloaded_models)
    assert meta == expected_meta
    for name, streams in get_streams(expected).items():
        for part, tensor in streams.tensors().items():
            assert torch.equal(get_streams(model)[name].tensors()[part], tensor), (name, part)


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
