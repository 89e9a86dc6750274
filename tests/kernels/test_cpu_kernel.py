"""The C++ kernel against double precision, on every instruction set of this processor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_ortho import kernels
from lm_ortho.kernels import cpu
from lm_ortho.streams import BaseStream, OrthoStream, code_range

LIBRARY = cpu.find()
ISAS = LIBRARY.isas if isinstance(LIBRARY, cpu.Library) else ()
pytestmark = pytest.mark.skipif(not ISAS, reason=f"the CPU kernel is not available: {getattr(LIBRARY, 'reason', '')}")
BOUND = 1e-5
"""Largest error as a fraction of the sum of absolute products, before the result is rounded."""
seeds = st.integers(0, 2**31 - 1)
fewer_examples = settings(max_examples=60)


class Case:
    """One random layer with any number of ortho streams, packed and in double precision."""

    def __init__(self, out, width, bits=4, group=64, shares=(0.05,), seed=0, bias=True):
        self.random = torch.Generator().manual_seed(seed)
        self.out, self.width, self.bits, self.group = out, width, bits, group
        low, high = code_range(bits)
        codes = torch.randint(low, high + 1, (out, width), generator=self.random)
        scales = torch.rand(out, -(-width // group), generator=self.random)
        base = BaseStream.from_codes(codes, scales, bits, group)
        self.weight = base.dequantise(torch.float64)
        self.base = cpu.pack_base(base.qweight, base.scales, bits, group)
        self.bias = torch.randn(out, generator=self.random) if bias else None
        self.deltas, self.sheets = [], []
        free = torch.ones(out, width, dtype=torch.bool)
        for share in shares:
            support = (torch.rand(out, width, generator=self.random) < share) & free
            support[1::5] = False
            self.add(OrthoStream.from_dense(torch.randn(out, width, generator=self.random), support))
            free &= ~support

    def add(self, ortho):
        self.deltas.append(ortho.to_dense(torch.float64))
        self.sheets.append(cpu.pack_sheets(ortho.rowptr, ortho.cols, ortho.vals, ortho.shape[1]))

    def x(self, rows):
        return torch.randn(rows, self.width, generator=self.random).bfloat16()

    def run(self, x, alphas=(), isa="", wide=True, sheets=None):
        sheets = self.sheets[: len(alphas)] if sheets is None else sheets
        form = {"out_features": self.out, "bits": self.bits, "group_size": self.group}
        return cpu.cpu_linear(x, self.base, sheets, list(alphas), self.bias, **form, isa=isa, wide=wide)

    def compute_expected(self, x, alphas=()):
        """The product and the sum of absolute products, both float64."""
        wide, bias = x.double(), 0 if self.bias is None else self.bias.double()
        y, size = wide @ self.weight.t() + bias, wide.abs() @ self.weight.abs().t()
        for alpha, deltas in zip(alphas, self.deltas, strict=False):
            y = y + alpha.double().view(-1, 1) * (wide @ deltas.t())
            size = size + wide.abs() @ deltas.abs().t()
        return y, size + 1e-30 + (0 if self.bias is None else bias.abs())

    def check(self, x, alphas=(), isa=""):
        y, size = self.compute_expected(x, alphas)
        y_kernel = self.run(x, alphas, isa)
        assert y_kernel.dtype == torch.float32
        largest_error = ((y_kernel.double() - y).abs() / size).max().item()
        assert largest_error <= BOUND, f"{isa}: {largest_error}"
        return y_kernel


@fewer_examples
@given(
    st.integers(1, 150),
    st.integers(1, 400),
    st.sampled_from([3, 4, 8]),
    st.sampled_from([8, 40, 64, 128]),
    st.sampled_from([(), (0.0,), (0.02,), (1.0,), (0.05, 0.3)]),
    st.sampled_from([1, 2, 3, 5, 6, 7, 8, 13, 16, 17, 32, 33, 70]),
    st.booleans(),
    seeds,
)
def test_against_double_precision(out, width, bits, group, shares, rows, bias, seed):
    case = Case(out, width, bits, group, shares=shares, seed=seed, bias=bias)
    alphas = [torch.rand(rows, generator=case.random) for _ in shares]
    x = case.x(rows)
    for isa in ISAS:
        case.check(x, alphas, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 9])
def test_70000_columns(isa, rows):
    case = Case(3, 70_000, shares=(0.01,))
    case.check(case.x(rows), [torch.ones(1)], isa)


@pytest.mark.parametrize("isa", ISAS)
def test_a_full_row_between_empty_rows(isa):
    case = Case(70, 500, shares=())
    support = torch.zeros(70, 500, dtype=torch.bool)
    support[17] = True
    support[40, 3] = support[69, 499] = True
    case.add(OrthoStream.from_dense(torch.randn(70, 500), support))
    for rows in (1, 4, 20):
        case.check(case.x(rows), [torch.full((1,), 0.7)], isa)


@fewer_examples
@given(st.integers(1, 130), st.integers(1, 300), st.integers(2, 70), st.sampled_from([4, 8]), seeds)
def test_a_row_has_the_same_bits_in_any_batch_and_alone(out, width, rows, bits, seed):
    """This holds across the paths for one row, small batches and prompts, and on any number of threads."""
    case = Case(out, width, bits, shares=(0.1, 0.05), seed=seed)
    alphas = [torch.rand(rows, generator=case.random).round(decimals=1) for _ in range(2)]
    x = case.x(rows)
    for isa in ISAS:
        batch_output = case.run(x, alphas, isa)
        for row in {0, rows // 2, rows - 1}:
            row_output = case.run(x[row : row + 1], [alpha[row : row + 1] for alpha in alphas], isa)
            assert torch.equal(batch_output[row : row + 1], row_output), isa
        order = torch.randperm(rows, generator=case.random)
        assert torch.equal(case.run(x[order], [alpha[order] for alpha in alphas], isa), batch_output[order])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 5, 16, 40])
@pytest.mark.parametrize("wide", [False, True])
def test_alpha_zero_is_the_kernel_without_an_ortho_stream(isa, rows, wide):
    case = Case(90, 200, shares=(0.2,))
    x = case.x(rows)
    plain = case.run(x, (), isa, wide)
    assert torch.equal(case.run(x, [torch.zeros(1)], isa, wide), plain)
    alphas = torch.ones(rows)
    alphas[::2] = 0
    batch_output = case.run(x, [alphas], isa, wide)
    assert torch.equal(batch_output[::2], plain[::2])
    assert rows == 1 or not torch.equal(batch_output[1::2], plain[1::2])


def test_alpha_zero_reads_no_sparse_byte():
    """A product that reads these sheets is NaN: all bits of their values are one."""
    case = Case(64, 64)
    invalid_sheet = case.sheets[0].clone()
    invalid_sheet[int(invalid_sheet[32:40].view(torch.int64)) :] = 255  # the header ends with the place of the steps
    x = case.x(3)
    assert case.run(x, [torch.ones(3)], sheets=[invalid_sheet]).isnan().any()
    assert torch.equal(case.run(x, [torch.zeros(3)], sheets=[invalid_sheet]), case.run(x))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(threads):
    case, before = Case(300, 130, shares=(0.1,)), torch.get_num_threads()
    x, alphas = case.x(12), [torch.linspace(0, 1, 12)]
    expected_y = {isa: case.run(x, alphas, isa) for isa in ISAS}
    try:
        torch.set_num_threads(threads)
        for isa in ISAS:
            assert torch.equal(case.run(x, alphas, isa), expected_y[isa])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 3, 12, 20])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_stay_visible(isa, rows, bad):
    case = Case(70, 96, shares=(0.1,))
    x = case.x(rows)
    x[rows // 2, 5] = bad
    for alphas in ([], [torch.ones(1)]):
        y = case.run(x, alphas, isa, wide=False)
        is_bad_row = torch.zeros(rows, dtype=torch.bool)
        is_bad_row[rows // 2] = True
        assert not bool(y[is_bad_row].isfinite().any())
        assert bool(y[~is_bad_row].isfinite().all())


@pytest.mark.parametrize("isa", ISAS)
def test_the_last_rounding_is_to_the_nearest(isa):
    case = Case(80, 64)
    x = case.x(4)
    wide = case.run(x, [torch.ones(1)], isa)
    assert torch.equal(case.run(x, [torch.ones(1)], isa, wide=False), wide.bfloat16())


@pytest.mark.parametrize("isa", ISAS)
def test_rows_with_any_strides(isa):
    case = Case(20, 64)
    expected_y = case.x(6)
    for x in (
        expected_y.t().contiguous().t(),
        torch.cat([expected_y, expected_y], 1)[:, :64],
        expected_y.repeat_interleave(2, 0)[::2],
    ):
        assert torch.equal(case.run(x, (), isa), case.run(expected_y, (), isa))
    assert case.run(case.x(0), (), isa).shape == (0, 20)


def test_a_sheet_is_small():
    """A sheet takes about 5.4 bytes a value at 1 % and 3.6 at 5 %, a checkpoint 6. Uneven supports stay in bounds."""
    case = Case(512, 4096, shares=())
    for share, bytes_per_value in ((0.01, 6.0), (0.05, 4.0)):
        support = torch.rand(512, 4096, generator=case.random) < share
        ortho = OrthoStream.from_dense(torch.randn(512, 4096), support)
        assert (
            cpu.pack_sheets(ortho.rowptr, ortho.cols, ortho.vals, ortho.shape[1]).numel() <= bytes_per_value * ortho.nnz
        )
    support = torch.zeros(512, 4096, dtype=torch.bool)
    support[::100] = True
    ortho = OrthoStream.from_dense(torch.randn(512, 4096), support)
    assert cpu.pack_sheets(ortho.rowptr, ortho.cols, ortho.vals, ortho.shape[1]).numel() <= 4 * ortho.nnz
    assert case.base.numel() == 512 * 4096 // 2 + 512 * 64 * 2


def test_int64_row_pointers():
    ortho = OrthoStream.from_dense(torch.randn(40, 80), torch.rand(40, 80) < 0.2)
    narrow, wide = (
        cpu.pack_sheets(rowptr, ortho.cols, ortho.vals, ortho.shape[1])
        for rowptr in (ortho.rowptr, ortho.rowptr.long())
    )
    assert torch.equal(narrow, wide)


def test_operands_that_do_not_fit_are_refused():
    case = Case(20, 64)
    x = case.x(2)
    with pytest.raises(ValueError, match="bfloat16"):
        case.run(x.float())
    with pytest.raises(ValueError, match="does not fit"):
        case.run(torch.cat([x, x], 1))
    with pytest.raises(ValueError, match="alpha"):
        case.run(x, [torch.ones(3)])
    with pytest.raises(ValueError, match="alpha"):
        case.run(x, [torch.ones(2, dtype=torch.float64)])
    with pytest.raises(ValueError, match="1 ortho streams but 0"):
        case.run(x, (), sheets=case.sheets)
    case.bias = torch.zeros(3)
    with pytest.raises(ValueError, match="bias"):
        case.run(x)


def test_every_path_is_counted():
    case = Case(20, 64)
    kernels.reset_calls()
    for rows in (1, 2, 32, 33, 1):
        case.run(case.x(rows))
    assert kernels.calls() == {"cpu.decode": 2, "cpu.small": 2, "cpu.prefill": 1}


def test_the_operator_in_a_compiled_graph_and_in_inference_mode():
    from lm_ortho.kernels.cpu.op import operator

    case = Case(20, 64)
    product = operator()

    def double_product(x, alpha):
        form = {"out_features": 20, "bits": 4, "group_size": 64}
        return product(x, case.base, case.sheets, [alpha], None, **form) * 2

    x, alpha = case.x(3), torch.linspace(0, 1, 3)
    expected_y = double_product(x, alpha)
    compiled_product = torch.compile(double_product, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled_product(x, alpha), expected_y)
        assert torch.equal(compiled_product(x, torch.zeros(3)), double_product(x, torch.zeros(3)))
    arguments = (x, case.base, case.sheets, [alpha], None, 20, 4, 64)
    torch.library.opcheck(product.default, arguments, test_utils=("test_schema", "test_faketensor"))
