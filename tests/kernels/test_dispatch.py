"""The choice of the kernel for a product of a layer; all kernels give the same product."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from lm_ortho import kernels
from lm_ortho.errors import UserError
from lm_ortho.kernels import Cpu, ProductSpec, Reference, choose, cpu, dispatch
from lm_ortho.layer import OrthoLinear, alpha_scope, choose_kernels, ortho_layers, patch, set_alpha, set_kernel
from tests.support import tiny

needs_cpu_kernel = pytest.mark.skipif(
    isinstance(cpu.find(), cpu.MissingLibrary), reason="the CPU kernel is not available"
)
LARGE = ProductSpec(
    device="cpu", dtype=torch.bfloat16, rows=1, out_features=4096, in_features=4096, bits=4, group_size=64
)


@pytest.fixture(autouse=True)
def fresh_choices():
    dispatch.forget_choices()
    yield
    dispatch.forget_choices()


def make_layer(out=1024, width=1024, kernel="auto", **options):
    layer = OrthoLinear.from_streams(tiny.layer_streams(torch.randn(out, width), **options), torch.bfloat16)
    layer.kernel = kernel
    return layer


@needs_cpu_kernel
def test_auto_chooses_the_fast_kernel_for_large_layers_in_bf16_only():
    assert choose("auto", LARGE).implementation.name == "cpu"
    for change, reason in (
        ({"dtype": torch.float32}, "not BF16 inference"),
        ({"grad": True}, "not BF16 inference"),
        ({"autocast": True}, "not BF16 inference"),
        ({"bits": 16}, "not BF16 inference"),
        ({"in_features": 100}, "fewer than 1048576 weights"),
    ):
        choice = choose("auto", LARGE._replace(**change))
        assert choice.implementation.name == "reference"
        assert reason in choice.reason


@needs_cpu_kernel
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "it takes bfloat16"),
        ({"device": "cuda"}, "it is for CPUs"),
        ({"bits": 16}, "a dense matrix"),
        ({"grad": True}, "no gradients"),
        ({"autocast": True}, "autocast"),
    ],
)
def test_a_named_kernel_that_refuses_is_replaced_with_one_warning(change, reason, caplog):
    spec = LARGE._replace(**change)
    with caplog.at_level(logging.WARNING):
        choices = [choose("cpu", spec) for _ in range(3)]
    assert {choice.implementation.name for choice in choices} == {"reference"}
    assert reason in choices[0].reason
    assert [reason in record.message for record in caplog.records] == [True]
    assert choose("cpu", LARGE).implementation.name == "cpu"


def test_unknown_and_double_names():
    with pytest.raises(ValueError, match="kernel='fast' is unknown; known: auto, reference, cpu, triton"):
        choose("fast", LARGE)
    with pytest.raises(ValueError, match="registered already"):
        kernels.register(Cpu())

    class Other(Reference):
        name = "other"

    with pytest.raises(ValueError, match="no place in the order"):
        kernels.register(Other())
    with pytest.raises(UserError, match="kernel='fast' is unknown"):
        set_kernel(torch.nn.Linear(2, 2), "fast")


@needs_cpu_kernel
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (2, 9), (1, 40)])
def test_both_kernels_give_the_same_product(bits, shape):
    layer = make_layer(96, 200, bits=bits, bias=torch.randn(96))
    x = torch.randn(*shape, 200).bfloat16()
    for alpha in (0.0, 0.4, 1.0, torch.linspace(0, 1, shape[0])):
        results = {}
        for name in ("reference", "cpu"):
            layer.kernel = name
            kernels.reset_calls()
            with torch.no_grad(), alpha_scope(alpha):
                results[name] = layer(x)
            assert all(call.startswith(name) for call in kernels.calls())
        assert results["cpu"].shape == (*shape, 96)
        largest_value = results["reference"].float().abs().max()
        torch.testing.assert_close(results["cpu"], results["reference"], rtol=0.02, atol=0.02 * largest_value.item())


@needs_cpu_kernel
def test_several_memories_each_with_its_alpha():
    layer = make_layer(64, 128, kernel="cpu", density=0.1)
    first = layer.streams().ortho
    support = (torch.rand(64, 128) < 0.1) & ~first.support()
    layer.set_ortho(type(first).from_dense(torch.randn(64, 128), support), "second")
    x = torch.randn(3, 128).bfloat16()
    alphas = {"memory": [0.0, 1.0, 0.5], "second": [0.0, 0.25, 0.0]}
    with torch.no_grad(), alpha_scope(alphas):
        batch_output = layer(x)
    for row in range(3):
        with torch.no_grad(), alpha_scope({name: values[row] for name, values in alphas.items()}):
            assert torch.equal(layer(x[row : row + 1])[0], batch_output[row])
    with torch.no_grad(), alpha_scope(0.0):
        assert torch.equal(layer(x[:1])[0], batch_output[0])


@needs_cpu_kernel
def test_gradients_still_flow_and_the_fast_kernel_comes_back():
    layer = make_layer(kernel="cpu")
    x = torch.randn(2, 1024).bfloat16().requires_grad_()
    kernels.reset_calls()
    layer(x).sum().backward()
    assert x.grad is not None
    layer(x.detach())
    assert kernels.calls() == {"reference.base": 1, "cpu.small": 1}


@needs_cpu_kernel
def test_no_dense_copy_is_stored_and_a_change_is_noticed():
    layer = make_layer(kernel="cpu")
    x = torch.randn(1, 1024).bfloat16()
    with torch.inference_mode(), alpha_scope(1.0):
        before = layer(x)
    operand_bytes = sum(
        operand.value.numel() * operand.value.element_size() for operand in layer._cache.operands.values()
    )
    assert operand_bytes < 1.3 * layer.streams().nbytes()
    layer.scales.mul_(2)
    with torch.inference_mode():
        assert not torch.equal(layer(x), before)
    again = make_layer(kernel="cpu")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


@needs_cpu_kernel
def test_a_compiled_layer():
    layer = make_layer(kernel="cpu")
    x = torch.randn(2, 1024).bfloat16()
    with torch.no_grad(), alpha_scope(1.0):
        layer(x)  # packs the streams, which cannot be part of a graph
    compiled_layer = torch.compile(layer, backend="aot_eager")
    with torch.no_grad():
        for alpha in (0.0, 0.5):
            with alpha_scope(alpha):
                assert torch.equal(compiled_layer(x), layer(x))


@needs_cpu_kernel
def test_another_thread_that_sets_alpha_does_not_change_a_generation():
    model = tiny.llama(vocab_size=64).to(torch.bfloat16)
    names = [name for name, module in model.named_modules() if name.endswith("_proj")]
    patch(model, {name: tiny.layer_streams(model.get_submodule(name).weight.float(), density=0.2) for name in names})
    set_kernel(model, "cpu")
    assert {choice.implementation.name for choice in choose_kernels(model, torch.bfloat16).values()} == {"cpu"}
    prompt = torch.arange(2, 8).repeat(3, 1)
    options = {"max_new_tokens": 24, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def generate():
        return torch.stack(model.generate(prompt, **options).logits)

    logits_by_alpha = {}
    for alpha in (0.0, 1.0):
        set_alpha(model, alpha)
        logits_by_alpha[alpha] = generate()
    assert not torch.equal(logits_by_alpha[0.0], logits_by_alpha[1.0])
    alpha_was_set, steps = threading.Event(), []

    def set_alpha_in_thread(module, arguments):
        steps.append(None)
        if len(steps) == 5:
            thread = threading.Thread(target=lambda: (set_alpha(model, 0.0), alpha_was_set.set()))
            thread.start()
            thread.join()

    set_alpha(model, 1.0)
    hook = next(iter(ortho_layers(model).values())).register_forward_pre_hook(set_alpha_in_thread)
    kernels.reset_calls()
    assert torch.equal(generate(), logits_by_alpha[1.0])
    hook.remove()
    assert alpha_was_set.is_set()
    assert all(name.startswith("cpu.") for name in kernels.calls())
    assert torch.equal(generate(), logits_by_alpha[0.0])
