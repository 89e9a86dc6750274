"""Checks the kernels that benchmarks/gpu.py times: numerics against float64, bits, CUDA graph, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_device import Device, Stored, stored_layer
from torch import Tensor

from kernels.cuda import linear

FUSED_ERROR = 1e-5
"""Allowed error as a share of the sum of |w| |x|, with FP32 output."""
DENSE_ERROR = 2**-7
"""The dense path rounds weights and output to BF16."""
Check = tuple[str, Callable[[], float | bool]]


def all_checks(device: Device, seed: int) -> Iterator[Check]:
    """Yields name and function of each check; it returns the share of the allowed error, or whether it passes."""
    small = device.kind == "cpu"
    # Every width of a program at two shapes, the ends of the range at two more: a compilation takes seconds.
    every, some = (1, 2, 8, 16, 32), (1, 50)
    cases = (
        {(20, 130): (1, 3)} if small else {(4096, 4096): every, (1000, 2050): every, (14336, 4096): some, (7, 65): some}
    )
    for shape, batches in cases.items():
        stored = stored_layer(shape, 0.02, device.kind, seed)
        for rows in batches:
            yield f"fused {shape} {rows} rows", partial(_numerics, stored, rows, "fused", seed)
        yield f"dense {shape}", partial(_numerics, stored, 3 if small else 300, "dense", seed)
        yield f"bits at alpha=0 {shape}", partial(_bits_at_zero, stored, (1, 2) if small else (1, 16, 300), seed)
        if len(batches) > 2:
            yield f"bits of rows {shape}", partial(_bits_of_rows, stored, seed)
            yield f"CUDA graph {shape}", partial(_graph, stored, seed)
    yield "torch.compile", partial(_compiled, stored_layer((128, 256), 0.02, device.kind, seed), small)


def run_checks(
    device: Device, seed: int, record_check: Callable[[dict[str, Any]], None], time_left: Callable[[], bool]
) -> None:
    """Runs every check and passes its record to ``record_check``; a check that raises or has no time left fails."""
    for name, check in all_checks(device, seed):
        record: dict[str, Any] = {"check": name}
        if not time_left():
            record_check(record | {"ok": False, "error": "not run: out of time"})
            continue
        try:
            value = check()
            record |= {"ok": value if isinstance(value, bool) else value <= 1.0, "value": value}
        except Exception as error:
            record |= {"ok": False, "error": _describe_error(error)}
        record_check(record)


def _describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _draw_input(stored: Stored, rows: int, seed: int) -> Tensor:
    device = stored.qweight.device
    draw = torch.Generator(device=device).manual_seed(seed + 1)
    return torch.randn(rows, stored.shape[1], generator=draw, device=device).bfloat16()


def _alphas(rows: int, device: torch.device) -> Tensor:
    """An alpha per row: 0, 1 and others in turn."""
    return torch.tensor([(0.0, 1.0, 0.3)[row % 3] for row in range(rows)], device=device).unsqueeze(0)


def _numerics(stored: Stored, rows: int, path: Any, seed: int) -> float:
    """The largest error as a share of what is allowed, over one alpha for all rows and an alpha per row."""
    x, prepared = _draw_input(stored, rows, seed), stored.prepared()
    base, ortho = stored.base(torch.float64), stored.ortho(torch.float64)
    bound = x.double().abs() @ (base.abs() + ortho.abs()).t()
    dtype = torch.float32 if path == "fused" else x.dtype
    worst = 0.0
    for alphas in (torch.full((1,), 0.7, device=x.device), _alphas(rows, x.device)):
        y = linear(x, prepared, alphas, path=path, out_dtype=dtype)
        each = alphas.double().view(-1, 1)
        exact = x.double() @ base.t() + each * (x.double() @ ortho.t())
        worst = max(worst, float(((y.double() - exact).abs() / bound).max()))
    return worst / (FUSED_ERROR if path == "fused" else DENSE_ERROR)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal BF16 patterns."""
    return torch.equal(a.contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def _bits_of_rows(stored: Stored, seed: int) -> bool:
    """Rows of mixed batches against the same rows alone."""
    prepared = stored.prepared()
    for rows in (2, 5, 16, 50):
        x, alphas = _draw_input(stored, rows, seed), _alphas(rows, stored.qweight.device)
        mixed = linear(x, prepared, alphas, path="fused")
        for row in range(rows):
            alone = linear(x[row : row + 1], prepared, alphas[:, row].clone(), path="fused")
            if not same_bits(mixed[row : row + 1], alone):
                return False
    return True


def _bits_at_zero(stored: Stored, batches: tuple[int, ...], seed: int) -> bool:
    """alpha=0 against the kernel without an ortho stream."""
    whole, bare = stored.prepared(), Stored(stored.shape, stored.qweight, stored.scales, None).prepared()
    zero = torch.zeros(1, device=stored.qweight.device)
    many = [_draw_input(stored, rows, seed) for rows in batches]
    return all(same_bits(linear(x, whole, zero), linear(x, bare)) for x in many)


def _graph(stored: Stored, seed: int) -> bool:
    """One captured graph gives, at each alpha it is replayed with, what a plain call gives."""
    prepared, alpha = stored.prepared(), torch.zeros(1, device="cuda")
    for rows in (1, 16, 100):
        x = _draw_input(stored, rows, seed)
        expected = {value: linear(x, prepared, torch.full_like(alpha, value)) for value in (0.0, 0.5, 1.0)}
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x, prepared, alpha)
        for value in (1.0, 0.0, 0.5):
            alpha.fill_(value)
            graph.replay()
            torch.cuda.synchronize()
            if not same_bits(y, expected[value]):
                return False
    return True


def _compiled(stored: Stored, small: bool) -> bool:
    prepared, x = stored.prepared(), _draw_input(stored, 2, 0)

    def call(x: Tensor, alpha: Tensor) -> Tensor:
        return linear(x, prepared, alpha)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if small else "inductor")
    alphas = [torch.full((1,), value, device=x.device) for value in (0.0, 1.0)]
    return all(same_bits(compiled(x, alpha), call(x, alpha)) for alpha in alphas)
