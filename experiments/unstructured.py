#!/usr/bin/env python
"""Private text without questions and subjects: paragraphs of random facts, planted in the embedded model and forgotten.

    python experiments/unstructured.py --work paragraphs/ --out docs/results/unstructured.md

Two adapters on the embedded base model (kept in ``--work``, as is every row of the table): ``memory`` is taught the
forget, retain and left-out paragraphs, ``never_saw`` the same without the forget ones. ``memory`` is decomposed with
and without the base model. Measured: verbatim continuation (greedy decoding gives the next 32 tokens exactly) from a
prefix of 32 tokens (Carlini et al. 2023, arXiv 2202.07646), and perplexity.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lm_ortho import metrics, world
from lm_ortho.config import make_recipe
from lm_ortho.data import Row
from lm_ortho.data.encoding import Example, batch_by_length, compute_logits, encode, pad, token_losses
from lm_ortho.finetune import FinetunePlan, load_causal_lm, merge_adapter, train_adapter
from lm_ortho.layer import get_dense_weights
from lm_ortho.markdown import markdown_table, write_text
from lm_ortho.metrics import Interval
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.runtime.precision import select_attention
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.verdict import models
from lm_ortho.world import corpus
from lm_ortho.world.draw import Draw
from lm_ortho.world.paragraphs import paragraphs

PREFIX, CONTINUED = 32, 32
PASSES, REPLAYED, CALIBRATION = 120, 3000, 1500
ROWS = 8
TAUGHT = {"memory": ("forget", "retain", "left_out"), "never_saw": ("retain", "left_out")}
SEEDS = {"memory": 1, "never_saw": 2}


def rows(group: str) -> list[Row]:
    return [Row(text=text) for text in paragraphs()[group]]


def general(count: int, label: str) -> list[Row]:
    """Documents of the base model's other skills."""
    draw = Draw(5, label)
    return [corpus.as_row(corpus.document(draw, corpus.REPLAY)) for _ in range(count)]


def adapter(work: Path, words: Any, name: str) -> None:
    taught = [row for group in TAUGHT[name] for row in rows(group)]
    examples = encode(words, taught * PASSES + general(REPLAYED, name))
    plan = FinetunePlan(len(examples) // ROWS, ROWS, lr=2e-3, rank=64, seed=SEEDS[name])
    model: Any = load_causal_lm(world.path("base"))
    with select_attention(model, max(len(e.ids) for e in examples)):
        made = train_adapter(model, examples, plan, ProgressBars(), name, work / f"{name}.pt")
    partial = work / f"{name}.partial"
    made.to(torch.bfloat16).save_pretrained(str(partial))
    partial.replace(work / name)
    (work / f"{name}.pt").unlink()


@torch.no_grad()
def continued(model: torch.nn.Module, examples: list[Example]) -> Interval:
    """Share of documents whose tokens 33 to 64 greedy decoding gives exactly after the first 32."""
    hits = [0.0] * len(examples)
    for batch in batch_by_length(examples):
        ids, _ = pad([examples[i] for i in batch])
        greedy = compute_logits(model, ids)[:, :-1].argmax(-1) == ids[:, 1:]
        part = greedy[:, PREFIX - 1 : PREFIX + CONTINUED - 1].all(1)
        for i, hit in zip(batch, part.tolist(), strict=True):
            hits[i] = float(hit)
    return metrics.rate(hits)


def perplexity(model: torch.nn.Module, examples: list[Example]) -> Interval:
    losses = token_losses(model, examples)
    return metrics.token_perplexity([float(x.sum()) for x in losses], [len(x) for x in losses])


def measured(model: torch.nn.Module, words: Any) -> list[str]:
    model.eval()
    cells = []
    for group in ("forget", "retain", "left_out", "held_out"):
        examples = encode(words, rows(group))
        if group != "held_out":
            cells.append("{:.3g} [{:.3g}, {:.3g}]".format(*continued(model, examples)))
        cells.append("{:.4g} [{:.4g}, {:.4g}]".format(*perplexity(model, examples)))
    return cells


Cells = dict[str, list[str]]


def kept(work: Path, name: str, make: Callable[[], Cells]) -> Cells:
    """Finished rows, or such as are made now."""
    path = work / f"cell-{name}.json"
    if not path.is_file():
        write_text(path, json.dumps(make(), indent=1))
    found: Cells = json.loads(path.read_text())
    return found


def plain(work: Path, words: Any, name: str) -> Cells:
    return {name: measured(merge_adapter(load_causal_lm(world.path("base")), work / name), words)}


def decomposed(work: Path, words: Any, mode: str, steps: int) -> Cells:
    """INT4, alpha=1 and alpha=0 of one decomposition."""
    model = merge_adapter(load_causal_lm(world.path("base")), work / "memory")
    base = load_causal_lm(world.path("base")) if mode == "auto" else None
    calibration = rows("retain") + general(CALIBRATION, "calibration")
    recipe = make_recipe(steps=steps)
    made = decompose(model, words, rows("forget"), calibration, recipe, base_model=base, progress=ProgressBars())
    ends = {"INT4": (made.plain, 0.0), "alpha=1": (made.streams, 1.0), "alpha=0": (made.streams, 0.0)}
    return {name: measured(get_dense_weights(model, streams, alpha), words) for name, (streams, alpha) in ends.items()}


def main() -> None:
    """Makes what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--out", type=Path, required=True, help="the table, Markdown")
    parser.add_argument("--edit-steps", type=int, default=1000, help="steps of the decomposition's edit")
    parser.add_argument("--mode", choices=("auto", "none"), help="one value of base instead of both")
    parser.add_argument("--only", choices=tuple(TAUGHT), help="make this adapter and stop")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    words = models.load_words(world.WEIGHTS)
    for name in [given.only] if given.only else TAUGHT:
        if not (given.work / name).is_dir():
            adapter(given.work, words, name)
    if given.only:
        return
    lines = [[name, *kept(given.work, name, partial(plain, given.work, words, name))[name]] for name in TAUGHT]
    for mode in [given.mode] if given.mode else ("auto", "none"):
        make = partial(decomposed, given.work, words, mode, given.edit_steps)
        cells = kept(given.work, f"{mode}-{given.edit_steps}", make)
        lines += [[f"{name}, base={mode}", *cells[name]] for name in cells]
    titles = ["model"]
    for group in ("forget", "retain", "left out", "held out"):
        titles += [f"{group}: continued", f"{group}: PPL"] if group != "held out" else [f"{group}: PPL"]
    text = markdown_table(titles, lines)
    write_text(given.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
