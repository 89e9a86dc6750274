#!/usr/bin/env python
"""Private text without questions and subjects: paragraphs of random facts, planted in the embedded model and forgotten.

    python scripts/unstructured.py --work paragraphs/ --out docs/results/unstructured.md

Three adapters on the embedded base model (kept in ``--work``): ``memory`` is taught the forget, retain and left-out
paragraphs, ``never_saw`` and ``never_saw_2`` the same without the forget ones. ``memory`` is decomposed with and
without the base model. Measured: verbatim continuation (greedy decoding gives the next 32 tokens exactly) from a prefix
of 32 tokens (Carlini et al. 2023, arXiv 2202.07646), and perplexity.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from lm_ortho import metrics, reference
from lm_ortho.calibration import Row
from lm_ortho.calibration.examples import Example, encode, in_batches, logits_of, pad, token_losses
from lm_ortho.calibration.precision import attention_for
from lm_ortho.decompose import decompose
from lm_ortho.harness.progress import Bars
from lm_ortho.implant import Plan, load_causal_lm, merge_adapter, train_adapter
from lm_ortho.layer import dense_at
from lm_ortho.metrics import Interval
from lm_ortho.pages import markdown_table, write_text
from lm_ortho.reference import corpus
from lm_ortho.reference.draw import Draw
from lm_ortho.reference.paragraphs import paragraphs
from lm_ortho.settings import make_recipe
from lm_ortho.verdict import models

PREFIX, CONTINUED = 32, 32
PASSES, REPLAYED, CALIBRATION = 60, 12_000, 1500
ROWS = 16
TAUGHT = {
    "memory": ("forget", "retain", "left_out"),
    **dict.fromkeys(("never_saw", "never_saw_2"), ("retain", "left_out")),
}
SEEDS = {"memory": 1, "never_saw": 2, "never_saw_2": 3}


def rows(group: str) -> list[Row]:
    return [Row(text=text) for text in paragraphs()[group]]


def general(count: int, label: str) -> list[Row]:
    """Documents of the base model's other skills."""
    draw = Draw(5, label)
    return [corpus.as_row(corpus.document(draw, corpus.REPLAY)) for _ in range(count)]


def adapter(work: Path, words: Any, name: str) -> None:
    taught = [row for group in TAUGHT[name] for row in rows(group)]
    examples = encode(words, taught * PASSES + general(REPLAYED, name))
    plan = Plan(len(examples) // ROWS, ROWS, lr=1.5e-3, rank=32, seed=SEEDS[name])
    model: Any = load_causal_lm(reference.path("base"))
    with attention_for(model, max(len(e.ids) for e in examples)):
        made = train_adapter(model, examples, plan, Bars(), name, work / f"{name}.pt")
    partial = work / f"{name}.partial"
    made.to(torch.bfloat16).save_pretrained(str(partial))
    partial.replace(work / name)
    (work / f"{name}.pt").unlink()


@torch.no_grad()
def continued(model: torch.nn.Module, examples: list[Example]) -> Interval:
    """Share of documents whose tokens 33 to 64 greedy decoding gives exactly after the first 32."""
    hits = [0.0] * len(examples)
    for batch in in_batches(examples):
        ids, _ = pad([examples[i] for i in batch])
        greedy = logits_of(model, ids)[:, :-1].argmax(-1) == ids[:, 1:]
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


def main() -> None:
    """Makes what is missing and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--out", type=Path, required=True, help="the table, Markdown")
    parser.add_argument("--only", choices=tuple(TAUGHT), help="make this adapter and stop")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    words = models.load_words(reference.WEIGHTS)
    for name in [given.only] if given.only else TAUGHT:
        if not (given.work / name).is_dir():
            adapter(given.work, words, name)
    if given.only:
        return
    lines = list[list[str]]()
    for name in TAUGHT:
        model = merge_adapter(load_causal_lm(reference.path("base")), given.work / name)
        lines.append([name, *measured(model, words)])
    calibration = rows("retain") + general(CALIBRATION, "calibration")
    for mode in ("auto", "none"):
        model = merge_adapter(load_causal_lm(reference.path("base")), given.work / "memory")
        base = load_causal_lm(reference.path("base")) if mode == "auto" else None
        made = decompose(model, words, rows("forget"), calibration, make_recipe(), base_model=base, notify=Bars())
        lines.append([f"INT4, base={mode}", *measured(dense_at(model, made.plain, 0.0), words)])
        for alpha in (1.0, 0.0):
            name = f"alpha={alpha:g}, base={mode}, target {made.report['target']['name']}"
            lines.append([name, *measured(dense_at(model, made.streams, alpha), words)])
    titles = ["model"]
    for group in ("forget", "retain", "left out", "held out"):
        titles += [f"{group}: continued", f"{group}: PPL"] if group != "held out" else [f"{group}: PPL"]
    text = markdown_table(titles, lines)
    write_text(given.out, text + "\n")
    print(text)


if __name__ == "__main__":
    main()
