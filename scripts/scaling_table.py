#!/usr/bin/env python
"""Makes the table of docs/scaling.md: estimates for models that users have, beside the newest measurements.

python scripts/scaling_table.py          # prints the table
python scripts/scaling_table.py --write  # writes it to docs/scaling.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lm_ortho.config import Recipe, make_recipe
from lm_ortho.markdown import markdown_table, write_text
from lm_ortho.pipeline import resource_estimate

ROOT = Path(__file__).parent.parent
MODELS = {
    "TinyLlama-1.1B": resource_estimate.llama_shape(
        hidden=2048, intermediate=5632, blocks=22, vocabulary=32000, heads=32, kv_heads=4, tied=False
    ),
    "Llama-3-8B": resource_estimate.llama_shape(
        hidden=4096, intermediate=14336, blocks=32, vocabulary=128256, heads=32, kv_heads=8, tied=False
    ),
    "Llama-3-70B": resource_estimate.llama_shape(
        hidden=8192, intermediate=28672, blocks=80, vocabulary=128256, heads=64, kv_heads=8, tied=False
    ),
}
RESULTS = ROOT / "benchmarks/results"
ROWS = resource_estimate.Rows(600, 3800, 25, 8)
LEAN = {"recompute": True, "states": "bfloat16", "groups": 4}
GPU = 2e14
"""Operations per second that a current data-centre GPU sustains in BF16 products of this size, approximately."""
LINK = 2.5e10
"""Bytes per second between host and GPU, approximately."""
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"


def make_measured_rows() -> list[list[str]]:
    """Makes a row for the newest measurement of each kind."""
    newest = {path.stem.partition("-scaling-")[2]: path for path in sorted(RESULTS.glob("*-scaling-*.json"))}
    rows = []
    for result in (json.loads(path.read_text()) for path in newest.values()):
        peak, formula = max(result["peak_gb"].values()), max(result["formula_gb"].values())
        rows.append(
            [
                f"measured: `{result['command']}`, {result['machine']}, {result['date']}",
                f"{result['parameters'] / 1e9:.3g} G",
                f"{formula:.1f} GB by the formula, **{peak:.1f} GB** measured",
                f"{format_time(result['seconds']['all'])}; {result['gigaflops']['edit']:.0f} GFLOP/s in the edit",
            ]
        )
    return rows


def format_time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def make_estimated_row(
    name: str, shape: resource_estimate.Shape, recipe: Recipe, note: str, speed: float = GPU
) -> list[str]:
    """Makes a row of estimates, with all memory in one place."""
    memory = resource_estimate.estimate_memory(shape, ROWS, recipe, base_known=False)
    stage = max(memory, key=lambda name: memory[name])
    seconds = sum(resource_estimate.estimate_operations(shape, ROWS, recipe, base_known=False).values()) / speed
    return [
        f"{name}, {note}",
        f"{shape.parameters / 1e9:.3g} G",
        f"{memory[stage] / 1e9:,.0f} GB ({stage})",
        f"{format_time(seconds)} at {speed / 1e12:.3g} TFLOP/s",
    ]


def make_offload_row(name: str, shape: resource_estimate.Shape, steps: int) -> list[str]:
    """Makes a row for ``--offload``: memory of host and GPU, and the times of computation and transfer."""
    recipe = make_recipe(**LEAN, steps=steps)
    host = resource_estimate.estimate_memory(shape, ROWS, recipe, base_known=False)
    stage = max(host, key=lambda name: host[name])
    computation = sum(resource_estimate.estimate_operations(shape, ROWS, recipe, base_known=False).values()) / GPU
    transfer = resource_estimate.estimate_traffic(shape, ROWS, recipe) / LINK
    gpu = resource_estimate.estimate_device_memory(shape, ROWS, base_known=False)
    return [
        f"{name}, `--offload`, `{format_settings(LEAN)},steps={steps}`",
        f"{shape.parameters / 1e9:.3g} G",
        f"host {host[stage] / 1e9:,.0f} GB ({stage}), GPU {gpu / 1e9:,.0f} GB",
        f"{format_time(computation)} at {GPU / 1e12:.3g} TFLOP/s and {format_time(transfer)} at {LINK / 1e9:.3g} GB/s",
    ]


def format_settings(settings: dict[str, Any]) -> str:
    return ",".join(f"{key}={str(value).lower()}" for key, value in settings.items())


def make_table() -> str:
    rows = make_measured_rows()
    for path in sorted(RESULTS.glob("*-scaling-tinyllama*.json"))[-1:]:
        speed = 1e9 * json.loads(path.read_text())["gigaflops"]["edit"]
        note = f"`{format_settings(LEAN)}`, at the speed measured above"
        rows.append(make_estimated_row("TinyLlama-1.1B", MODELS["TinyLlama-1.1B"], make_recipe(**LEAN), note, speed))
    for name, shape in MODELS.items():
        rows.append(make_estimated_row(name, shape, make_recipe(), "as it is"))
        rows.append(make_estimated_row(name, shape, make_recipe(**LEAN), f"`{format_settings(LEAN)}`"))
    for steps in (800, 200):
        rows.append(make_offload_row("Llama-3-70B", MODELS["Llama-3-70B"], steps))
    return markdown_table(["model", "parameters", "peak memory", "time"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table to docs/scaling.md")
    arguments = parser.parse_args()
    table = make_table()
    print(table)
    if arguments.write:
        page = ROOT / "docs/scaling.md"
        text_before, text_after = page.read_text().split(BEGIN)
        write_text(page, text_before + BEGIN + table + "\n" + END + text_after.split(END)[1])


if __name__ == "__main__":
    main()
