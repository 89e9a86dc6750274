"""The GPU kernels on a GPU: numerics, bits, torch.compile and CUDA graphs. ``python -m pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lm_ortho.kernels.cuda import linear
from tests.support.triton_layers import ERROR, random_layer, random_x, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = [(4096, 4096), (1000, 700), (40, 14336), (7, 65)]
ROUNDING_ERROR = 2**-7
"""Largest error as a fraction of the sum of |w| |x|: the dense path rounds weights to BF16."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 50])
def test_fused_numerics(shape: tuple[int, int], rows: int) -> None:
    layer = random_layer(*shape, memories=2, support=0.02)
    x, alphas = random_x(rows, shape[1]), torch.rand(2, rows)
    y = linear(x.cuda(), layer.prepare("cuda"), alphas.cuda(), layer.bias.cuda(), path="fused", out_dtype=torch.float32)
    assert float(((y.double().cpu() - layer.exact_product(x, alphas)).abs() / layer.magnitude(x)).max()) <= ERROR


@pytest.mark.parametrize("lattice", [(3, 64), (4, 64), (4, 24), (8, 32)])
@pytest.mark.parametrize("per_row", [False, True])
def test_dense_numerics(lattice: tuple[int, int], per_row: bool) -> None:
    bits, group_size = lattice
    layer = random_layer(300, 520, bits=bits, group_size=group_size, memories=2)
    x = random_x(200, 520)
    alphas = torch.rand(2, 200) if per_row else torch.rand(2)
    y = linear(x.cuda(), layer.prepare("cuda"), alphas.cuda(), layer.bias.cuda(), path="dense")
    assert (
        float(((y.double().cpu() - layer.exact_product(x, alphas)).abs() / layer.magnitude(x)).max()) <= ROUNDING_ERROR
    )


@pytest.mark.parametrize("rows", [1, 3, 8, 16, 30, 64])
def test_a_row_has_the_same_bits_alone_and_in_a_mixed_batch(rows: int) -> None:
    layer = random_layer(1000, 4096, memories=2)
    operand, x = layer.prepare("cuda"), random_x(rows, 4096).cuda()
    alphas = (torch.rand(2, rows) * (torch.rand(2, rows) < 0.7)).cuda()
    batch_output = linear(x, operand, alphas, path="fused")
    for row in range(rows):
        row_output = linear(x[row : row + 1], operand, alphas[:, row].clone(), path="fused")
        assert same_bits(batch_output[row : row + 1], row_output)


@pytest.mark.parametrize("rows", [1, 16, 300])
def test_alpha_zero_has_the_bits_of_a_layer_without_ortho_stream(rows: int) -> None:
    layer, x = random_layer(1000, 4096), random_x(rows, 4096).cuda()
    base_output = linear(x, layer.prepare("cuda", ortho=False))
    assert same_bits(linear(x, layer.prepare("cuda"), torch.zeros(1, device="cuda")), base_output)
    assert same_bits(linear(x, layer.prepare("cuda"), None), base_output)


@pytest.mark.parametrize("rows", [1, 16, 300])
def test_a_cuda_graph_follows_alpha(rows: int) -> None:
    layer, x = random_layer(512, 1024), random_x(rows, 1024).cuda()
    operand, alpha = layer.prepare("cuda"), torch.zeros(1, device="cuda")
    outputs_by_alpha = {value: linear(x, operand, torch.full((1,), value, device="cuda")) for value in (0.0, 0.5, 1.0)}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, operand, alpha)
    for value in (1.0, 0.0, 0.5):
        alpha.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(y, outputs_by_alpha[value])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_torch_compile_keeps_the_operators_whole(mode: str, rows: int) -> None:
    layer, x = random_layer(512, 1024), random_x(rows, 1024).cuda()
    operand, bias = layer.prepare("cuda"), layer.bias.cuda()

    def call(x: Tensor, alpha: Tensor) -> Tensor:
        return linear(x, operand, alpha, bias) * 2

    compiled_call = torch.compile(call, fullgraph=True, mode=mode)
    for value in (0.0, 1.0, 0.25):
        alpha = torch.full((1,), value, device="cuda")
        torch.testing.assert_close(compiled_call(x, alpha), call(x, alpha))


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    layer, x = random_layer(256, 1024), random_x(4, 1024).cuda()
    operand, alpha = layer.prepare("cuda"), torch.ones(1, device="cuda")
    clean = linear(x, operand, alpha)
    x[2, 100] = float("nan")
    y = linear(x, operand, alpha)
    assert not y[2].isfinite().any()
    assert same_bits(y[:2], clean[:2])


def test_nothing_waits_for_the_device() -> None:
    layer, x = random_layer(256, 1024), random_x(4, 1024).cuda()
    operand, alphas = layer.prepare("cuda"), torch.rand(1, 4, device="cuda")
    for path in ("fused", "dense"):
        linear(x, operand, alphas, path=path)
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear(x, operand, alphas, path=path)
        finally:
            torch.cuda.set_sync_debug_mode("default")
