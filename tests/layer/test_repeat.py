"""What a layer keeps ready from call to call never shows in a product."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from lm_ortho.kernels import cpu, dispatch

from lm_ortho import kernels
from lm_ortho.layer import OrthoLinear, alpha_scope
from lm_ortho.streams import OrthoStream
from tests.support import tiny

WIDTH = 192
KERNELS = [
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(isinstance(cpu.find(), cpu.Absent), reason="no CPU kernel")),
]


def layer(kernel, **options):
    made = OrthoLinear.from_streams(tiny.layer_streams(torch.randn(96, WIDTH), **options), torch.bfloat16)
    made.kernel = kernel
    return made


def unused(made):
    """The same layer that was never called."""
    fresh = copy.deepcopy(made)
    assert not fresh._bound
    assert not fresh._operands
    return fresh


def second(made):
    first = made.streams().ortho
    support = (torch.rand(first.shape) < 0.2) & ~first.support()
    return OrthoStream.from_dense(torch.randn(first.shape), support)


CHANGES = {
    "scales": lambda made: made.scales.mul_(2),
    "codes": lambda made: made.qweight.bitwise_not_(),
    "values": lambda made: made.ortho_vals.neg_(),
    "bias": lambda made: made.bias.add_(1),
    "another bias": lambda made: setattr(made, "bias", torch.ones(96)),
    "no bias": lambda made: setattr(made, "bias", None),
    "another ortho stream": lambda made: made.set_ortho(OrthoStream.empty(made.shape)),
    "one memory more": lambda made: made.set_ortho(second(made), "other"),
    "state": lambda made: made.load_state_dict(layer("auto", density=0.3, bias=torch.ones(96)).state_dict()),
    "assigned state": lambda made: made.load_state_dict(
        layer("auto", density=0.3, bias=torch.ones(96)).state_dict(), assign=True
    ),
    "kernel": lambda made: setattr(made, "kernel", "auto"),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_call(kernel, change):
    made = layer(kernel, bias=torch.randn(96), density=0.1)
    one, many = torch.randn(1, WIDTH).bfloat16(), torch.randn(2, 5, WIDTH).bfloat16()
    with torch.no_grad(), alpha_scope(0.5):
        for x in (one, many, one, many):
            made(x)
        assert made._bound
        CHANGES[change](made)
        for x in (one, many):
            wanted = unused(made)(x)
            for _ in range(2):
                assert torch.equal(made(x), wanted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_alpha_dtype_and_place_are_asked_anew(kernel):
    made = layer(kernel, bias=torch.randn(96), density=0.1)
    x = torch.randn(3, WIDTH).bfloat16()
    for alpha in (0.0, 1.0, 0.25, 0.0, torch.tensor([0.0, 1.0, 0.5]), 1.0, {"memory": 0.5}):
        with torch.no_grad(), alpha_scope(alpha):
            assert torch.equal(made(x), unused(made)(x))
            assert made(x.float()).dtype == torch.float32
            assert torch.equal(made(x), unused(made)(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert made(x.float()).dtype == unused(made)(x.float()).dtype
            turned = x.repeat(1, 2)[:, ::2].contiguous().t().contiguous().t()
            assert torch.equal(made(turned), unused(made)(turned))
    with alpha_scope(1.0):
        x = x.float().requires_grad_()
        made(x.detach())
        made(x).sum().backward()
    assert x.grad is not None
    made.to("meta")
    assert made(x.to("meta")).device.type == "meta"


@KERNELS[1].marks[0]
def test_what_the_kernel_cannot_do_goes_elsewhere_although_it_was_ready(monkeypatch):
    made = layer("cpu", bias=torch.randn(96))
    x = torch.randn(2, WIDTH).bfloat16()

    def ran(x):
        kernels.reset_calls()
        made(x)
        return {name.partition(".")[0] for name in kernels.calls()}

    with torch.no_grad():
        assert ran(x) == ran(x) == {"cpu"}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ran(x) == {"reference"}
        with torch.device("meta"):  # the default for new tensors, not where x is
            assert ran(x) == {"cpu"}
            assert made(x).device.type == "cpu"
        made.kernel = "reference"
        assert ran(x) == {"reference"}
        made.kernel = "cpu"
        assert ran(x) == {"cpu"}
    assert ran(x.clone().requires_grad_()) == {"reference"}
    with torch.no_grad():
        assert ran(x) == ran(x) == {"cpu"}
        monkeypatch.setattr(kernels.Cpu, "refuses", lambda *_: "not today")
        assert ran(x) == {"cpu"}, "decisions hold until they are forgotten"
        dispatch.forget_decisions()
        assert ran(x) == {"reference"}
    monkeypatch.undo()
    dispatch.forget_decisions()


def test_a_layer_that_was_saved_before_products_were_kept_ready():
    made = layer("reference")
    state = {name: part for name, part in made.__getstate__().items() if name != "_bound"}
    again = OrthoLinear.__new__(OrthoLinear)
    again.__setstate__(state)
    x = torch.randn(1, WIDTH).bfloat16()
    with torch.no_grad():
        assert torch.equal(again(x), made(x))


def test_an_inference_mode_bias_is_read_every_time():
    made = layer("reference", bias=torch.zeros(96))
    x = torch.randn(1, WIDTH)
    with torch.inference_mode():
        made.bias = torch.zeros(96)
        before = made(x)
        made.bias.add_(1)
        torch.testing.assert_close(made(x), before + 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_repeated_product_counts_and_copies_hold_nothing(kernel):
    made = layer(kernel)
    x = torch.randn(1, WIDTH).bfloat16()
    kernels.reset_calls()
    with torch.no_grad(), alpha_scope(1.0):
        first, again = made(x), made(x)
    assert torch.equal(first, again)
    assert first.data_ptr() != again.data_ptr()
    assert set(kernels.calls().values()) == {2}
    assert torch.equal(pickle.loads(pickle.dumps(made)).ortho_vals, made.ortho_vals)


def test_no_operand_outlives_the_tensors_it_was_made_of():
    made = layer("reference")
    with torch.no_grad(), alpha_scope(1.0):
        for rows in (1, 2):
            made(torch.randn(rows, WIDTH).bfloat16())
        kept = weakref.ref(made._operands["reference", None].made)
        made.scales.mul_(2)
        made(torch.randn(3, WIDTH).bfloat16())
        gc.collect()
    assert kept() is None


def test_streams_that_were_replaced_are_not_kept_alive():
    made = layer("reference")
    kept = []
    with torch.no_grad():
        for rows in range(1, 6):
            kept.append(weakref.ref(made.ortho_vals))
            made(torch.randn(rows, WIDTH).bfloat16())
            made.set_ortho(OrthoStream.from_dense(torch.randn(made.shape), torch.rand(made.shape) < 0.1))
        made(torch.randn(1, WIDTH).bfloat16())
        gc.collect()
    assert [each() is None for each in kept] == [True] * len(kept)


def test_prompts_of_many_lengths_do_not_pile_up():
    made = layer("reference")
    with torch.no_grad():
        for rows in range(1, 60):
            made(torch.randn(rows, WIDTH).bfloat16())
    assert len(made._bound) <= 16
