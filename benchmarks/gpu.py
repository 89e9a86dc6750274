#!/usr/bin/env python
"""The GPU kernels, checked against float64 and timed beside cuBLAS and torch's INT4 product, in under 9 minutes.

    python benchmarks/gpu.py                  # needs a CUDA device, torch, triton and this checkout; nothing installed
    python benchmarks/gpu.py --tune           # searches settings first and writes kernels/cuda/tuning/<device>.json
    python benchmarks/gpu.py --dry-run        # the same steps on a CPU, in Triton's interpreter; times mean nothing

Weights rotate through copies that together have three times the size of the level-2 cache. Every variant is one CUDA
graph over its copies; variants are interleaved and medians of the same run are compared. Results go to
``benchmarks/results/<date>-gpu-<device>.json``, rewritten after every case.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402
import triton  # noqa: E402
from gpu_checks import run_checks  # noqa: E402
from gpu_device import (  # noqa: E402
    Device,
    Timed,
    bandwidth,
    capture,
    dense_calls,
    int4pack_calls,
    interleaved,
    our_calls,
    paired_ratio,
    rotated,
    rotated_dense,
    stored_layer,
)
from gpu_tune import tune, write  # noqa: E402

from kernels.cuda import tuning  # noqa: E402

LLAMA = [(14336, 4096), (4096, 4096), (4096, 14336)]
TINYLLAMA = [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)]
BATCHES = [1, 16, 4096, 4, 64, 256]
"""Batch sizes with a target come first, in case time runs out."""
DENSITIES = [0.01, 0.02, 0.05]
"""Densities besides 0, a layer without an ortho stream, whose alpha is null."""
TARGETS = {
    ((14336, 4096), 1): {(0.01, 0.0): 3.0, (0.01, 1.0): 2.8, (0.05, 1.0): 2.3},
    ((14336, 4096), 16): {(0.01, 0.0): 2.6, (0.01, 1.0): 2.4, (0.05, 1.0): 2.0},
    ((14336, 4096), 4096): {(0.01, 0.0): 0.9, (0.01, 1.0): 0.9, (0.05, 1.0): 0.9},
    ((4096, 4096), 1): {(0.01, 0.0): 2.2},
}
"""Target speeds on an H200: the time of cuBLAS BF16 over ours."""
CALLS, FEW_CALLS = 12, 2
"""Least number of calls in a graph, so that its launch is negligible; fewer where a call takes long."""
_FOR_CHECKS = 0.5
"""Share of the time for the checks; most of it goes into compilations."""
_BETWEEN = (33, 1024)
"""Range of rows for which both paths are timed, to see where they cross."""


class Run:
    """The results so far, the time left, and the file of the results."""

    def __init__(self, path: Path, seconds: float, head: dict[str, Any]) -> None:
        self.path = path
        self.end = time.monotonic() + seconds
        self.results: dict[str, Any] = head | {
            "checks": [],
            "rows": [],
            "null_tests": [],
            "targets": [],
            "left_out": [],
        }

    def get_seconds_left(self) -> float:
        """Returns the seconds that are left."""
        return self.end - time.monotonic()

    def save(self) -> None:
        """Writes the results so far; an interrupted run leaves the last complete file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n", "utf-8")
        partial.replace(self.path)

    def add(self, kind: str, record: dict[str, Any]) -> None:
        self.results[kind].append(record)
        self.save()


def log(line: str) -> None:
    print(line, flush=True)


