"""Benchmark of single layers: the plan, the run, and the report as plain data."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm_ortho.bench import variants
from lm_ortho.bench.problem import Problem, Shape
from lm_ortho.bench.timing import Ratio, compute_paired_ratio, select_clock, time_interleaved
from lm_ortho.bench.variants import Variant
from lm_ortho.errors import UserError
from lm_ortho.kernels import AUTO, calls, cpu

SQUARE = Shape(4096, 4096, "Llama-3-8B q, o")
SHAPES = (
    SQUARE,
    Shape(14336, 4096, "Llama-3-8B gate, up"),
    Shape(4096, 14336, "Llama-3-8B down"),
    Shape(1024, 4096, "Llama-3-8B k, v"),
    Shape(2048, 2048, "TinyLlama q, o"),
    Shape(5632, 2048, "TinyLlama gate, up"),
    Shape(2048, 5632, "TinyLlama down"),
    Shape(256, 2048, "TinyLlama k, v"),
)
NULL_DENSITY = 0.01


@dataclass(frozen=True)
class Plan:
    """What is measured.

    ``seconds`` is the time for one shape at one batch size, ``rounds`` the largest number of rounds in that time,
    ``null_rounds`` the largest number of pairs in the null test.
    """

    shapes: tuple[Shape, ...] = SHAPES
    batches: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    densities: tuple[float, ...] = (0.01, 0.02, 0.05)
    threads: int = 1
    kernel: str = AUTO
    seconds: float = 20.0
    rounds: int = 100
    null_rounds: int = 400


def make_quick_plan(kernel: str = AUTO) -> Plan:
    """Returns a plan of one shape, three batch sizes and one density: about half a minute."""
    return Plan((SQUARE,), (1, 4, 16), (0.01,), kernel=kernel, seconds=4.5, rounds=60, null_rounds=200)


Notify = Callable[[str], None]


def run(plan: Plan, progress: Notify = lambda line: None) -> dict[str, Any]:
    """Runs the plan and returns the report: ``device``, ``threads``, ``rows`` and ``null_test``.

    A row has ``shape``, ``batch``, ``variant``, ``density``, ``alpha``, the ``kernel`` whose calls were counted, the
    median in microseconds, and ``ratio_bf16``: the median of BF16 ``F.linear`` over it, so above 1 is faster. One
    thread is measured in its own running time, several in wall time.

    Raises:
        UserError: For a kernel that did not run.
    """
    rows: list[dict[str, Any]] = []
    with _use_threads(plan.threads), torch.inference_mode():
        for shape in plan.shapes:
            rows += _measure_shape(shape, plan, progress)
        progress("null test")
        null = run_null_test(plan)
    return {
        "device": get_device_name(),
        "threads": plan.threads,
        "rows": rows,
        "null_test": null._asdict(),
    }


def _measure_shape(shape: Shape, plan: Plan, progress: Notify) -> Iterator[dict[str, Any]]:
    problem = Problem(shape)
    cases = [
        *variants.make_baseline_variants(problem, plan.densities),
        *variants.make_torchao_variants(problem),
        *variants.make_ortho_variants(problem, plan.densities, plan.kernel),
    ]
    for batch in plan.batches:
        progress(f"{shape.out_features} x {shape.in_features}, batch {batch}")
        yield from _measure_batch(shape, problem.draw_input(batch), cases, plan)


def _measure_batch(shape: Shape, x: Tensor, cases: list[Variant], plan: Plan) -> Iterator[dict[str, Any]]:
    # 1. Run every variant once, to learn its kernel and to build its operands.
    kernels = {case.label: case.kernel or _find_kernel_name(case, x, plan.kernel) for case in cases}
    # 2. Time all variants, interleaved.
    counts_before = calls()
    functions = {case.label: (lambda number, case=case: case.call(number % case.copies, x)) for case in cases}
    times_by_label = time_interleaved(functions, plan.rounds, plan.seconds, select_clock(plan.threads))
    # 3. Check that the timed calls ran these kernels.
    _check_counts(counts_before, [case for case in cases if case.kernel is None], kernels, times_by_label)
    medians = {label: statistics.median(times) for label, times in times_by_label.items()}
    bf16 = medians["bf16", 0.0, 0.0]
    for case in cases:
        median = medians[case.label]
        yield {
            "shape": [shape.out_features, shape.in_features],
            "batch": x.shape[0],
            "variant": case.name,
            "density": case.density,
            "alpha": case.alpha,
            "kernel": kernels[case.label],
            "median_us": round(median * 1e6, 2),
            "ratio_bf16": round(bf16 / median, 4),
        }


def _find_kernel_name(case: Variant, x: Tensor, kernel: str) -> str:
    """Returns the name of the kernel that runs; this also builds the operands of every copy.

    Raises:
        UserError: If another kernel than the requested ``kernel`` runs.
    """
    counts_before = calls()
    for copy in range(case.copies):
        case.call(copy, x)
    names = [name for name, count in calls().items() if count > counts_before.get(name, 0)]
    if kernel != AUTO and not all(name.startswith(f"{kernel}.") for name in names):
        raise UserError(f"kernel={kernel}: {', '.join(names)} ran instead; `lm-ortho doctor` prints the reason")
    return " + ".join(sorted(names))


def _check_counts(
    counts_before: dict[str, int],
    cases: list[Variant],
    kernels: dict[Any, str],
    times_by_label: dict[Any, list[float]],
) -> None:
    """Checks that every timed call ran the kernel that its row names.

    HISTORY 9: figures were once measured on a fallback.
    """
    expected: dict[str, int] = {}
    for case in cases:
        for name in kernels[case.label].split(" + "):
            expected[name] = expected.get(name, 0) + 2 * len(times_by_label[case.label])
    counts = {name: count - counts_before.get(name, 0) for name, count in calls().items()}
    actual = {name: count for name, count in counts.items() if count > 0}
    if actual != expected:
        raise RuntimeError(f"the benchmark timed {expected} calls, but {actual} ran")


def run_null_test(plan: Plan) -> Ratio:
    """Times a layer at alpha=0 relative to one without an ortho stream, in pairs, each with its own copies."""
    problem = Problem(SQUARE)
    x = problem.draw_input(1)
    base_layers, ortho_layers = (problem.make_layers(density, plan.kernel) for density in (0.0, NULL_DENSITY))
    for layer in (*base_layers, *ortho_layers):
        layer(x)
    count = len(base_layers)
    pair = {"above": lambda i: ortho_layers[i % count](x), "below": lambda i: base_layers[i % count](x)}
    times = time_interleaved(pair, plan.null_rounds, 4 * plan.seconds, select_clock(plan.threads), seed=1)
    return compute_paired_ratio(times["above"], times["below"])


@contextmanager
def _use_threads(count: int) -> Iterator[None]:
    count_before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(count_before)


def get_device_name() -> str:
    """Returns the name of the processor, with the instruction set that our kernel uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    library = cpu.find()
    return f"{name} ({library.isa if isinstance(library, cpu.Library) else 'no compiled kernel'})"
