"""Operands that do not fit are refused by every kernel before it reads them, and by the C++ entry points again."""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_ortho.kernels import StoredBase, StoredOrtho, base_operand, check_codes, cpu, pack_codes, sparse_operand
from lm_ortho.kernels.cuda import layout
from lm_ortho.kernels.implementations import Cpu, Reference

OUT, IN, GROUP = 70, 40, 8
has_library = isinstance(cpu.find(), cpu.Library)
needs_library = pytest.mark.skipif(not has_library, reason="the CPU kernel is not available")
KERNELS = [pytest.param(Cpu(), marks=needs_library), Reference()]


def make_base(**changes):
    qweight = pack_codes(torch.zeros(OUT, IN, dtype=torch.int8), 4)
    parts = {"qweight": qweight, "scales": torch.ones(OUT, IN // GROUP, dtype=torch.bfloat16), **changes}
    return StoredBase(**parts, bits=4, group_size=GROUP, in_features=IN)


def make_ortho(rowptr=None, cols=None, vals=None):
    rowptr = torch.arange(OUT + 1, dtype=torch.int64) if rowptr is None else rowptr
    nnz = OUT
    cols = torch.arange(nnz, dtype=torch.int32) % IN if cols is None else cols
    return StoredOrtho(rowptr, cols, torch.ones(nnz, dtype=torch.bfloat16) if vals is None else vals, IN)


@pytest.mark.parametrize("kernel", KERNELS)
def test_good_operands_are_made(kernel):
    kernel.base(make_base(), torch.bfloat16)
    kernel.ortho(make_ortho(), torch.bfloat16)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "changes",
    [
        {"scales": torch.ones(OUT, IN // GROUP, dtype=torch.uint8)},
        {"scales": torch.ones(OUT, IN // GROUP).to(torch.float8_e5m2)},
        {"scales": torch.ones(OUT, IN // GROUP)},
        {"scales": torch.ones(OUT - 1, IN // GROUP, dtype=torch.bfloat16)},
        {"scales": torch.ones(IN // GROUP, OUT, dtype=torch.bfloat16).t()},
        {"qweight": torch.zeros(OUT, IN // 2 - 4, dtype=torch.uint8)},
        {"qweight": torch.zeros(OUT, IN // 2, dtype=torch.bool)},
        {"qweight": torch.zeros(1, IN // 2, dtype=torch.uint8).expand(OUT, -1)},
    ],
)
def test_bases_that_do_not_fit(kernel, changes):
    with pytest.raises(ValueError, match=r"qweight|scales"):
        kernel.base(make_base(**changes), torch.bfloat16)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "rowptr",
    [
        torch.arange(OUT + 1) + 1,
        torch.arange(OUT + 1).flip(0),
        torch.full((OUT + 1,), OUT).index_fill_(0, torch.tensor([0]), 0).index_fill_(0, torch.tensor([5]), -1),
        torch.tensor([0, 2**63 - 1, -2, *([OUT] * (OUT - 2))]),  # differences in int64: positive
        torch.tensor([0] * OUT + [2**40]),
    ],
)
def test_row_pointers_that_do_not_rise(kernel, rowptr):
    with pytest.raises(ValueError, match="rowptr must rise"):
        kernel.ortho(make_ortho(rowptr=rowptr), torch.bfloat16)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("column", [-1, IN, 2**31 - 1, -(2**31)])
def test_columns_outside_the_matrix(kernel, column):
    cols = make_ortho().cols.clone()
    cols[7] = column
    with pytest.raises(ValueError, match="cols"):
        kernel.ortho(make_ortho(cols=cols), torch.bfloat16)


def test_the_layout_for_gpus_is_made_of_checked_tensors():
    base, ortho = make_base(), make_ortho()
    layout.prepare(base.qweight, base.scales, [ortho[:3]], in_features=IN, group_size=GROUP)
    with pytest.raises(ValueError, match="rowptr must rise"):
        layout.ortho_words([(ortho.rowptr + 1, ortho.cols, ortho.vals)], IN)
    with pytest.raises(ValueError, match="scales must be"):
        layout.prepare(base.qweight, base.scales.byte(), in_features=IN, group_size=GROUP)


def test_lattices_that_do_not_exist():
    base = make_base()
    for change in ({"bits": 5}, {"bits": 4.0}, {"group_size": 0}, {"group_size": 12}, {"in_features": 0}):
        with pytest.raises(ValueError, match=r"bits|group_size|in_features"):
            check_codes(base.qweight, base.scales, **{"bits": 4, "group_size": GROUP, "in_features": IN, **change})
    with pytest.raises(ValueError, match="for 41 in_features"):
        base_operand(torch.zeros(3, 40), None, bits=16, group_size=8, in_features=41)
    with pytest.raises(ValueError, match="rowptr"):
        sparse_operand(torch.zeros(3), torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.bfloat16), IN)


@needs_library
class TestEntryPoints:
    """The C functions themselves, as a caller that checks nothing would use them."""

    @staticmethod
    def make_sheets(rowptr, cols, vals, rows, nnz, in_features=IN):
        functions = cpu.require_library().functions
        handle, size = ctypes.c_void_p(), ctypes.c_int64()
        pointers = (rowptr.data_ptr(), int(rowptr.dtype == torch.int64), cols.data_ptr(), vals.data_ptr())
        status = functions.lm_ortho_make_sheets(
            *pointers, rows, nnz, in_features, ctypes.byref(handle), ctypes.byref(size)
        )
        if status == 0:
            out = torch.zeros(size.value, dtype=torch.uint8)
            assert functions.lm_ortho_take_sheets(handle, out.data_ptr(), out.numel()) == 0
        return status

    def test_row_pointers_and_columns(self):
        rowptr, cols, vals, _ = make_ortho()
        assert self.make_sheets(rowptr, cols, vals, OUT, OUT) == 0
        assert self.make_sheets(rowptr.int(), cols, vals, OUT, OUT) == 0
        assert self.make_sheets(rowptr, cols, vals, OUT, OUT - 1) == 4
        assert self.make_sheets(rowptr.flip(0), cols, vals, OUT, OUT) == 4
        assert self.make_sheets(rowptr, cols, vals, OUT, OUT, in_features=39) == 5
        assert self.make_sheets(rowptr, cols - 1, vals, OUT, OUT) == 5
        assert self.make_sheets(rowptr, cols, vals, 0, OUT) == 3
        wrapping = torch.tensor([0, 2**63 - 1, -2, 0])
        assert self.make_sheets(wrapping, cols[:0], vals[:0], 3, 0) == 4, "no value, but pointers far outside"

    def test_sizes_of_a_base(self):
        functions = cpu.require_library().functions
        codes, scales = torch.zeros(OUT, IN, dtype=torch.int8), torch.ones(OUT, IN // GROUP, dtype=torch.bfloat16)
        panels = torch.zeros(2 * 5 * (128 + 256), dtype=torch.uint8)

        def pack(**changes):
            sizes = {"codes": codes.numel(), "scales": scales.numel(), "rows": OUT, "width": IN, "group": GROUP}
            sizes |= {"planes": 1, "out": panels.numel(), **changes}
            n_codes, n_scales, *form, out_bytes = sizes.values()
            pointers = codes.data_ptr(), scales.data_ptr(), panels.data_ptr()
            return functions.lm_ortho_pack_base(
                pointers[0], n_codes, pointers[1], n_scales, *form, pointers[2], out_bytes
            )

        assert pack() == 0
        for change in (
            {"codes": codes.numel() - 1},
            {"scales": scales.numel() // 2},
            {"rows": OUT + 64},
            {"rows": -1},
            {"width": 0},
            {"width": IN + 4},
            {"group": 0},
            {"group": 12},
            {"planes": 3},
            {"out": panels.numel() - 1},
            {"rows": 2**62, "codes": 0, "scales": 0},
        ):
            assert pack(**change) == 3, change

    @settings(max_examples=200)
    @given(st.integers(0, 2**30), st.data())
    def test_damaged_sheets_are_refused_or_harmless(self, seed, data):
        sheets = cpu.pack_sheets(*make_ortho())
        place = data.draw(st.integers(0, min(sheets.numel(), 200) - 1) | st.integers(0, sheets.numel() - 1))
        sheets[place] = data.draw(st.integers(0, 255))
        base = cpu.pack_base(*make_base()[:4])
        x = torch.ones(3, IN, dtype=torch.bfloat16)
        form = {"out_features": OUT, "bits": 4, "group_size": GROUP}
        with contextlib.suppress(ValueError):
            assert cpu.cpu_linear(x, base, [sheets], [torch.ones(1)], None, **form).shape == (3, OUT)
            cpu.check_sheets(sheets, OUT, IN)  # the product takes only what this check accepts

    def test_operands_of_another_layer(self):
        sheets, base = cpu.pack_sheets(*make_ortho()), cpu.pack_base(*make_base()[:4])
        x = torch.ones(3, IN, dtype=torch.bfloat16)
        form = {"out_features": OUT, "bits": 4, "group_size": GROUP}
        cases = [
            (x[:, :32], base, [sheets], form),
            (x, base[:-64], [sheets], form),
            (x, base.view(torch.int8), [sheets], form),
            (x, base, [sheets[:-1]], form),
            (x, base, [sheets[:0]], form),
            (x, base, [cpu.pack_sheets(*make_ortho()).view(torch.int8)], form),
            (x, base, [sheets], {**form, "out_features": OUT + 64}),
        ]
        cpu.cpu_linear(x, base, [sheets], [torch.ones(1)], None, **form)
        for rows, own_base, own_sheets, own_form in cases:
            with pytest.raises(ValueError, match=r"base|sheets|packed"):
                cpu.cpu_linear(rows, own_base, own_sheets, [torch.ones(1)], None, **own_form)

    def test_a_bound_product_refuses_another_x(self):
        from lm_ortho.kernels.cpu.op import bind_linear

        x, base = torch.ones(3, IN, dtype=torch.bfloat16), cpu.pack_base(*make_base()[:4])
        product = bind_linear(x, base, [], [], None, out_features=OUT, bits=4, group_size=GROUP)
        assert product(x).shape == (3, OUT)
        for other in (x[:2], x.repeat(2, 1), x.to(torch.float8_e5m2), x[:0]):
            with pytest.raises(ValueError, match=r"another size|bfloat16"):
                product(other)
