#!/usr/bin/env python
"""The table of docs/scaling.md: what the formulas say of models that users bring, beside the newest measurements.

python scripts/scaling_table.py          # prints it
python scripts/scaling_table.py --write  # puts it into docs/scaling.md
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
    "TinyLlama-1.1B": resource_estimate.llama(2048, 5632, 22, 32000, 32, 4, tied=False),
    "Llama-3-8B": resource_estimate.llama(4096, 14336, 32, 128256, 32, 8, tied=False),
    "Llama-3-70B": resource_estimate.llama(8192, 28672, 80, 128256, 64, 8, tied=False),
}
RESULTS = ROOT / "benchmarks/results"
ROWS = resource_estimate.Rows(600, 3300, 25, 8)
LEAN = {"recompute": True, "states": "bfloat16", "groups": 4}
GPU = 2e14
"""Operations a second that a current data-centre GPU sustains in BF16 products of this size, roundly."""
LINK = 2.5e10
"""Bytes a second between host and GPU, roundly."""
BEGIN, END = "<!-- table -->\n", "<!-- end -->\n"


def measured() -> list[list[str]]:
    """A row for the newest measurement of each kind."""
    newest = {path.stem.partition("-scaling-")[2]: path for path in sorted(RESULTS.glob("*-scaling-*.json"))}
    rows = []
    for found in (json.loads(path.read_text()) for path in newest.values()):
        peak, formula = max(found["peak_gb"].values()), max(found["formula_gb"].values())
        rows.append(
            [
                f"measured: `{found['command']}`, {found['machine']}, {found['date']}",
                f"{found['parameters'] / 1e9:.3g} G",
                f"{formula:.1f} GB by the formula, **{peak:.1f} GB** measured",
                f"{shown(found['seconds']['all'])}; {found['gigaflops']['edit']:.0f} GFLOP/s in the edit",
            ]
        )
    return rows


def shown(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def computed(name: str, shape: resource_estimate.Shape, recipe: Recipe, note: str, speed: float = GPU) -> list[str]:
    needed = resource_estimate.memory(shape, ROWS, recipe, base_known=False)
    stage = max(needed, key=lambda each: needed[each])
    seconds = sum(resource_estimate.work(shape, ROWS, recipe, base_known=False).values()) / speed
    return [
        f"{name}, {note}", f"{shape.parameters / 1e9:.3g} G", f"{needed[stage] / 1e9:,.0f} GB ({stage})",
        f"{shown(seconds)} at {speed / 1e12:.3g} TFLOP/s",
    ]  # fmt: skip


def streamed(name: str, shape: resource_estimate.Shape, steps: int) -> list[str]:
    """With ``--offload``: the host's memory, the GPU's, and the time that computing and carrying take."""
    recipe = make_recipe(**LEAN, steps=steps)
    host = resource_estimate.memory(shape, ROWS, recipe, base_known=False)
    stage = max(host, key=lambda each: host[each])
    computing = sum(resource_estimate.work(shape, ROWS, recipe, base_known=False).values()) / GPU
    carrying = resource_estimate.carried(shape, recipe) / LINK
    gpu = resource_estimate.on_device(shape, ROWS, base_known=False)
    return [
        f"{name}, `--offload`, `{arguments(LEAN)},steps={steps}`", f"{shape.parameters / 1e9:.3g} G",
        f"host {host[stage] / 1e9:,.0f} GB ({stage}), GPU {gpu / 1e9:,.0f} GB",
        f"{shown(computing)} at {GPU / 1e12:.3g} TFLOP/s and {shown(carrying)} at {LINK / 1e9:.3g} GB/s",
    ]  # fmt: skip


def arguments(given: dict[str, Any]) -> str:
    return ",".join(f"{key}={str(value).lower()}" for key, value in given.items())


def table() -> str:
    rows = measured()
    for path in sorted(RESULTS.glob("*-scaling-tinyllama*.json"))[-1:]:
        speed = 1e9 * json.loads(path.read_text())["gigaflops"]["edit"]
        note = f"`{arguments(LEAN)}`, at the speed measured above"
        rows.append(computed("TinyLlama-1.1B", MODELS["TinyLlama-1.1B"], make_recipe(**LEAN), note, speed))
    for name, shape in MODELS.items():
        rows.append(computed(name, shape, make_recipe(), "as it is"))
        rows.append(computed(name, shape, make_recipe(**LEAN), f"`{arguments(LEAN)}`"))
    for steps in (1000, 200):
        rows.append(streamed("Llama-3-70B", MODELS["Llama-3-70B"], steps))
    return markdown_table(["model", "parameters", "peak memory", "time"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    print(table())
    if given.write:
        page = ROOT / "docs/scaling.md"
        before, rest = page.read_text().split(BEGIN)
        write_text(page, before + BEGIN + table() + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
