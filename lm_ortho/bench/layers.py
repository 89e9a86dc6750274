"""The benchmark of single layers: a plan, the run, and the report as plain data."""

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
from lm_ortho.bench.timing import Ratio, clock_for, interleaved, paired_ratio
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
    """What is measured. ``seconds`` is the time for one shape at one batch size; ``null_rounds`` pairs at least."""

    shapes: tuple[Shape, ...] = SHAPES
    batches: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    densities: tuple[float, ...] = (0.01, 0.02, 0.05)
    threads: int = 1
    kernel: str = AUTO
    seconds: float = 20.0
    rounds: int = 100
    null_rounds: int = 400


def quick_plan(kernel: str = AUTO) -> Plan:
    """One shape, three batch sizes, one density: about half a minute."""
    return Plan((SQUARE,), (1, 4, 16), (0.01,), kernel=kernel, seconds=4.5, rounds=60, null_rounds=200)


Notify = Callable[[str], None]


def run(plan: Plan, progress: Notify = lambda line: None) -> dict[str, Any]:
    """The report: ``device``, ``threads``, ``rows`` and ``null_test``.

    A row has ``shape``, ``batch``, ``variant``, ``density``, ``alpha``, the ``kernel`` that was counted, the median in
    microseconds, and ``ratio_bf16``: the median of BF16 ``F.linear`` over it, so above 1 is faster. One thread is
    measured in the time it ran, several in wall time. Raises ``UserError`` for a kernel that did not run.
    """
    rows: list[dict[str, Any]] = []
    with _threads(plan.threads), torch.inference_mode():
        for shape in plan.shapes:
            rows += _measure_shape(shape, plan, progress)
        progress("null test")
        null = null_test(plan)
    return {
        "device": device_name(),
        "threads": plan.threads,
        "rows": rows,
        "null_test": null._asdict(),
    }


def _measure_shape(shape: Shape, plan: Plan, progress: Notify) -> Iterator[dict[str, Any]]:
    problem = Problem(shape)
    sides = [
        *variants.peers(problem, plan.densities),
        *variants.torchao_int4(problem),
        *variants.ours(problem, plan.densities, plan.kernel),
    ]
    for batch in plan.batches:
        progress(f"{shape.out_features} x {shape.in_features}, batch {batch}")
        yield from _measure_batch(shape, problem.x(batch), sides, plan)


def _measure_batch(shape: Shape, x: Tensor, sides: list[Variant], plan: Plan) -> Iterator[dict[str, Any]]:
    kernels = {side.label: side.kernel or _counted(side, x, plan.kernel) for side in sides}
    before = calls()
    made = {side.label: (lambda number, side=side: side.call(number % side.copies, x)) for side in sides}
    taken = interleaved(made, plan.rounds, plan.seconds, clock_for(plan.threads))
    _check_counts(before, [side for side in sides if side.kernel is None], kernels, taken)
    medians = {label: statistics.median(times) for label, times in taken.items()}
    bf16 = medians["bf16", 0.0, 0.0]
    for side in sides:
        median = medians[side.label]
        yield {
            "shape": [shape.out_features, shape.in_features],
            "batch": x.shape[0],
            "variant": side.name,
            "density": side.density,
            "alpha": side.alpha,
            "kernel": kernels[side.label],
            "median_us": round(median * 1e6, 2),
            "ratio_bf16": round(bf16 / median, 4),
        }


def _counted(side: Variant, x: Tensor, wanted: str) -> str:
    """The name of the kernel that runs; operands of every copy are made on the way."""
    before = calls()
    for copy in range(side.copies):
        side.call(copy, x)
    names = [name for name, count in calls().items() if count > before.get(name, 0)]
    if wanted != AUTO and not all(name.startswith(f"{wanted}.") for name in names):
        raise UserError(f"kernel={wanted}: {', '.join(names)} ran instead; `lm-ortho doctor` says why")
    return " + ".join(sorted(names))


def _check_counts(
    before: dict[str, int], sides: list[Variant], kernels: dict[Any, str], taken: dict[Any, list[float]]
) -> None:
    """Every timed call ran the kernel that its row names. HISTORY 9: figures were once measured on a fallback."""
    now = calls()
    wanted: dict[str, int] = {}
    for side in sides:
        for name in kernels[side.label].split(" + "):
            wanted[name] = wanted.get(name, 0) + 2 * len(taken[side.label])
    ran = {name: count - before.get(name, 0) for name, count in now.items() if count > before.get(name, 0)}
    if ran != wanted:
        raise RuntimeError(f"the benchmark timed {wanted}, but what ran is {ran}")


def null_test(plan: Plan) -> Ratio:
    """Time of a layer at alpha=0 over that of one without an ortho stream, in pairs, with copies of their own."""
    problem = Problem(SQUARE)
    x = problem.x(1)
    without, with_ortho = (problem.layers(density, plan.kernel) for density in (0.0, NULL_DENSITY))
    for layer in (*without, *with_ortho):
        layer(x)
    count = len(without)
    pair = {"above": lambda i: with_ortho[i % count](x), "below": lambda i: without[i % count](x)}
    taken = interleaved(pair, plan.null_rounds, 4 * plan.seconds, clock_for(plan.threads), seed=1)
    return paired_ratio(taken["above"], taken["below"])


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_name() -> str:
    """The processor as its system calls it, with the instruction set that our kernel uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = found[0].partition(":")[2].strip() if found else name
    library = cpu.find()
    return f"{name} ({library.isa if isinstance(library, cpu.Library) else 'no compiled kernel'})"
