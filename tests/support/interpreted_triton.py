"""The GPU kernels in Triton's interpreter; run by tests/kernels/test_triton.py in a process with TRITON_INTERPRET=1.

Not named test_*.py: the variable must be set before Triton is imported, and other tests must not see it.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from lm_ortho.kernels import calls, reset_calls
from lm_ortho.kernels.cuda import linear, ops, tuning
from lm_ortho.layer import OrthoLinear, alpha_scope
from lm_ortho.streams import DEFAULT_MEMORY, OrthoStream
from tests.support.triton_layers import ERROR, Layer, eighths, random_layer, random_x, same_bits

assert os.environ.get("TRITON_INTERPRET") == "1"
PHASES = (Phase.explicit, Phase.generate)  # shrinking takes minutes in the interpreter
FAST = settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=PHASES)


def max_error(layer: Layer, x: Tensor, alphas: Tensor | None, **kwargs: object) -> float:
    """The largest error, relative to the sum of |w| |x|."""
    y = linear(x, layer.prepare(), alphas, layer.bias, out_dtype=torch.float32, **kwargs)
    assert y.dtype == torch.float32
    return float(((y.double() - layer.exact_product(x, alphas)).abs() / layer.magnitude(x).clamp(min=1e-30)).max())


def draw_alphas(kind: str, memories: int, rows: int) -> Tensor | None:
    if kind == "none":
        return None
    draw = torch.Generator().manual_seed(3)
    if kind == "rows":
        return torch.rand(memories, rows, generator=draw) * (torch.rand(memories, rows, generator=draw) < 0.6)
    return {"zero": torch.zeros(memories), "one": torch.ones(memories)}.get(kind, torch.rand(memories, generator=draw))


@FAST
@given(
    out_features=st.integers(1, 50),
    in_features=st.integers(1, 700),
    rows=st.sampled_from([1, 2, 3, 8, 11]),
    group_size=st.sampled_from([16, 32, 48, 64, 128]),
    density=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    memories=st.sampled_from([1, 1, 2]),
    kind=st.sampled_from(["none", "zero", "one", "some", "rows"]),
    bias=st.booleans(),
)
def test_fused_product_of_any_shape(out_features, in_features, rows, group_size, density, memories, kind, bias):
    layer = random_layer(
        out_features, in_features, group_size=group_size, support=density, memories=memories, bias=bias
    )
    alphas = draw_alphas(kind, memories, rows)
    assert max_error(layer, random_x(rows, in_features), alphas, path="fused") <= ERROR


@FAST
@given(
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 400),
    rows=st.sampled_from([1, 5]),
    lattice=st.sampled_from([(3, 64), (8, 64), (4, 64), (4, 24), (3, 8), (8, 40)]),
    density=st.sampled_from([0.0, 0.05, 1.0]),
    memories=st.sampled_from([1, 2]),
    kind=st.sampled_from(["none", "zero", "one", "some", "rows"]),
)
def test_dense_path_of_any_shape(out_features, in_features, rows, lattice, density, memories, kind):
    bits, group_size = lattice
    layer = random_layer(
        out_features, in_features, bits=bits, group_size=group_size, support=density, memories=memories
    )
    alphas = draw_alphas(kind, memories, rows)
    assert max_error(layer, random_x(rows, in_features), alphas, path="dense") <= ERROR


@pytest.mark.parametrize("order", [(4, 2, 32), (8, 4, 16), (2, 1, 64)])
@pytest.mark.parametrize("rows", [1, 20])
def test_every_cut_of_the_sums(order: tuple[int, int, int], rows: int) -> None:
    layer = random_layer(37, 1300, support=0.1)
    p, alphas = layer.prepare(), torch.tensor([0.7])
    x = random_x(rows, 1300)
    launch = tuning.Launch(tuning.block_rows(rows), 32, 2)
    y = ops.run_fused(
        x,
        p.codes,
        p.scales,
        ortho=p.ortho,
        rowptr=p.rowptr,
        alphas=alphas,
        bias=layer.bias,
        out_dtype=torch.float32,
        order=tuning.Order(*order),
        launch=launch,
    )
    assert float(((y.double() - layer.exact_product(x, alphas)).abs() / layer.magnitude(x)).max()) <= ERROR


def test_seventy_thousand_columns_have_two_blocks_of_sparse_words() -> None:
    layer = random_layer(3, 70_000, support=0.002)
    assert layer.prepare().rowptr.shape == (1, 2, 4)
    assert max_error(layer, random_x(1, 70_000), torch.ones(1), path="fused") <= ERROR
    assert max_error(layer, random_x(1, 70_000), torch.ones(1), path="dense") <= ERROR


def test_empty_and_full_rows_beside_each_other() -> None:
    support = torch.zeros(40, 200, dtype=torch.bool)
    support[3] = support[39] = True
    support[17, 5] = True
    layer = random_layer(40, 200, support=support)
    for path in ("fused", "dense"):
        assert max_error(layer, random_x(2, 200), torch.ones(1), path=path) <= ERROR


def test_a_row_has_the_same_bits_alone_and_in_a_mixed_batch() -> None:
    layer = random_layer(40, 1100, memories=2, support=0.1)
    prepared, x = layer.prepare(), eighths(7, 1100)
    alphas = torch.tensor([[0, 1, 0.5, 0, 0.25, 1, 0], [0, 0, 1, 0.75, 0.3, 1, 0]])
    mixed = linear(x, prepared, alphas, layer.bias, out_dtype=torch.float32)
    for row in range(7):
        alone = linear(x[row : row + 1], prepared, alphas[:, row].clone(), layer.bias, out_dtype=torch.float32)
        assert same_bits(mixed[row : row + 1], alone)


@pytest.mark.parametrize("path", ["fused", "dense"])
def test_rows_at_other_alphas_change_nothing(path: str) -> None:
    layer = random_layer(24, 300, support=0.1)
    prepared, x = layer.prepare(), random_x(4, 300)
    alphas = torch.tensor([[0, 1, 0.5, 0]])
    mixed = linear(x, prepared, alphas, layer.bias, path=path, out_dtype=torch.float32)
    for row in range(4):
        alphas_of_row = torch.full((1, 4), float(alphas[0, row]))
        expected = linear(x, prepared, alphas_of_row, layer.bias, path=path, out_dtype=torch.float32)
        assert same_bits(mixed[row], expected[row])


@pytest.mark.parametrize("path", ["fused", "dense"])
def test_alpha_zero_has_the_bits_of_a_layer_without_ortho_stream(path: str) -> None:
    layer, x = random_layer(40, 500, support=0.3), random_x(3, 500)
    bare = linear(x, layer.prepare(ortho=False), None, layer.bias, path=path, out_dtype=torch.float32)
    for zero in (torch.zeros(1), torch.zeros(1, 3), None):
        y = linear(x, layer.prepare(), zero, layer.bias, path=path, out_dtype=torch.float32)
        assert same_bits(y, bare)


class Watch:
    """A wrapper around the interpreter's memory that records which of some tensors were read."""

    def __init__(self, memory: Any, tensors: dict[str, Tensor]) -> None:
        self.memory = memory
        self.ends = {name: (part.data_ptr(), part.data_ptr() + part.nbytes) for name, part in tensors.items()}
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def load(self, pointers: Any, mask: Any, *arguments: Any) -> Any:
        addresses = pointers[mask]
        for name, (begin, end) in self.ends.items():
            if ((addresses >= begin) & (addresses < end)).any():
                self.read.add(name)
        return self.memory.load(pointers, mask, *arguments)


