"""The benchmark measures the kernels that it names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from lm_ortho import bench, kernels
from lm_ortho.bench import layers as bench_layers
from lm_ortho.bench import timing, variants
from lm_ortho.bench.problem import Problem, Shape
from lm_ortho.cli.app import app
from lm_ortho.errors import UserError
from lm_ortho.kernels import cpu
from tests.support.paths import REPOSITORY

SMALL = Shape(192, 128, "small")
PLAN = replace(bench.make_quick_plan(), shapes=(SMALL,), rounds=5, seconds=0.1, null_rounds=5, batches=(1, 4))
needs_cpu_kernel = pytest.mark.skipif(
    isinstance(cpu.find(), cpu.MissingLibrary), reason="the CPU kernel is not available"
)


@pytest.fixture(autouse=True)
def small_square(monkeypatch):
    """Gives the null test a small matrix."""
    monkeypatch.setattr(bench_layers, "SQUARE", SMALL)


@pytest.mark.parametrize("kernel", ["reference", pytest.param("cpu", marks=needs_cpu_kernel)])
def test_every_row_names_the_kernel_that_was_counted(kernel):
    """HISTORY 9: kernels were written but never called, and figures measured on the fallback."""
    report = bench.run(replace(PLAN, kernel=kernel))
    ortho_rows = [row for row in report["rows"] if row["variant"] == "ours"]
    assert len(ortho_rows) == 2 * 3
    assert all(row["kernel"].startswith(f"{kernel}.") for row in ortho_rows)
    if kernel == "cpu":
        assert {(row["batch"], row["kernel"]) for row in ortho_rows} == {(1, "cpu.decode"), (4, "cpu.small")}


@needs_cpu_kernel
def test_a_figure_of_another_kernel_is_an_error(monkeypatch):
    """HISTORY 9: here the kernel that is timed stops running while the benchmark times it."""
    problem = Problem(SMALL)
    cases = [*variants.make_baseline_variants(problem, ()), *variants.make_ortho_variants(problem, (), "cpu")]
    original_calls, reads = kernels.calls, []

    def calls():
        reads.append(None)
        return {name: count - (len(reads) > 3) for name, count in original_calls().items()}

    monkeypatch.setattr(bench_layers, "calls", calls)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"the benchmark timed .* calls, but .* ran"):
        list(bench_layers._measure_batch(SMALL, problem.draw_input(1), cases, replace(PLAN, kernel="cpu")))
    monkeypatch.undo()
    with torch.inference_mode(), pytest.raises(UserError, match=r"kernel=triton: reference.base ran instead"):
        bench.run(replace(PLAN, kernel="triton"))


def test_the_report_of_the_command(monkeypatch):
    monkeypatch.setattr(bench, "make_quick_plan", lambda kernel: replace(PLAN, kernel=kernel))
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, ["bench", "--quick", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert set(report) == {"device", "threads", "rows", "null_test"}
    assert set(report["null_test"]) == {"ratio", "low", "high"}
    assert report["null_test"]["low"] <= report["null_test"]["ratio"] <= report["null_test"]["high"]
    assert report["threads"] == 1
    assert torch.get_num_threads() == threads
    columns = {"shape", "batch", "variant", "density", "alpha", "kernel", "median_us", "ratio_bf16"}
    assert all(set(row) == columns for row in report["rows"])
    assert {row["variant"] for row in report["rows"]} >= {"bf16", "fp32", "int4pack_csr", "ours"}
    for batch in (1, 4):
        settings = {(r["density"], r["alpha"]) for r in report["rows"] if (r["variant"], r["batch"]) == ("ours", batch)}
        assert settings == {(0.0, 0.0), (0.01, 0.0), (0.01, 1.0)}
        (bf16,) = [r for r in report["rows"] if (r["variant"], r["batch"]) == ("bf16", batch)]
        assert bf16["ratio_bf16"] == 1
        for row in report["rows"]:
            if row["batch"] == batch:
                assert row["ratio_bf16"] == pytest.approx(bf16["median_us"] / row["median_us"], rel=0.05)
    table = CliRunner().invoke(app, ["bench", "--quick"])
    assert "null test" in table.stdout
    assert "int4pack_csr" in table.stdout


def test_the_quick_plan_is_the_documented_one():
    plan = bench.make_quick_plan()
    assert (plan.threads, plan.batches, plan.densities) == (1, (1, 4, 16), (0.01,))
    shape = bench_layers.SHAPES[0]
    assert (shape.out_features, shape.in_features) == (4096, 4096)
    assert shape.copies * shape.weights / 2 > 64 * 2**20


def test_an_unknown_kernel_is_one_line():
    result = CliRunner().invoke(app, ["bench", "--kernel", "fast"])
    assert result.exit_code != 0
    assert "kernel='fast' is unknown" in str(result.exception)


def test_the_variants_compute_the_same_product():
    problem = Problem(Shape(64, 128))
    x = problem.draw_input(3)
    with torch.inference_mode():
        cases = [
            *variants.make_baseline_variants(problem, (0.1,)),
            *variants.make_ortho_variants(problem, (0.1,), "auto"),
        ]
        results = {case.label: [case.call(copy, x).float() for copy in range(case.copies)] for case in cases}
    for density, alpha in ((0.0, 0.0), (0.1, 1.0)):
        expected = (
            x.double()
            @ (problem.base.dequantise(torch.float64) + alpha * problem.make_ortho(0.1).to_dense(torch.float64)).t()
        )
        for label, products in results.items():
            if label[1:] == (density, alpha):
                for product in products:
                    torch.testing.assert_close(
                        product.double(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item()
                    )
    assert problem.make_ortho(0.1).nnz == int(0.1 * 64 * 128)


def test_a_paired_ratio_with_its_interval():
    below = [1.0 + i % 7 for i in range(200)]
    assert timing.compute_paired_ratio([2 * value for value in below], below) == (2.0, 2.0, 2.0)
    noisy_ratio = timing.compute_paired_ratio([value * (1 + 0.1 * (-1) ** i) for i, value in enumerate(below)], below)
    assert noisy_ratio.low < 1 < noisy_ratio.high


def test_calls_are_interleaved_and_use_new_copies():
    order: list[tuple[str, int]] = []
    calls = {name: (lambda number, name=name: order.append((name, number))) for name in "abc"}
    times_by_name = timing.time_interleaved(calls, 6, 0.0, timing.select_clock(1))
    assert {name: len(times) for name, times in times_by_name.items()} == dict.fromkeys("abc", timing.MIN_ROUNDS)
    assert len({tuple(name for name, _ in order[i : i + 6]) for i in range(0, len(order), 6)}) > 1
    assert [number for name, number in order if name == "a"] == list(range(2 * timing.MIN_ROUNDS))


@needs_cpu_kernel
def test_the_limits_of_the_machine_are_plausible():
    assert 1e8 < cpu.read_speed(16) < 1e13
    speed = cpu.product_speed()
    assert (speed is None) == (cpu.find().isa != "avx512_bf16")
    assert speed is None or 1e9 < speed < 1e13


def test_a_missing_ggml_build_is_reported(tmp_path):
    script = REPOSITORY / "benchmarks" / "ggml.py"
    process = subprocess.run([sys.executable, script, "--ggml", tmp_path], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    last_line = process.stderr.splitlines()[-1]
    assert re.search(r"no libggml\*\.so below its build folder|our kernel is not available", last_line)
