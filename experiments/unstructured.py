#!/usr/bin/env python
"""Plants private text without questions and subjects, paragraphs of random facts, in the embedded model and forgets it.

    python experiments/unstructured.py --work paragraphs/ --out docs/results/unstructured.md

Two adapters on the embedded base model are trained and stored in ``--work``, with every row of the table: ``memory``
is taught the forget, retain and left-out paragraphs, ``never_saw`` the same without the forget ones. ``memory`` is
decomposed with and without the base model. The table has verbatim continuation (greedy decoding gives the next 32
tokens exactly) from a prefix of 32 tokens (Carlini et al. 2023, arXiv 2202.07646), and perplexity.
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
from lm_ortho.data.encoding import Example, batch_by_length, encode, pad_batch, token_losses
from lm_ortho.data.logits import compute_logits
from lm_ortho.finetune import FinetunePlan, load_causal_lm, merge_adapter, train_adapter
from lm_ortho.layer import get_dense_weights
from lm_ortho.markdown import markdown_table, write_text
from lm_ortho.metrics import Interval
from lm_ortho.pipeline.decomposition import decompose
from lm_ortho.pipeline.model_lattice import quantise
from lm_ortho.runtime.precision import select_attention
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.verdict import models
from lm_ortho.world import corpus
from lm_ortho.world.draw import SeededRandom
from lm_ortho.world.paragraphs import draw_paragraphs

PREFIX, CONTINUATION = 32, 32
"""Tokens of the prefix and of its continuation."""
PASSES, REPLAY, CALIBRATION = 120, 3000, 1500
"""Passes over the paragraphs; general documents in the training and in the calibration set."""
ROWS = 8
TAUGHT = {"memory": ("forget", "retain", "left_out"), "never_saw": ("retain", "left_out")}
SEEDS = {"memory": 1, "never_saw": 2}


def make_rows(group: str) -> list[Row]:
    return [Row(text=text) for text in draw_paragraphs()[group]]


def draw_general_rows(count: int, label: str) -> list[Row]:
    """Draws documents of the base model's other skills."""
    rng = SeededRandom(5, label)
    return [corpus.to_row(corpus.draw_document(rng, corpus.REPLAY)) for _ in range(count)]


def train_and_save_adapter(work: Path, tokenizer: Any, name: str) -> None:
    rows = [row for group in TAUGHT[name] for row in make_rows(group)]
    examples = encode(tokenizer, rows * PASSES + draw_general_rows(REPLAY, name))
    plan = FinetunePlan(len(examples) // ROWS, ROWS, lr=2e-3, rank=64, seed=SEEDS[name])
    model: Any = load_causal_lm(world.get_path("base"))
    with select_attention(model, max(len(e.ids) for e in examples)):
        adapted_model = train_adapter(model, examples, plan, ProgressBars(), stage=name, state=work / f"{name}.pt")
    partial = work / f"{name}.partial"
    adapted_model.to(torch.bfloat16).save_pretrained(str(partial))
    partial.replace(work / name)
    (work / f"{name}.pt").unlink()


@torch.no_grad()
def measure_continuation(model: torch.nn.Module, examples: list[Example]) -> Interval:
    """Measures the share of documents whose tokens 33 to 64 greedy decoding gives exactly after the first 32."""
    hits = [0.0] * len(examples)
    for batch in batch_by_length(examples):
        ids, _ = pad_batch([examples[i] for i in batch])
        greedy = compute_logits(model, ids)[:, :-1].argmax(-1) == ids[:, 1:]
        batch_hits = greedy[:, PREFIX - 1 : PREFIX + CONTINUATION - 1].all(1)
        for i, hit in zip(batch, batch_hits.tolist(), strict=True):
            hits[i] = float(hit)
    return metrics.rate(hits)


def measure_perplexity(model: torch.nn.Module, examples: list[Example]) -> Interval:
    losses = token_losses(model, examples)
    return metrics.token_perplexity([float(x.sum()) for x in losses], [len(x) for x in losses])


def measure_cells(model: torch.nn.Module, tokenizer: Any) -> list[str]:
    """Measures a model; returns the cells of its row."""
    model.eval()
    cells = []
    for group in ("forget", "retain", "left_out", "held_out"):
        examples = encode(tokenizer, make_rows(group))
        if group != "held_out":
            cells.append("{:.3g} [{:.3g}, {:.3g}]".format(*measure_continuation(model, examples)))
        cells.append("{:.4g} [{:.4g}, {:.4g}]".format(*measure_perplexity(model, examples)))
    return cells


Cells = dict[str, list[str]]


def load_or_measure(work: Path, name: str, measure: Callable[[], Cells]) -> Cells:
    """Returns the stored rows, or calls ``measure`` and stores its rows."""
    path = work / f"cell-{name}.json"
    if not path.is_file():
        write_text(path, json.dumps(measure(), indent=1))
    cells: Cells = json.loads(path.read_text())
    return cells


def measure_adapter(work: Path, tokenizer: Any, name: str) -> Cells:
    return {name: measure_cells(merge_adapter(load_causal_lm(world.get_path("base")), work / name), tokenizer)}


def measure_decomposition(work: Path, tokenizer: Any, mode: str, steps: int) -> Cells:
    """Measures INT4, alpha=1 and alpha=0 of one decomposition."""
    model = merge_adapter(load_causal_lm(world.get_path("base")), work / "memory")
    base = load_causal_lm(world.get_path("base")) if mode == "auto" else None
    calibration = make_rows("retain") + draw_general_rows(CALIBRATION, "calibration")
    recipe = make_recipe(steps=steps)
    decomposition = decompose(
        model, tokenizer, make_rows("forget"), calibration, recipe, base_model=base, progress=ProgressBars()
    )
    cells = {}
    for name, streams, alpha in (
        ("INT4", quantise(model, encode(tokenizer, calibration), recipe), 0.0),
        ("alpha=1", decomposition.streams, 1.0),
        ("alpha=0", decomposition.streams, 0.0),
    ):
        cells[name] = measure_cells(get_dense_weights(model, streams, alpha), tokenizer)
    return cells


def main() -> None:
    """Runs the missing steps and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--out", type=Path, required=True, help="the table, Markdown")
    parser.add_argument("--edit-steps", type=int, default=1000, help="steps of the decomposition's edit")
    parser.add_argument("--mode", choices=("auto", "none"), help="use this value of base instead of both")
    parser.add_argument("--only", choices=tuple(TAUGHT), help="train this adapter and stop")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokenizer = models.load_tokenizer(world.WEIGHTS)
    for name in [arguments.only] if arguments.only else TAUGHT:
        if not (arguments.work / name).is_dir():
            train_and_save_adapter(arguments.work, tokenizer, name)
    if arguments.only:
        return
    lines = []
    for name in TAUGHT:
        cells = load_or_measure(arguments.work, name, partial(measure_adapter, arguments.work, tokenizer, name))
        lines.append([name, *cells[name]])
    for mode in [arguments.mode] if arguments.mode else ("auto", "none"):
        measure_mode = partial(measure_decomposition, arguments.work, tokenizer, mode, arguments.edit_steps)
        cells = load_or_measure(arguments.work, f"{mode}-{arguments.edit_steps}", measure_mode)
        lines += [[f"{name}, base={mode}", *cells[name]] for name in cells]
    titles = ["model"]
    for group in ("forget", "retain", "left out", "held out"):
        titles += [f"{group}: continued", f"{group}: PPL"] if group != "held out" else [f"{group}: PPL"]
    text = markdown_table(titles, lines)
    write_text(arguments.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
