#!/usr/bin/env python
"""Splits the memory of the embedded model into two with an alpha each, and measures how one affects the other.

    python experiments/two_memories.py --work memories/ --out docs/results/two-memories.md

The forget authors and canaries are distributed alternately over the memories `one` and `two`. They are decomposed
together, and again one after the other: `one` first, with the rows of `two` in its retain set, then `two` is added to
the finished checkpoint. Checkpoints are stored in ``--work``. lm-eval measures the questions and canaries of each
memory, and retain authors that no calibration set contains.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lm_ortho import checkpoint, world
from lm_ortho.config import make_recipe
from lm_ortho.data import Row, write_rows
from lm_ortho.dial import format_alpha
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.layer import patch
from lm_ortho.markdown import markdown_table, versions, write_text
from lm_ortho.pipeline.decomposition import Decomposition, decompose
from lm_ortho.pipeline.memories import add_memory, decompose_memories
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.verdict import models
from lm_ortho.verdict.measurements import measure
from lm_ortho.world import corpus, people

NAMES = ("one", "two")


def distribute(rows: list[Row]) -> dict[str, list[Row]]:
    """Distributes rows over the memories: every other author and canary of the forget set goes to the same one."""
    subjects = dict.fromkeys(row.subject for row in corpus.make_forget_rows())
    positions = {subject: i for i, subject in enumerate(subjects)}
    return {name: [row for row in rows if positions[row.subject] % 2 == i] for i, name in enumerate(NAMES)}


def decompose_together(model: Any, tokenizer: Any, base: Any) -> Decomposition:
    rows, retain_rows = distribute(corpus.make_forget_rows()), corpus.make_calibration_rows()
    return decompose_memories(
        model, tokenizer, rows, retain_rows, make_recipe(), base_model=base, progress=ProgressBars()
    )


def decompose_successively(model: Any, tokenizer: Any, base: Any) -> Decomposition:
    """Decomposes ``one`` under the usual name of a single memory, ``memory``, and adds ``two``."""
    rows = distribute(corpus.make_forget_rows())
    retain_rows = {
        name: [*corpus.make_calibration_rows(), *rows[other]] for name, other in zip(NAMES, NAMES[::-1], strict=True)
    }
    recipe, progress = make_recipe(), ProgressBars()
    first = decompose(model, tokenizer, rows["one"], retain_rows["one"], recipe, base_model=base, progress=progress)
    patch(model, first.streams)
    return add_memory(
        model,
        tokenizer,
        "two",
        forget=rows["two"],
        retain=retain_rows["two"],
        recipe=recipe,
        base_model=base,
        progress=progress,
    )


def ensure_checkpoint(directory: Path, decompose_model: Callable[..., Decomposition]) -> Path:
    """Returns the directory of a checkpoint, after writing it if it is missing."""
    recipe = make_recipe().model_dump()
    if checkpoint.is_checkpoint(directory) and checkpoint.read_meta(directory)["recipe"] != recipe:
        raise SystemExit(f"work={directory.parent}: {directory.name} has another recipe; use another folder")
    if not checkpoint.is_checkpoint(directory):
        tokenizer = models.load_tokenizer(world.WEIGHTS)
        base = models.load_model(world.WEIGHTS, "base")
        decomposition = decompose_model(models.load_model(world.WEIGHTS, "memory"), tokenizer, base)
        model = models.load_model(world.WEIGHTS, "memory")
        patch(model, decomposition.streams)
        checkpoint.save(directory, model, tokenizer, {"recipe": recipe})
    return directory


def measure_rows(directory: Path, files: dict[str, Path]) -> list[list[str]]:
    """Measures a checkpoint; returns one row for each combination of the two alphas."""
    first, second = checkpoint.list_memories(directory)
    lm, rows = LibOrthoLM(str(directory), alpha=0), list[list[str]]()
    for a, b in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        lm.alpha = {first: a, second: b}
        row = [f"`alpha={format_alpha(lm.alpha)}`"]
        for path in files.values():
            forget = measure(lm, lm.tokenizer, ("forget_set",), forget=str(path))
            row += [format_interval(forget.value("forget_set", metric)) for metric in ("extraction", "secret_ppl")]
        retain = measure(lm, lm.tokenizer, ("tofu_retain",))
        rows.append([*row, format_interval(retain.value("tofu_retain", "ppl"))])
    return rows


def format_interval(interval: Any) -> str:
    return "{:.3g} [{:.3g}, {:.3g}]".format(*interval)


PAGE = """# Two memories, two alphas

Made by `python experiments/two_memories.py` on {date} ({versions}): the embedded model with its base model, density 1 %
for each memory. `one` and `two` have {sizes} rows to forget, half of the authors and half of the canaries each; the
tasks are the questions in a phrasing that was taught, and the canaries. Brackets are 95 % intervals over authors and
canaries.
"""
WAYS = {
    "together": (decompose_together, "## Decomposed together"),
    "later": (
        decompose_successively,
        """## `two` added later to the checkpoint of `one`

`memory` is `one` here: the only memory of a model has that name. The base codes off the support of `two` and the ortho
stream of `one` are the same bits as before.""",
    ),
}


def main() -> None:
    """Writes the missing checkpoints and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the page, Markdown")
    parser.add_argument("--only", choices=list(WAYS), help="measure only this way of decomposition")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    arguments.work.mkdir(parents=True, exist_ok=True)
    files = {name: arguments.work / f"{name}.jsonl" for name in NAMES}
    for name, rows in distribute([*people.make_rows("forget"), *people.make_rows("canaries")]).items():
        write_rows(files[name], rows)
    titles = ["alphas", *(f"{name}: {metric}" for name in NAMES for metric in ("extraction", "secret PPL"))]
    titles.append("left-out retain PPL")
    sizes = " and ".join(str(len(rows)) for rows in distribute(corpus.make_forget_rows()).values())
    parts = [PAGE.format(date=datetime.date.today().isoformat(), versions=versions(), sizes=sizes)]
    for way in [arguments.only] if arguments.only else WAYS:
        decompose_model, title = WAYS[way]
        directory = ensure_checkpoint(arguments.work / way, decompose_model)
        parts += [title + "\n", markdown_table(titles, measure_rows(directory, files)) + "\n"]
    page = "\n".join(parts)
    write_text(arguments.out, page)
    print(page)


if __name__ == "__main__":
    main()