@pytest.mark.parametrize("path", ["fused", "dense"])
def test_at_alpha_zero_no_sparse_byte_is_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = random_layer(40, 1300, support=0.3, memories=2), random_x(3, 1300)
    p = layer.prepare()
    watch = Watch(interpreter._interpreter, {"codes": p.codes, "ortho": p.ortho, "rowptr": p.rowptr})
    monkeypatch.setattr(interpreter, "_interpreter", watch)
    linear(x, p, torch.zeros(2), path=path, out_dtype=torch.float32)
    assert watch.read == {"codes"}
    linear(x, p, torch.tensor([0.0, 1.0]), path=path, out_dtype=torch.float32)
    assert watch.read == {"codes", "ortho", "rowptr"}


@pytest.mark.parametrize("path", ["fused", "dense"])
def test_a_sparse_product_that_overflows_stays_out_of_rows_at_alpha_zero(path: str) -> None:
    layer, x = random_layer(20, 64, support=1.0, bias=False), torch.zeros(2, 64, dtype=torch.bfloat16)
    x[:, 0] = 1e37
    layer.memories[0][2].fill_(1e3)
    y = linear(x, layer.prepare(), torch.tensor([[0.0, 1.0]]), path=path, out_dtype=torch.float32)
    assert y[0].isfinite().all()
    assert y[1].isinf().all()


