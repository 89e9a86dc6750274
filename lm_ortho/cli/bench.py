"""``lm-ortho bench``: measures the speed of the kernels on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Time one shape on one thread, in less than 50 seconds.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    threads: Annotated[int, typer.Option(help="Number of threads; --quick always uses one.", min=1)] = 1,
    kernel: Annotated[str, typer.Option(help="Kernel to time: auto, reference, cpu or triton.")] = "auto",
) -> None:
    """Time single layers of Llama-3-8B and TinyLlama on the CPU: two streams, BF16, FP32 and torch's INT4.

    Calls rotate through copies of the weights, so that no cache helps, and the variants are interleaved. The table has
    medians and the speed relative to BF16 F.linear of the same run: above 1 is faster. The null test compares alpha=0
    with a layer that has no ortho stream.
    """
    from dataclasses import replace

    from lm_ortho.bench import Plan, make_quick_plan, run
    from lm_ortho.errors import UserError
    from lm_ortho.kernels import KERNELS

    if kernel not in KERNELS:
        raise UserError(f"kernel={kernel!r} is unknown; known: {', '.join(KERNELS)}")
    plan = make_quick_plan(kernel) if quick else replace(Plan(kernel=kernel), threads=threads)
    report = run(plan, lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    from lm_ortho.markup import terminal_text

    console = Console(highlight=False)
    console.print(terminal_text(f"{report['device']}, threads: {report['threads']}"))
    for shape in sorted({tuple(row["shape"]) for row in report["rows"]}):
        console.print(f"\n{shape[0]} x {shape[1]}: microseconds (times BF16)")
        console.print(_table([row for row in report["rows"] if tuple(row["shape"]) == shape]))
    null = report["null_test"]
    console.print(f"\nnull test: alpha=0 takes {null['ratio']:.4f} [{null['low']:.4f}, {null['high']:.4f}] of the time")


def _table(rows: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    batches = sorted({row["batch"] for row in rows})
    table = Table(box=None, pad_edge=False)
    for column in ("variant", "density", "alpha", *(f"batch {batch}" for batch in batches)):
        table.add_column(column, justify="left" if column == "variant" else "right")
    cells: dict[tuple[str, float, float], dict[int, str]] = {}
    for row in rows:
        cell = f"{row['median_us']:,.0f} ({row['ratio_bf16']:.2f})"
        cells.setdefault((row["variant"], row["density"], row["alpha"]), {})[row["batch"]] = cell
    for (name, density, alpha), by_batch in cells.items():
        table.add_row(name, f"{density:.0%}", f"{alpha:g}", *(by_batch.get(batch, "-") for batch in batches))
    return table
