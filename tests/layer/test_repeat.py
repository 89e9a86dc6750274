"""The cache of a layer (operands, bound products) never changes a result."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from lm_ortho import kernels
from lm_ortho.kernels import cpu, dispatch
from lm_ortho.layer import OrthoLinear, alpha_scope, operands
from lm_ortho.streams import OrthoStream
from tests.support import tiny

WIDTH = 192
needs_cpu_kernel = pytest.mark.skipif(isinstance(cpu.find(), cpu.MissingLibrary), reason="no CPU kernel")
KERNELS = [
    "reference",
    pytest.param("cpu", marks=needs_cpu_kernel),
]


def make_layer(kernel, **options):
    layer = OrthoLinear.from_streams(tiny.layer_streams(torch.randn(96, WIDTH), **options), torch.bfloat16)
    layer.kernel = kernel
    return layer


def copy_uncalled(layer):
    """A copy of the layer with an empty cache."""
    fresh = copy.deepcopy(layer)
    assert not fresh._cache.products
    assert not fresh._cache.operands
    return fresh


def make_second_stream(layer):
    first = layer.streams().ortho
    support = (torch.rand(first.shape) < 0.2) & ~first.support()
    return OrthoStream.from_dense(torch.randn(first.shape), support)


CHANGES = {
    "scales": lambda layer: layer.scales.mul_(2),
    "codes": lambda layer: layer.qweight.bitwise_not_(),
    "values": lambda layer: layer.ortho_vals.neg_(),
    "bias": lambda layer: layer.bias.add_(1),
    "another bias": lambda layer: setattr(layer, "bias", torch.ones(96)),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "another ortho stream": lambda layer: layer.set_ortho(OrthoStream.empty(layer.shape)),
    "another memory": lambda layer: layer.set_ortho(make_second_stream(layer), "other"),
    "state": lambda layer: layer.load_state_dict(make_layer("auto", density=0.3, bias=torch.ones(96)).state_dict()),
    "assigned state": lambda layer: layer.load_state_dict(
        make_layer("auto", density=0.3, bias=torch.ones(96)).state_dict(), assign=True
    ),
    "kernel": lambda layer: setattr(layer, "kernel", "auto"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_call(kernel, change):
    layer = make_layer(kernel, bias=torch.randn(96), density=0.1)
    one, many = torch.randn(1, WIDTH).bfloat16(), torch.randn(2, 5, WIDTH).bfloat16()
    with torch.no_grad(), alpha_scope(0.5):
        for x in (one, many, one, many):
            layer(x)
        assert layer._cache.products
        CHANGES[change](layer)
        for x in (one, many):
            uncached_output = copy_uncalled(layer)(x)
            for _ in range(2):
                assert torch.equal(layer(x), uncached_output)


@pytest.mark.parametrize("kernel", KERNELS)
def test_alpha_dtype_and_strides_are_read_at_every_call(kernel):
    layer = make_layer(kernel, bias=torch.randn(96), density=0.1)
    x = torch.randn(3, WIDTH).bfloat16()
    for alpha in (0.0, 1.0, 0.25, 0.0, torch.tensor([0.0, 1.0, 0.5]), 1.0, {"memory": 0.5}):
        with torch.no_grad(), alpha_scope(alpha):
            assert torch.equal(layer(x), copy_uncalled(layer)(x))
            assert layer(x.float()).dtype == torch.float32
            assert torch.equal(layer(x), copy_uncalled(layer)(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x.float()).dtype == copy_uncalled(layer)(x.float()).dtype
            transposed_x = x.repeat(1, 2)[:, ::2].contiguous().t().contiguous().t()
            assert torch.equal(layer(transposed_x), copy_uncalled(layer)(transposed_x))
    with alpha_scope(1.0):
        x = x.float().requires_grad_()
        layer(x.detach())
        layer(x).sum().backward()
    assert x.grad is not None
    layer.to("meta")
    assert layer(x.to("meta")).device.type == "meta"


@needs_cpu_kernel
def test_a_bound_product_falls_back_where_its_kernel_refuses(monkeypatch):
    layer = make_layer("cpu", bias=torch.randn(96))
    x = torch.randn(2, WIDTH).bfloat16()

    def run_kernels(x):
        kernels.reset_calls()
        layer(x)
        return {name.partition(".")[0] for name in kernels.calls()}

    with torch.no_grad():
        assert run_kernels(x) == run_kernels(x) == {"cpu"}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert run_kernels(x) == {"reference"}
        with torch.device("meta"):  # the default for new tensors, not the device of x
            assert run_kernels(x) == {"cpu"}
            assert layer(x).device.type == "cpu"
        layer.kernel = "reference"
        assert run_kernels(x) == {"reference"}
        layer.kernel = "cpu"
        assert run_kernels(x) == {"cpu"}
    assert run_kernels(x.clone().requires_grad_()) == {"reference"}
    with torch.no_grad():
        assert run_kernels(x) == run_kernels(x) == {"cpu"}
        monkeypatch.setattr(kernels.Cpu, "refuses", lambda *_: "refused by the test")
        assert run_kernels(x) == {"cpu"}, "choices stay cached until they are cleared"
        dispatch.forget_choices()
        assert run_kernels(x) == {"reference"}
    monkeypatch.undo()
    dispatch.forget_choices()


def test_a_pickled_state_of_an_older_version_loads():
    layer = make_layer("reference")
    state = {**layer.__getstate__(), "_operands": {}, "_bound": {}}
    again = OrthoLinear.__new__(OrthoLinear)
    again.__setstate__(state)
    x = torch.randn(1, WIDTH).bfloat16()
    with torch.no_grad():
        assert torch.equal(again(x), layer(x))


def test_an_inference_mode_bias_is_read_every_time():
    layer = make_layer("reference", bias=torch.zeros(96))
    x = torch.randn(1, WIDTH)
    with torch.inference_mode():
        layer.bias = torch.zeros(96)
        before = layer(x)
        layer.bias.add_(1)
        torch.testing.assert_close(layer(x), before + 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_repeated_product_is_counted_and_returns_new_memory(kernel):
    layer = make_layer(kernel)
    x = torch.randn(1, WIDTH).bfloat16()
    kernels.reset_calls()
    with torch.no_grad(), alpha_scope(1.0):
        first, again = layer(x), layer(x)
    assert torch.equal(first, again)
    assert first.data_ptr() != again.data_ptr()
    assert set(kernels.calls().values()) == {2}
    assert torch.equal(pickle.loads(pickle.dumps(layer)).ortho_vals, layer.ortho_vals)


def test_operands_are_freed_with_their_source_tensors():
    layer = make_layer("reference")
    references = []
    with torch.no_grad():
        for alpha in (0.0, 1.0):
            with alpha_scope(alpha):
                for rows in (1, 2):
                    layer(torch.randn(rows, WIDTH).bfloat16())
        references = [weakref.ref(layer._cache.operands["reference", None].value)]
        references.append(weakref.ref(layer._cache.merged[1].value.weight))
        layer.scales.mul_(2)
        for alpha in (0.0, 1.0):
            with alpha_scope(alpha):
                layer(torch.randn(3, WIDTH).bfloat16())
        gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_streams_that_were_replaced_are_not_kept_alive():
    layer = make_layer("reference")
    references = []
    with torch.no_grad():
        for rows in range(1, 6):
            references.append(weakref.ref(layer.ortho_vals))
            layer(torch.randn(rows, WIDTH).bfloat16())
            layer.set_ortho(OrthoStream.from_dense(torch.randn(layer.shape), torch.rand(layer.shape) < 0.1))
        layer(torch.randn(1, WIDTH).bfloat16())
        gc.collect()
    assert [reference() is None for reference in references] == [True] * len(references)


def test_the_number_of_bound_products_is_limited():
    layer = make_layer("reference")
    with torch.no_grad():
        for rows in range(1, 60):
            layer(torch.randn(rows, WIDTH).bfloat16())
    assert len(layer._cache.products) <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_exported_weight_for_any_number_of_rows(dtype):
    """A sparse product for every call took a sixth longer, and in BF16 a third, than ``hf`` with that weight."""
    layer = make_layer("reference", bias=torch.randn(96), density=0.1)
    for alpha in (1.0, 0.3):
        weight, bias = layer.streams().to_dense(alpha, dtype), layer.bias.to(dtype)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-5}
        for x in (torch.randn(1, WIDTH).to(dtype), torch.randn(200, WIDTH).to(dtype)):
            with torch.no_grad(), alpha_scope(alpha):
                expected = torch.nn.functional.linear(x, weight, bias)
                torch.testing.assert_close(layer(x), expected, **tolerance)


def test_the_weight_is_merged_once_for_an_alpha_and_again_after_a_change():
    layer = make_layer("reference", density=0.1)
    merge, merge_count = kernels.Reference.merge, 0

    def count_merges(*arguments):
        nonlocal merge_count
        merge_count += 1
        return merge(*arguments)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(kernels.Reference, "merge", count_merges)
        for expected_count, alpha in ((1, 0.5), (2, 1.0)):
            for rows in (1, 7, 300):
                for _ in range(2):
                    with alpha_scope(alpha):
                        layer(torch.randn(rows, WIDTH))
            assert merge_count == expected_count
        layer.ortho_vals.mul_(2)
        x = torch.randn(1, WIDTH)
        with alpha_scope(1.0):
            torch.testing.assert_close(layer(x), x @ layer.streams().to_dense(1.0).T)
    assert merge_count == 3


def test_the_merged_weight_of_another_thread_is_never_returned(monkeypatch):
    """A thread with another alpha may replace the merged weight between the check of it and its use."""
    layer, x = make_layer("reference", density=0.1), torch.randn(3, WIDTH)
    replaced, fits = [], operands.CachedOperand.fits

    def replace_after_check(operand, dtype, sources):
        result = fits(operand, dtype, sources)
        if not replaced and layer._cache.merged is not None:
            replaced.append(True)
            with alpha_scope(1.0):
                layer(torch.randn(5, WIDTH))
        return result

    with torch.no_grad(), alpha_scope(0.5):
        layer(torch.randn(2, WIDTH))
        monkeypatch.setattr(operands.CachedOperand, "fits", replace_after_check)
        torch.testing.assert_close(layer(x), x @ layer.streams().to_dense(0.5).T)
    assert replaced
