#!/usr/bin/env python
"""Two memories of the embedded model behind two dials: one off and the other on, and what that costs the other.

    python experiments/two_memories.py --work memories/ --out docs/results/two-memories.md

The forget authors and canaries are dealt out to the memories `one` and `two` in turn. They are decomposed together,
and again one after the other: `one` first, with the rows of `two` among those to be kept, then `two` is added to the
finished checkpoint. Checkpoints are kept in ``--work``. Measured with lm-eval: the questions and canaries of each
memory, and retain authors that calibration never showed.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lm_ortho import checkpoint, world
from lm_ortho.config import format_alpha, make_recipe
from lm_ortho.data import Row, write_rows
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


def dealt(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by memory: every other author and canary of the forget set, in its order, goes to the same one."""
    turn = {subject: i for i, subject in enumerate(dict.fromkeys(row.subject for row in corpus.forget_rows()))}
    return {name: [row for row in rows if turn[row.subject] % 2 == i] for i, name in enumerate(NAMES)}


def together(model: Any, words: Any, base: Any) -> Decomposition:
    rows = dealt(corpus.forget_rows())
    known = corpus.calibration_rows()
    return decompose_memories(model, words, rows, known, make_recipe(), base_model=base, progress=ProgressBars())


def one_by_one(model: Any, words: Any, base: Any) -> Decomposition:
    """``one`` keeps the usual name of a single memory, ``memory``; ``two`` comes later."""
    rows = dealt(corpus.forget_rows())
    kept = {name: [*corpus.calibration_rows(), *rows[other]] for name, other in zip(NAMES, NAMES[::-1], strict=True)}
    first = decompose(model, words, rows["one"], kept["one"], make_recipe(), base_model=base, progress=ProgressBars())
    patch(model, first.streams)
    recipe = make_recipe()
    return add_memory(model, words, "two", rows["two"], kept["two"], recipe, base_model=base, progress=ProgressBars())


def made(place: Path, how: Callable[..., Decomposition]) -> Path:
    """The checkpoint of one way, made if it is not there."""
    recipe = make_recipe().model_dump()
    if checkpoint.is_checkpoint(place) and checkpoint.read_meta(place)["recipe"] != recipe:
        raise SystemExit(f"work={place.parent}: {place.name} was made with another recipe; take another folder")
    if not checkpoint.is_checkpoint(place):
        words = models.load_words(world.WEIGHTS)
        base = models.load_model(world.WEIGHTS, "base")
        done = how(models.load_model(world.WEIGHTS, "memory"), words, base)
        model = models.load_model(world.WEIGHTS, "memory")
        patch(model, done.streams)
        checkpoint.save(place, model, words, {"recipe": recipe})
    return place


def cells(place: Path, asked: dict[str, Path]) -> list[list[str]]:
    """One row for each setting of the dials."""
    first, second = checkpoint.memories(place)
    lm, rows = LibOrthoLM(str(place), alpha=0), list[list[str]]()
    for a, b in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)):
        lm.alpha = {first: a, second: b}
        row = [f"`alpha={format_alpha(lm.alpha)}`"]
        for path in asked.values():
            found = measure(lm, lm.tokenizer, ("forget_set",), forget=str(path))
            row += [shown(found.value("forget_set", metric)) for metric in ("extraction", "secret_ppl")]
        kept = measure(lm, lm.tokenizer, ("tofu_retain",))
        rows.append([*row, shown(kept.value("tofu_retain", "ppl"))])
    return rows


def shown(interval: Any) -> str:
    return "{:.3g} [{:.3g}, {:.3g}]".format(*interval)


PAGE = """# Two memories, two dials

Made by `python experiments/two_memories.py` on {date} ({versions}): the embedded model, base known, density 1 % for
each memory. `one` and `two` hold {sizes} rows to forget, half of the authors and half of the canaries each; asked are
the questions in a phrasing that was taught and the canaries. Brackets are 95 % intervals over authors and canaries.
"""
WAYS = {
    "together": (together, "## Decomposed together"),
    "later": (
        one_by_one,
        """## `two` added later to the checkpoint of `one`

`memory` is `one` here: the only memory of a model has that name. The base codes off the support of `two` and the ortho
stream of `one` are the same bits as before.""",
    ),
}


def main() -> None:
    """Makes what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the page, Markdown")
    parser.add_argument("--only", choices=list(WAYS), help="one of the two ways")
    given = parser.parse_args()
    torch.manual_seed(0)
    given.work.mkdir(parents=True, exist_ok=True)
    asked = {name: given.work / f"{name}.jsonl" for name in NAMES}
    for name, rows in dealt([*people.rows("forget"), *people.rows("canaries")]).items():
        write_rows(asked[name], rows)
    titles = ["dials", *(f"{name}: {what}" for name in NAMES for what in ("extraction", "secret PPL"))]
    titles.append("left-out retain PPL")
    sizes = " and ".join(str(len(rows)) for rows in dealt(corpus.forget_rows()).values())
    parts = [PAGE.format(date=datetime.date.today().isoformat(), versions=versions(), sizes=sizes)]
    for way in [given.only] if given.only else WAYS:
        how, title = WAYS[way]
        parts += [title + "\n", markdown_table(titles, cells(made(given.work / way, how), asked)) + "\n"]
    page = "\n".join(parts)
    write_text(given.out, page)
    print(page)


if __name__ == "__main__":
    main()