@pytest.mark.parametrize("path", ["fused", "dense"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(path: str, bad: float) -> None:
    layer, x = random_layer(33, 260, support=0.1), random_x(3, 260)
    clean = linear(x, layer.prepare(), torch.tensor([[1.0, 1.0, 0.0]]), path=path, out_dtype=torch.float32)
    x[1, 77] = bad
    y = linear(x, layer.prepare(), torch.tensor([[1.0, 1.0, 0.0]]), path=path, out_dtype=torch.float32)
    assert not y[1].isfinite().any()
    assert same_bits(y[0], clean[0])
    assert same_bits(y[2], clean[2])


def test_strides_leading_dimensions_and_no_rows() -> None:
    layer = random_layer(20, 130)
    prepared, x = layer.prepare(), random_x(12, 130)
    flat = linear(x, prepared, torch.ones(1), layer.bias, out_dtype=torch.float32)
    x_transposed = x.t().contiguous().t()
    assert same_bits(linear(x_transposed, prepared, torch.ones(1), layer.bias, out_dtype=torch.float32), flat)
    y_batched = linear(
        x.view(3, 4, 130), prepared, torch.tensor([[0.0, 1.0, 0.5]]), layer.bias, out_dtype=torch.float32
    )
    assert y_batched.shape == (3, 4, 20)
    assert same_bits(y_batched[1], flat[4:8])
    assert linear(x[:0], prepared, torch.ones(1)).shape == (0, 20)


def test_half_precision_activations() -> None:
    layer = random_layer(20, 300)
    assert max_error(layer, random_x(3, 300).half(), torch.ones(1), path="fused") <= ERROR


def test_what_ran_is_counted() -> None:
    layer = random_layer(16, 64)
    reset_calls()
    linear(random_x(1, 64), layer.prepare(), torch.ones(1), out_dtype=torch.float32)
    linear(random_x(1, 64), layer.prepare(), torch.ones(1), path="dense", out_dtype=torch.float32)
    assert calls() == {"triton.fused": 1, "triton.weight": 1}


def test_the_operators_are_registered_as_torch_wants_them() -> None:
    p, x = random_layer(20, 130).prepare(), random_x(2, 130)
    alpha, checks = torch.ones(1), ("test_schema", "test_faketensor")
    fused = (x, p.codes, p.scales, p.ortho, p.rowptr, alpha, None, torch.float32)
    weight = (p.codes, p.scales, p.ortho, p.rowptr, alpha, 20, 130, 4, 64, p.plane, torch.float32)
    torch.library.opcheck(ops.fused, fused, test_utils=checks)
    torch.library.opcheck(ops.weight, weight, test_utils=checks)
    torch.library.opcheck(ops.ortho_dense, (p.ortho, p.rowptr, 0, 20, 130, torch.float32), test_utils=checks)


@pytest.mark.parametrize("path", ["fused", "dense"])
@pytest.mark.parametrize("per_row", [False, True])
def test_torch_compile_takes_it_whole(path: str, per_row: bool) -> None:
    layer, x = random_layer(20, 130, memories=2), random_x(3, 130)
    prepared, alphas = layer.prepare(), torch.rand(2, 3) if per_row else torch.rand(2)

    def call(x: Tensor, alphas: Tensor) -> Tensor:
        return linear(x, prepared, alphas, layer.bias, path=path, out_dtype=torch.float32)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x, alphas), call(x, alphas))
    assert same_bits(compiled(x, alphas * 0), call(x, alphas * 0))


