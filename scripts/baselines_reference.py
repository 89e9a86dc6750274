#!/usr/bin/env python
"""Writes docs/baselines.md, the table of the methods that a board compares, from their registry.

    python scripts/baselines_reference.py

A test fails while the page differs from the output of this script.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from lm_ortho.baselines import METHODS, Budget, Method
from lm_ortho.baselines.training import MICRO_BATCH_TOKENS
from lm_ortho.baselines.tuning import (
    FORGET_AUTHORS,
    FORGET_THRESHOLD,
    HELD_OUT_AUTHORS,
    RETAIN_THRESHOLD,
    UNKNOWN_AUTHORS,
)

PAGE = Path(__file__).parents[1] / "docs" / "baselines.md"
GROUPS = {
    "merged": "Methods that read merged weights only",
    "base": "Methods that also read the base model",
    "end": "Ends of the scale",
}
PACKAGE_METHODS = ("ortho", "ortho_merged")
HEAD = """# Methods

Written by `python scripts/baselines_reference.py`; do not edit. A board compares these methods: those of this package,
and baselines reimplemented from their papers for the same model, rows and seeds. p: probability of an answer given its
question; theta: all weights; sigma: the logistic function; x and H = E[x x^T]: inputs of a layer; g: gradients of its
outputs. A mean is over rows; a loss per token is -log p divided by the number of tokens of the answer, including its
end token.

**What all methods share.** The merged model, the forget and retain rows, and the prompt forms of the questions. A
method receives the base model (before fine-tuning) only if it is in that group, and never the retain-only model: that
one is an end of the scale, not a competitor. Methods that train use AdamW with betas (0.9, 0.98), no weight decay,
gradients clipped to a norm of 1, and 20 steps of warm-up followed by a linear decay to zero; all weights are trained
unless stated otherwise. Unless a board sets another budget, each has {steps} steps of {forget_rows} forget and
{retain_rows} retain rows (of the sets it reads), drawn in the same order at the same seed (`altpo` draws pairs of an
alternate and a true answer). `ortho` and `ortho_merged` have a number of steps of their own, a setting: the budget does
not limit them, and their default was chosen with the embedded world in view, not by the tuning below. Batches go
through the model in micro-batches of at most {micro_batch_tokens} tokens, which changes nothing but the memory needed.

**Equal cost.** A step does not cost the same for all methods: DPO puts two answers per question through the model,
UNDIAL asks the unedited model as well. With `tokens` in the place of `steps`, a budget gives each method as many steps
as the tokens pay for. A token counts 1 for its forward and backward pass, a third for a forward pass alone (of a
reference model, a teacher, of sampling), and in proportion to the blocks for a pass that ends at a block (`rmu`);
padding does not count. What a method does before its training is paid from the same tokens. The report of every model
(`method.json`) has its `tokens`, except for `ortho` and `ortho_merged`, which do not count them.

**Results.** Plain models are saved in BF16, each weight rounded once; plain INT4 and the methods of this package keep
their streams unchanged. So the baselines are measured at 16 bits per weight, plain INT4 at 4.25, and the methods of
this package at 5.2 to 5.3 with the default density of 2 %.

**Settings** are chosen by trying the grid of a method on a tuning split, the same for all methods, and taking the best.
In the embedded world {forget_authors} of the *taught* authors play the forget set: the same fine-tune planted them, as
often and in the same text as the forget authors. {held_out_authors} taught and {held_out_authors} known authors are
withheld from the method, to measure what it costs. No evaluated author is among them. The score is

    |loss per secret token - ignorance| / {forget_threshold:.3f}
        + max(0, loss per token of the withheld authors - loss before) / {retain_threshold:.4f}

where ignorance is the loss of the unedited model per secret token of {unknown_authors} invented authors, and the
divisors are log 1.3 and log 1.03, acceptance thresholds of the verdict. So forgetting too much costs as much as
forgetting too little. Canaries are not used for tuning: all of them are evaluated. With your own models and rows,
`split_rows` holds out some subjects of each set in the same way, in Python (boards refuse `tune` there), and ignorance
is the loss of the reference model, or else of the base model.
"""


def page() -> str:
    """The page: a table of the methods, followed by a table of their settings."""
    thresholds = {"forget_threshold": FORGET_THRESHOLD, "retain_threshold": RETAIN_THRESHOLD}
    assert (math.exp(FORGET_THRESHOLD), round(math.exp(RETAIN_THRESHOLD), 9)) == (1.3, 1.03)
    split = {
        "forget_authors": FORGET_AUTHORS,
        "held_out_authors": HELD_OUT_AUTHORS,
        "unknown_authors": UNKNOWN_AUTHORS,
    }
    budget = {**Budget().model_dump(), "micro_batch_tokens": MICRO_BATCH_TOKENS}
    return HEAD.format(**budget, **split, **thresholds) + "".join(_sections())


def _sections() -> Iterator[str]:
    methods = [METHODS.get(name) for name in METHODS]
    for reads, title in GROUPS.items():
        yield f"\n## {title}\n\n| method | objective | source |\n|---|---|---|\n"
        group = [method for method in methods if method.reads == reads]
        yield from (f"| `{m.name}` | {_cell(m.objective)} | {_cell(m.paper)} |\n" for m in group)
    yield "\n## Settings and grids\n\nThe grid lists the settings that differ from the default.\n"
    yield "\n| method | setting | default | meaning | grid |\n|---|---|---|---|---|\n"
    for method in methods:
        yield from _settings(method)


def _settings(method: Method) -> Iterator[str]:
    if method.name in PACKAGE_METHODS:
        yield f"| `{method.name}` | those of `lm-ortho decompose` | | [cli.md](cli.md) | {_grid(method)} |\n"
        return
    for number, name in enumerate(method.setting_names):
        description = method.schema.model_fields[name].description or ""
        grid = _grid(method) if number == 0 else ""
        yield f"| `{method.name}` | `{name}` | {method.defaults[name]} | {_cell(description)} | {grid} |\n"


def _grid(method: Method) -> str:
    """The values of each setting in the grid; the grid is their product."""
    values = dict[str, list[str]]()
    for settings in method.grid:
        for name, value in settings.items():
            text = json.dumps(value)
            if text not in values.setdefault(name, []):
                values[name].append(text)
    assert len(method.grid) == math.prod(len(texts) for texts in values.values())
    return "; ".join(f"`{name}` {', '.join(texts)}" for name, texts in values.items()) or "the default alone"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
