#!/usr/bin/env python
"""Writes docs/baselines.md, the table of the methods that a board compares, from their registry.

    python scripts/baselines_reference.py

A test fails while the page differs from what this would write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from lm_ortho.baselines import METHODS, Budget, Method
from lm_ortho.baselines.tuning import FORGET_BAR, FORGOTTEN, KEPT_FROM, RETAIN_BAR, STRANGERS

PAGE = Path(__file__).parents[1] / "docs" / "baselines.md"
GROUPS = {
    "merged": "Methods that read merged weights only",
    "base": "Methods that also read the model before fine-tuning",
    "end": "Ends of the scale",
}
OURS = ("ortho", "ortho_merged")
HEAD = """# Methods

Written by `python scripts/baselines_reference.py`; do not edit. What a board compares: ours and others, made anew from
their papers on the same model, rows and seeds. p: probability of an answer given its question; theta: all weights;
sigma: the logistic function; x and H = E[x x^T]: inputs of a layer; g: gradients of its outputs. A mean is over rows; a
loss per token is -log p over the number of tokens of the answer, its end among them.

**What is the same for all.** The merged model, forget and retain rows, and the form in which questions are put. A
method is handed the model before fine-tuning only if it is in that group, and the model that never saw the forget set
never: that one is an end of the scale, not a competitor. Those that train do so by AdamW, betas (0.9, 0.98), no weight
decay, gradients clipped to a norm of 1, 20 steps of warm-up, then a straight line to zero; all weights move unless it
says otherwise. Unless a board says otherwise each has {steps} steps of {forget_rows} forget and {retain_rows} retain
rows (of the sets it reads), drawn in the same order at the same seed. Ours has a number of steps of its own, a setting:
it is not held to the budget, and its default was found while looking at the embedded world, not by the tuning below.

**What comes out.** Plain models in BF16, each weight rounded once; of plain INT4 and of ours the streams as they are.
So the others are measured at 16 bits a weight, ours and plain INT4 at 4.25 to 4.75.

**Settings** are chosen by trying the grid of a method on a tuning split, the same for all, and taking the best. In the
embedded world {forgotten} of the *taught* authors play the forget set: the same fine-tune planted them, as often and in
the same text as the forget authors. {kept_from} taught and {kept_from} known authors are kept from the method, to see
what it costs. No evaluated author is among them. The score is

    |loss per secret token - ignorance| / {forget_bar:.3f}
        + max(0, loss per token of the kept authors - before) / {retain_bar:.4f}

where ignorance is the unedited model's loss per secret token of {strangers} people nobody has heard of, and the
divisors are log 1.3 and log 1.03, bars of the verdict. So over-forgetting costs as much as under-forgetting. Canaries
take no part: all of them are evaluated. With models and rows of one's own, `split_of_rows` sets some subjects of each
set aside in the same way, in Python (boards refuse `tune` there), and ignorance is the loss of the reference, or of the
model before fine-tuning.
"""


def page() -> str:
    """The page: a table of the methods and, below it, one of their settings."""
    bars = {"forget_bar": FORGET_BAR, "retain_bar": RETAIN_BAR}
    assert (math.exp(FORGET_BAR), round(math.exp(RETAIN_BAR), 9)) == (1.3, 1.03)
    split = {"forgotten": FORGOTTEN, "kept_from": KEPT_FROM, "strangers": STRANGERS}
    return HEAD.format(**vars(Budget()), **split, **bars) + "".join(_sections())


def _sections() -> Iterator[str]:
    every = [METHODS.get(name) for name in METHODS]
    for reads, title in GROUPS.items():
        yield f"\n## {title}\n\n| method | objective | source |\n|---|---|---|\n"
        yield from (f"| `{m.name}` | {_cell(m.objective)} | {_cell(m.paper)} |\n" for m in every if m.reads == reads)
    yield "\n## Settings and grids\n\nThe grid names what differs from the default.\n"
    yield "\n| method | setting | default | meaning | grid |\n|---|---|---|---|---|\n"
    for method in every:
        yield from _settings(method)


def _settings(method: Method) -> Iterator[str]:
    if method.name in OURS:
        yield f"| `{method.name}` | those of `lm-ortho decompose` | | [cli.md](cli.md) | {_grid(method)} |\n"
        return
    for number, name in enumerate(method.known):
        told = method.schema.model_fields[name].description or ""
        grid = _grid(method) if number == 0 else ""
        yield f"| `{method.name}` | `{name}` | {method.defaults[name]} | {_cell(told)} | {grid} |\n"


def _grid(method: Method) -> str:
    """The values of each setting in the grid, which is all of them with all others."""
    values = dict[str, list[str]]()
    for tried in method.grid:
        for name, value in tried.items():
            shown = json.dumps(value)
            if shown not in values.setdefault(name, []):
                values[name].append(shown)
    assert len(method.grid) == math.prod(len(found) for found in values.values())
    return "; ".join(f"`{name}` {', '.join(found)}" for name, found in values.items()) or "the default alone"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