@triton.jit
def _dot(a, b, out):
    i = tl.arange(0, 16)
    near = i[:, None] * 16 + i[None, :]
    tl.store(out + near, tl.dot(tl.load(a + near), tl.load(b + near)))


@triton.jit
def _cast(a, out):
    i = tl.arange(0, 16)
    tl.store(out + i, tl.load(a + i).to(tl.bfloat16))


def test_the_three_limits_of_the_interpreter_that_the_kernels_work_around() -> None:
    """Fails when Triton lifts one: then the kernels can be tested without UPCAST, in BF16, or be tuned by Triton."""
    ones = torch.ones(16, 16, dtype=torch.bfloat16)
    product = torch.zeros(16, 16)
    _dot[(1,)](ones, ones, product)
    assert not torch.equal(product, torch.full((16, 16), 16.0)), "tl.dot takes BF16 now"
    rounded = torch.zeros(16, dtype=torch.bfloat16)
    values = torch.full((16,), 1 + 2**-8 + 2**-9)
    _cast[(1,)](values, rounded)
    assert not torch.equal(rounded, values.bfloat16()), "float32 is rounded to BF16 now"
    assert torch.equal(rounded, torch.ones(16, dtype=torch.bfloat16))
    autotuned = triton.autotune([triton.Config({}, num_warps=1), triton.Config({}, num_warps=2)], key=[])(_cast)
    with pytest.raises(Exception):  # noqa: B017, PT011 (which one differs between versions)
        autotuned[(1,)](values, rounded)


def make_ortho_linear(layer: Layer, names: tuple[str, ...]) -> Any:
    """An ``OrthoLinear`` with ``kernel="triton"``, with the streams of ``layer`` as named memories."""
    layer_module = OrthoLinear(
        layer.shape[1], layer.shape[0], layer.bits, layer.group_size, bias=layer.bias is not None
    )
    layer_module.qweight, layer_module.scales = layer.qweight, layer.scales
    if layer.bias is not None:
        layer_module.bias = layer.bias
    for name, (rowptr, cols, vals) in zip(names, layer.memories, strict=True):
        layer_module.set_ortho(OrthoStream(rowptr, cols, vals, layer.shape), name)
    layer_module.kernel = "triton"
    return layer_module.eval()


@pytest.mark.parametrize("names", [("",), ("one", "two")])
def test_a_layer_finds_these_kernels_by_name(names: tuple[str, ...]) -> None:
    memories = len(names)
    layer = random_layer(33, 200, support=0.1, memories=memories, bias=True)
    names = (DEFAULT_MEMORY,) if names == ("",) else names
    module, x = make_ortho_linear(layer, names), random_x(4, 200)
    values = [0.25, 1.0][:memories]
    reset_calls()
    with torch.no_grad(), alpha_scope(dict(zip(names, values, strict=True)) if memories > 1 else values[0]):
        y = module(x)
    assert calls() == {"triton.fused": 1}
    error = (y.double() - layer.exact_product(x, torch.tensor(values))).abs() / layer.magnitude(x).clamp(min=1e-30)
    assert float(error.max()) <= ERROR + 2.0**-7  # the interpreter cuts BF16 off instead of rounding
    with torch.no_grad(), alpha_scope(0.0):
        plain = module(x)
    assert same_bits(plain, linear(x, layer.prepare(ortho=False), None, layer.bias))


def test_a_layer_with_an_alpha_per_row() -> None:
    layer = random_layer(20, 130, support=0.2, bias=False)
    module, x = make_ortho_linear(layer, (DEFAULT_MEMORY,)), random_x(3, 130)
    with torch.no_grad(), alpha_scope([0.0, 0.5, 1.0]):
        mixed = module(x)
    for row, alpha in enumerate((0.0, 0.5, 1.0)):
        with torch.no_grad(), alpha_scope(alpha):
            assert same_bits(mixed[row : row + 1], module(x[row : row + 1]))