def describe_run(device: Device, seed: int) -> dict[str, Any]:
    """Describes device, versions and command, to interpret the figures."""
    now = datetime.datetime.now(datetime.UTC)
    about: dict[str, Any] = {
        "date": now.date().isoformat(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "device": "CPU, Triton's interpreter (dry run)",
        "seed": seed,
        "command": "python " + " ".join(["benchmarks/gpu.py", *sys.argv[1:]]),
    }
    if device.kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about["device"] = properties.name
        about["versions"]["cuda"] = torch.version.cuda
        about["multiprocessors"] = properties.multi_processor_count
        about["memory_gb"] = round(properties.total_memory / 1e9, 1)
        about["l2_cache_mb"] = round(device.cache_bytes / 1e6, 1)
        about["tuning"] = str(tuning.settings(properties.name)["device"])
    return about


def make_variants(
    device: Device, shape: tuple[int, int], batch: int, seed: int
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yields a description of each variant and a function that makes its calls; ``bf16`` and the base stream first."""
    x = torch.randn(batch, shape[1], device=device.kind).bfloat16()
    yield {"variant": "bf16"}, lambda: dense_calls(x, rotated_dense(device, shape, seed))
    few = batch <= rotated(device, shape, 0.0, seed)[0].fused_rows
    both = _BETWEEN[0] <= batch <= _BETWEEN[1]
    for path in ("fused", "dense") if both else ("fused" if few else "dense",):
        about = {"variant": "ours", "kernel": path, "density": 0.0, "alpha": None}
        yield about, lambda path=path: our_calls(x, rotated(device, shape, 0.0, seed), None, path)
        for density, alpha in product(DENSITIES if device.kind == "cuda" else DENSITIES[:1], (0.0, 1.0)):
            about = {"variant": "ours", "kernel": path, "density": density, "alpha": alpha}
            yield (
                about,
                lambda d=density, a=alpha, path=path: our_calls(x, rotated(device, shape, d, seed), a, path),
            )
    if batch <= 256:  # it is meant for few rows: at 4096 it would take as long as all others together
        yield {"variant": "int4pack"}, lambda: int4pack_calls(x, stored_layer(shape, 0.0, device.kind, seed), device)


def get_min_calls(device: Device, batch: int) -> int:
    """Returns the least number of calls in a graph."""
    return 1 if device.kind == "cpu" else CALLS if batch <= 256 else FEW_CALLS


def measure(run: Run, device: Device, shape: tuple[int, int], batch: int, *, seed: int, rounds: int) -> None:
    """Times every variant of one shape and batch; one that fails is recorded with its error."""
    timed: list[tuple[dict[str, Any], Timed]] = []
    for about, make in make_variants(device, shape, batch, seed):
        about = {"shape": list(shape), "batch": batch, **about}
        try:
            timed.append((about, capture(device, make(), get_min_calls(device, batch))))
        except Exception as error:
            run.add("rows", about | {"error": f"{type(error).__name__}: {str(error)[:300]}"})
            if device.kind == "cuda":
                torch.cuda.synchronize()
    interleaved(device, [one for _, one in timed], rounds)
    bf16 = next((one for about, one in timed if about["variant"] == "bf16"), None)
    for about, one in timed:
        figures: dict[str, Any] = {"median_us": one.median * 1e6}
        if bf16 is not None:
            figures["ratio_bf16"] = bf16.median / one.median
        figures["gb_s"] = count_weight_bytes(shape, about) / one.median / 1e9
        figures["tflop_s"] = 2 * batch * shape[0] * shape[1] / one.median / 1e12
        run.results["rows"].append(about | figures)
        log(format_row(about | figures))
    run_null_tests(run, timed)
    compare_with_targets(run, shape, batch)
    run.save()


def count_weight_bytes(shape: tuple[int, int], about: dict[str, Any]) -> float:
    """Counts the bytes of weights that a product has to read once."""
    weights = shape[0] * shape[1]
    if about["variant"] == "bf16":
        return 2.0 * weights
    sparse = 4.0 * weights * about["density"] if about.get("alpha") else 0.0
    return weights * (0.5 + 2 / 64) + sparse


def format_row(row: dict[str, Any]) -> str:
    alpha = "-" if row.get("alpha") is None else f"{row['alpha']:g}"
    name = f"{row['variant']}{'.' + row['kernel'] if 'kernel' in row else ''}"
    return (
        f"{row['shape'][0]:>6} x {row['shape'][1]:<6} batch {row['batch']:<5} {name:<12} "
        f"density {100 * row.get('density', 0.0):g} % alpha {alpha:<3} {row['median_us']:>9.1f} us  "
        f"x {row.get('ratio_bf16', float('nan')):5.2f} of bf16  {row['gb_s']:7.0f} GB/s  {row['tflop_s']:6.1f} TFLOP/s"
    )


def run_null_tests(run: Run, timed: list[tuple[dict[str, Any], Timed]]) -> None:
    """Compares alpha=0 at a density of 1 % with the same kernel without an ortho stream."""
    for path in ("fused", "dense"):
        ours = {(about["density"], about["alpha"]): one for about, one in timed if about.get("kernel") == path}
        if (0.0, None) in ours and (0.01, 0.0) in ours:
            about = next(about for about, _ in timed if about.get("kernel") == path)
            record = {"shape": about["shape"], "batch": about["batch"], "kernel": path}
            run.results["null_tests"].append(record | paired_ratio(ours[0.01, 0.0], ours[0.0, None]))


def compare_with_targets(run: Run, shape: tuple[int, int], batch: int) -> None:
    """Compares the best path of this shape and batch with its targets."""
    for (density, alpha), target in TARGETS.get((shape, batch), {}).items():
        ratios = [
            row["ratio_bf16"]
            for row in run.results["rows"]
            if (row["shape"], row["batch"]) == (list(shape), batch)
            and (row.get("density"), row.get("alpha")) == (density, alpha)
            and "ratio_bf16" in row
        ]
        reached = max(ratios, default=None)
        record = {"shape": list(shape), "batch": batch, "density": density, "alpha": alpha, "wanted": target}
        run.results["targets"].append(record | {"reached": reached, "met": reached is not None and reached >= target})
        figure = "not measured" if reached is None else f"{reached:.2f}"
        log(f"  target {shape[0]} x {shape[1]} batch {batch} density {density:g} alpha {alpha:g}: {figure} of {target}")


def list_cases(dry: bool) -> Iterator[tuple[tuple[int, int], int]]:
    """Yields shapes and batches, those with targets first."""
    if dry:
        yield from [((32, 256), batch) for batch in (1, 40)]
        return
    for shapes in (LLAMA, TINYLLAMA):
        for batch in BATCHES:
            for shape in shapes:
                yield shape, batch


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results", help="folder of the results")
    parser.add_argument("--seconds", type=float, default=510.0, help="time limit of the run")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="search settings before the timings, and use them")
    parser.add_argument("--tune-seconds", type=float, default=240.0, help="time for the search, out of the whole")
    parser.add_argument("--tuning-folder", type=Path, default=tuning.FOLDER, help="where --tune writes")
    parser.add_argument("--skip-checks", action="store_true", help="skip the checks")
    parser.add_argument("--skip-timings", action="store_true", help="skip the timings")
    parser.add_argument("--dry-run", action="store_true", help="run tiny shapes on the CPU")
    return parser.parse_args()


def report_check(run: Run, record: dict[str, Any]) -> None:
    """Prints and stores one check."""
    log(f"  {record}")
    run.add("checks", record)


def tune_device(run: Run, device: Device, options: argparse.Namespace) -> None:
    """Searches the settings, writes the tuning file, and loads it for the timings."""
    until = run.get_seconds_left() - options.tune_seconds
    left: Callable[[], float] = lambda: run.get_seconds_left() - until  # noqa: E731
    shapes = [(32, 256)] if options.dry_run else [LLAMA[0], LLAMA[1], LLAMA[2], *TINYLLAMA]
    path = write(tune(device, shapes, options.seed, left, log), options.tuning_folder)
    for function in (tuning.settings, tuning.order, tuning.launch):
        function.cache_clear()
    run.results["tuning"] = path.name
    log(f"settings written to {path}")


def main() -> int:
    options = parse_arguments()
    if not options.dry_run and not torch.cuda.is_available():
        log("no CUDA device; --dry-run goes through the same steps on the CPU")
        return 2
    torch.manual_seed(options.seed)
    device = Device.here(options.dry_run)
    about = describe_run(device, options.seed)
    name = f"{about['date']}-gpu-{'dry-run' if options.dry_run else tuning.file_name(about['device'])[:-5]}.json"
    run = Run(options.out / name, options.seconds, about)
    with torch.inference_mode():
        if not options.skip_checks:
            enough = _FOR_CHECKS * options.seconds
            run_checks(
                device,
                options.seed,
                partial(report_check, run),
                lambda: run.get_seconds_left() > options.seconds - enough,
            )
        if options.tune:
            tune_device(run, device, options)
        if not options.skip_timings:
            run.results["peak"] = bandwidth(device)
            log(f"  {run.results['peak']}")
            run_timings(run, device, options)
    run.results["seconds"] = round(options.seconds - run.get_seconds_left(), 1)
    run.save()
    failed = [record["check"] for record in run.results["checks"] if not record["ok"]]
    log(f"{len(run.results['checks']) - len(failed)} checks passed, {len(failed)} failed: {', '.join(failed) or '-'}")
    log(f"written to {run.path}")
    return 1 if failed else 0


def run_timings(run: Run, device: Device, options: argparse.Namespace) -> None:
    """Times every case for which there is time, and records the others."""
    slowest = 0.0
    for shape, batch in list_cases(options.dry_run):
        if run.get_seconds_left() < 1.5 * slowest + 2:
            run.results["left_out"].append({"shape": list(shape), "batch": batch, "reason": "out of time"})
            continue
        begin = time.monotonic()
        try:
            measure(run, device, shape, batch, seed=options.seed, rounds=options.rounds)
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:300]}"
            run.add("left_out", {"shape": list(shape), "batch": batch, "reason": why})
            log(f"  {shape} batch {batch}: {why}")
        slowest = max(slowest, time.monotonic() - begin)
        if device.kind == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
