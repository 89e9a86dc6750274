#!/usr/bin/env python
"""Times every layer shape of Llama-3-8B and TinyLlama, and measures the limits of the machine; JSON and a chart.

    python benchmarks/layers.py                                  # about 15 minutes on one core
    python benchmarks/layers.py --shapes 4096x4096 --threads 2

Pin it to a core (``taskset -c 1``) on a shared machine. The results go to ``benchmarks/results/``. torchao's INT4 is
timed too, if it is installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from lm_ortho.bench import Plan, run
from lm_ortho.bench.layers import SHAPES
from lm_ortho.bench.problem import BITS, GROUP_SIZE
from lm_ortho.kernels import cpu
from lm_ortho.markdown import versions

RESULTS = Path(__file__).parent / "results"
COLOURS = {"ours": "#1f77b4", "int4pack_csr": "#d62728", "fp32": "#7f7f7f", "torchao_int4": "#9467bd"}


def main() -> None:
    arguments = _parse_arguments()
    shapes = tuple(shape for shape in SHAPES if not arguments.shapes or _format_shape(shape) in arguments.shapes)
    plan = Plan(
        shapes,
        tuple(arguments.batches),
        tuple(arguments.densities),
        threads=arguments.threads,
        seconds=arguments.seconds,
    )
    limits = measure_limits()
    report = run(plan, lambda line: print(line, file=sys.stderr, flush=True))
    report |= {"limits": limits, "date": str(datetime.date.today()), "versions": versions(), "group_size": GROUP_SIZE}
    for row in report["rows"]:
        row["share_of_limit"] = compute_share_of_limit(row, limits, arguments.threads)
    stem = (
        arguments.out or RESULTS / f"{report['date']}-layers-{arguments.threads}-thread{'s' * (arguments.threads > 1)}"
    )
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report, stem.with_suffix(".svg"))
    print(stem.with_suffix(".json"))


def measure_limits() -> dict[str, float | None]:
    """Measures bytes read and BF16 multiply-adds per second of one thread of this machine."""
    if isinstance(cpu.find(), cpu.MissingLibrary):
        return {"read_bytes_per_s": None, "products_per_s": None}
    return {"read_bytes_per_s": cpu.read_speed(), "products_per_s": cpu.product_speed()}


def compute_share_of_limit(row: dict[str, Any], limits: dict[str, float | None], threads: int) -> float | None:
    """Computes the least possible time over the median time of a row of ours; None for other rows.

    The least time is that of reading the streams once, or of the multiply-adds. The base stream has 4 bits per weight
    and a scale per group, the ortho stream 6 bytes per value, read only at alpha other than 0.
    """
    reading, products = limits["read_bytes_per_s"], limits["products_per_s"]
    if row["variant"] != "ours" or reading is None or products is None:
        return None
    weights = row["shape"][0] * row["shape"][1]
    values = weights * row["density"] if row["alpha"] else 0
    size = weights * BITS / 8 + weights * 2 / GROUP_SIZE + 6 * values
    least = max(size / reading, row["batch"] * (weights + values) / products / threads)
    return round(1e6 * least / row["median_us"], 3)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws the speed relative to BF16 ``F.linear`` over the batch size, one panel per shape."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in report["rows"]))
    columns = min(4, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4 * columns, 3.2 * lines), squeeze=False, sharey=True)
    for axis, shape in zip(axes.flat, shapes, strict=False):
        rows = [row for row in report["rows"] if tuple(row["shape"]) == shape and row["variant"] != "bf16"]
        for label in dict.fromkeys(_get_label(row) for row in rows):
            points = [(row["batch"], row["ratio_bf16"]) for row in rows if _get_label(row) == label]
            name, density, alpha = label
            style = {"ours": "-", "int4pack_csr": "--"}.get(name, ":")
            axis.plot(
                *zip(*points, strict=True),
                style,
                marker=".",
                color=COLOURS.get(name),
                alpha=1 - 10 * density,
                label=f"{name} {density:.0%}, alpha {alpha:g}",
            )
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set(xscale="log", yscale="log", title=f"{shape[0]} x {shape[1]}", xlabel="rows of x")
    axes[0, 0].set_ylabel("times BF16 F.linear")
    for axis in axes.flat[len(shapes) :]:
        axis.axis("off")
    axes[0, 0].legend(fontsize=6)
    figure.suptitle(f"{report['device']}, threads: {report['threads']}, {report['date']}")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def _get_label(row: dict[str, Any]) -> tuple[str, float, float]:
    return row["variant"], row["density"], row["alpha"]


def _format_shape(shape: Any) -> str:
    return f"{shape.out_features}x{shape.in_features}"


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", help="shapes as OUTxIN, such as 4096x4096; all by default")
    parser.add_argument("--batches", nargs="*", type=int, default=list(Plan().batches))
    parser.add_argument("--densities", nargs="*", type=float, default=list(Plan().densities))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=Plan().seconds, help="time for one shape at one batch size")
    parser.add_argument("--out", type=Path, help="path of the files without their suffix")
    return parser.parse_args()


if __name__ == "__main__":
    main()
