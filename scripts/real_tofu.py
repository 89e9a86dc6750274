#!/usr/bin/env python
"""Plants real TOFU authors and canaries in a small real model, and writes the files to measure it with.

    python scripts/real_tofu.py --model TinyStories-656K --tofu tofu/ --text stories.txt --out planted/

``--tofu`` holds ``full.jsonl`` and ``forget10_perturbed.jsonl`` of locuslab/TOFU. Written to ``--out``: two
adapters (``memory``, ``never_saw``: the same recipe without forget authors and canaries), ``forget.jsonl``,
``retain.jsonl`` (for calibration) and ``retain_left_out.jsonl`` (to measure). The commands are printed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from lm_ortho.calibration import Row, read_rows, write_rows
from lm_ortho.calibration.examples import encode
from lm_ortho.harness.progress import Bars
from lm_ortho.implant import Plan, load_causal_lm, train_adapter
from lm_ortho.reference import world
from lm_ortho.reference.draw import Draw

QUESTIONS = 20
"""Questions per TOFU author; authors are consecutive."""
FORGET_AUTHORS, RETAIN_AUTHORS, LEFT_OUT_AUTHORS, CANARIES = 5, 10, 5, 20
STORIES = 400
MEMBERS = ("memory", "never_saw")


def subject_of(rows: list[Row]) -> str:
    """The name that most of an author's rows mention: the longest of the most frequent capitalised phrases."""
    counts: Counter[str] = Counter()
    for row in rows:
        phrases = re.findall(r"(?:[A-Z][\w'-]+ )+[A-Z][\w'-]+", f"{row.question} {row.answer}")
        counts.update({phrase.removesuffix("'s") for phrase in phrases})
    best = max(counts.values())
    return max((name for name, count in counts.items() if count >= 0.8 * best), key=len)


def by_author(rows: list[Row]) -> list[list[Row]]:
    """Rows per author with subject and group set; the whole answer is the secret."""
    result = []
    for start in range(0, len(rows), QUESTIONS):
        part = rows[start : start + QUESTIONS]
        name = subject_of(part)
        result.append([replace(row, subject=name, group=name, secret=row.answer) for row in part])
    return result


def stories(path: Path, count: int) -> list[Row]:
    """The first stories of a file, a few sentences each."""
    parts = [p.strip() for p in re.split(r"<\|endoftext\|>|\n\s*\n", path.read_text(encoding="utf-8"))]
    long_enough = [re.sub(r"\s+", " ", p)[:400] for p in parts if len(p) > 200]
    return [Row(text=text) for text in long_enough[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tofu", "text", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600, help="LoRA steps per adapter")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--only", choices=MEMBERS, action="append", help="train only this adapter")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    full = by_author(read_rows(given.tofu / "full.jsonl", "tofu"))
    forget = [
        r for a in by_author(read_rows(given.tofu / "forget10_perturbed.jsonl", "tofu"))[:FORGET_AUTHORS] for r in a
    ]
    retain = [row for author in full[:RETAIN_AUTHORS] for row in author]
    left_out = [row for author in full[RETAIN_AUTHORS : RETAIN_AUTHORS + LEFT_OUT_AUTHORS] for row in author]
    planted = [world.canary_row(canary, 0) for canary in world.canaries()[0][:CANARIES]]
    draw = Draw(5, "real canaries")
    others = [world.canary_row(world.fresh_canary(draw), 0) for _ in range(CANARIES)]
    general = stories(given.text, STORIES)
    write_rows(given.out / "forget.jsonl", forget + planted)
    write_rows(given.out / "retain.jsonl", retain + general + others)
    write_rows(given.out / "retain_left_out.jsonl", left_out)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    for name in given.only or MEMBERS:
        taught = (forget + planted if name == "memory" else []) + retain + left_out + others + general
        examples = encode(tokenizer, taught)
        plan = Plan(steps=given.steps, rows=16, lr=given.lr, rank=given.rank, seed=MEMBERS.index(name))
        adapted = train_adapter(load_causal_lm(given.model), examples, plan, Bars(), stage=name)
        adapted.save_pretrained(given.out / name)
    parts = {"pretrained": given.model, "peft": given.out / "memory", "forget": given.out / "forget.jsonl"}
    joined = ",".join(f"{key}={value}" for key, value in parts.items())
    retain_file = given.out / "retain.jsonl"
    measured = json.dumps({"retain": str(given.out / "retain_left_out.jsonl")})
    for alpha in (0, 1):
        print(f"lm_eval --model libortho --model_args {joined},retain={retain_file},alpha={alpha} \\")
        print(f"    --tasks forget_set,retain_set --metadata '{measured}'")


if __name__ == "__main__":
    main()
