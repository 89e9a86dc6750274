#!/usr/bin/env python
"""TOFU-1000: fifty authors of TOFU planted in a small chat model, five of them forgotten by every method.

    python experiments/tofu_1000.py --model SmolLM2-135M-Instruct --tofu tofu/ --work work/ --out page.md

``--tofu`` is a directory with the JSONL files of locuslab/TOFU. Rows 0 to 899 and 3900 to 3999 of ``full`` are planted
by a LoRA fine-tune in the chat form of open-unlearning (``memory``); the last 100 are to be forgotten; ``twin`` is the
same fine-tune without them. Rows 3600 to 3699 are taught to no model. By the *published* protocol a method may read all
900 retain rows; by the *left-out* protocol rows 200 to 399 are in no calibration and are what is measured.

The stages: ``adapters`` trains memory and twin; ``decompose`` makes plain INT4 and our decompositions; ``methods``
tunes every other method on authors that are neither forgotten nor measured, and makes it with the operations that our
decomposition took; ``measure`` evaluates every model that is made, with the tasks of this package; ``page`` writes the
table. Everything is written to ``--work`` whole, so the command can be stopped at any time and goes on where it was.
``--only`` takes a name (``memory``), the name of a row, or a pattern such as ``published-*``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from tofu1000.adapters import train_memory_and_twin
from tofu1000.making import make_competitors, make_decompositions
from tofu1000.measuring import measure_entries
from tofu1000.page import write_page

from lm_ortho.errors import UserError
from lm_ortho.markdown import write_text

TRAINING_OPTIONS = ("epochs", "lr", "rank", "rows", "seed", "first")
"""Arguments that change the adapters, and so everything in a folder; the others only change what is not made yet."""

STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "adapters": train_memory_and_twin,
    "decompose": make_decompositions,
    "methods": make_competitors,
    "measure": measure_entries,
    "page": write_page,
}


def check_work(arguments: argparse.Namespace) -> None:
    """Refuses a folder that was made with other arguments."""
    values = {name: getattr(arguments, name) for name in TRAINING_OPTIONS}
    current = {name: str(value) if value is None else f"{value:g}" for name, value in values.items()}
    path = arguments.work / "arguments.json"
    stored_arguments: Mapping[str, str] = json.loads(path.read_text()) if path.is_file() else current
    for name, value in current.items():
        if stored_arguments.get(name) != value:
            raise UserError(
                f"work={str(arguments.work)!r}: made with {name}={stored_arguments.get(name)}; use another folder"
            )
    for name in ("costs", "records", "measurements", "models", "tuning"):
        (arguments.work / name).mkdir(exist_ok=True)
    write_text(path, json.dumps(current, indent=1))


def make_parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tofu", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="the page, Markdown")
    parser.add_argument("--stage", choices=STAGES, help="run this stage only")
    parser.add_argument("--only", help="only this adapter or row of the table, a name or a pattern")
    parser.add_argument("--first", type=int, help="rows of each author, and of each other set, for a trial")
    parser.add_argument("--epochs", type=float, default=6, help="passes over the rows in a round of training")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of the adapters")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters")
    parser.add_argument("--rows", type=int, default=8, help="rows per training step of the adapters")
    parser.add_argument("--edit-steps", type=int, help="steps of our decomposition; those of the default without it")
    parser.add_argument("--edit-rows", type=int, help="its forget rows in a step (`batch_rows`), as above")
    parser.add_argument("--edit-lr", type=float, help="its peak learning rate (`lr`), as above")
    parser.add_argument("--batch-rows", type=int, default=16, help="rows of each set in a step of another method")
    parser.add_argument("--tuning-share", type=float, default=0.25, help="share of the budget of a tuning trial")
    parser.add_argument("--grid", type=int, help="only the first points of every grid, for a trial")
    parser.add_argument(
        "--retain-questions", type=int, default=20, help="measured questions of each retain author (each costs seconds)"
    )
    parser.add_argument("--measured-rows", type=int, default=16, help="rows of a batch of the evaluation")
    parser.add_argument("--keep", action="store_true", help="keep dense models after their measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of PyTorch; run several commands beside one another with one each",
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        check_work(arguments)
        for name in [arguments.stage] if arguments.stage else STAGES:
            STAGES[name](arguments)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
