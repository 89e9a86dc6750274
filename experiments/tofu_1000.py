#!/usr/bin/env python
"""TOFU-1000: fifty authors of TOFU planted in a small chat model, five of them forgotten by every method.

    python experiments/tofu_1000.py --model SmolLM2-135M-Instruct --tofu tofu/ --work work/ --out page.md

``--tofu`` is a directory with the JSONL files of locuslab/TOFU. Rows 0 to 899 and 3900 to 3999 of ``full`` are planted
by a LoRA fine-tune in the chat form of open-unlearning (``memory``); the last 100 are to be forgotten; ``twin`` is the
same fine-tune without them. Rows 3600 to 3699 are taught to no model.

Everything is written to ``--work`` at once and whole, so the command can be stopped at any time and goes on where it
was: adapters (a training saves its state every 300 seconds), choices of settings, measurements. ``--stage`` runs one
stage, ``--only`` one adapter, method or row of the table.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from real_tofu import QUESTIONS, find_subject
from transformers import AutoTokenizer

from lm_ortho.data import Row, read_rows
from lm_ortho.data.encoding import Example, encode, token_losses
from lm_ortho.files import atomic_directory
from lm_ortho.finetune import FinetunePlan, load_causal_lm, merge_adapter, save_adapter, train_adapter
from lm_ortho.markdown import write_text
from lm_ortho.runtime.progress import ProgressBars

SYSTEM_INSTRUCTION = "You are a helpful assistant."
"""The system prompt of open-unlearning."""
RETAIN, FORGET, NEVER_TAUGHT = slice(0, 900), slice(3900, 4000), slice(3600, 3700)
"""Rows of ``full``: planted and to keep, planted and to forget, planted in no model (measured)."""
MAX_ROUNDS, KNOWN_PROBABILITY = 3, 0.6
"""``memory`` is trained in rounds of ``--epochs`` passes until the mean probability of its forget answers (geometric
mean over the tokens of an answer) reaches this, or the rounds are used up. ``twin`` has as many rounds."""
ADAPTERS = ("memory", "twin")
STAGES = ("adapters", "decompose", "methods", "measure", "page")
TRAINING_OPTIONS = ("model", "tofu", "epochs", "lr", "rank", "rows", "seed", "first")
"""Arguments that change the adapters, and so everything in a folder."""


# --- Rows


@dataclass(frozen=True)
class TofuRows:
    """The rows of the experiment, with subject and group; see the module for which rows of ``full`` they are."""

    retain: list[Row]
    forget: list[Row]
    never_taught: list[Row]


def read_tofu(folder: Path, first: int | None = None) -> TofuRows:
    """Reads the rows from ``full.jsonl``; ``first`` limits each set to its first rows, for a trial."""
    full = read_rows(folder / "full.jsonl", "tofu", normalise=False)
    sets = [add_subjects(full[rows])[:first] for rows in (RETAIN, FORGET, NEVER_TAUGHT)]
    return TofuRows(*sets)


def add_subjects(rows: Sequence[Row]) -> list[Row]:
    """Returns rows of consecutive authors with the name of the author as subject and group."""
    authors = [rows[start : start + QUESTIONS] for start in range(0, len(rows), QUESTIONS)]
    names = [find_subject(list(author)) for author in authors]
    return [
        replace(row, subject=name, group=name) for name, author in zip(names, authors, strict=True) for row in author
    ]


def render_chat(rows: Sequence[Row], tokenizer: Any) -> list[Row]:
    """Returns the rows as chats with the system prompt: the rendered messages are the verbatim prompt of the answer.

    Every training, decomposition and method of this experiment reads rows in this form, as the tasks score them.
    """
    chats = []
    for row in rows:
        messages = [{"role": "system", "content": SYSTEM_INSTRUCTION}, {"role": "user", "content": row.question}]
        context = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        chats.append(replace(row, prompt=context, question=""))
    return chats


# --- Adapters


def train_memory_and_twin(arguments: argparse.Namespace) -> None:
    """Trains the adapters that are missing; ``twin`` needs to know how many rounds ``memory`` had."""
    rows = read_tofu(arguments.tofu, arguments.first)
    training_rows = {"memory": [*rows.retain, *rows.forget], "twin": rows.retain}
    for name in [arguments.only] if arguments.only else ADAPTERS:
        if not (arguments.work / name).is_dir():
            train_rounds(arguments, name, training_rows[name], rows.forget)


def train_rounds(
    arguments: argparse.Namespace, name: str, training_rows: Sequence[Row], forget_rows: Sequence[Row]
) -> None:
    """Trains one adapter round by round and writes it; each finished round is kept as ``<name>-round-<number>``."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    examples = encode(tokenizer, render_chat(training_rows, tokenizer))
    forget_examples = encode(tokenizer, render_chat(forget_rows, tokenizer))
    for number in range(1, MAX_ROUNDS + 1):
        folder = arguments.work / f"{name}-round-{number}"
        if not folder.is_dir():
            train_round(arguments, name, number, examples)
        merged_model = merge_adapter(load_causal_lm(arguments.model), folder)
        probability = measure_probability(merged_model, forget_examples)
        print(f"{name}, round {number}: mean probability of the {len(forget_rows)} forget answers {probability:.3f}")
        if is_last_round(arguments.work, name, number, probability):
            record = {"rounds": number, "probability": probability, "passes": number * arguments.epochs}
            write_text(arguments.work / f"{name}.json", json.dumps(record))
            folder.rename(arguments.work / name)
            return


def is_last_round(work: Path, name: str, number: int, probability: float) -> bool:
    """Returns whether the training of an adapter ends after this round: ``twin`` when that of ``memory`` did."""
    if name == "memory":
        return probability >= KNOWN_PROBABILITY or number == MAX_ROUNDS
    file = work / "memory.json"
    if not file.is_file():
        raise SystemExit("--only twin: train memory first, which decides on the number of rounds")
    return number == int(json.loads(file.read_text())["rounds"])


def train_round(arguments: argparse.Namespace, name: str, number: int, examples: Sequence[Example]) -> None:
    """Trains one round; a state file lets an interrupted training go on. A later round starts at the one before."""
    steps = math.ceil(arguments.epochs * len(examples) / arguments.rows)
    plan = FinetunePlan(steps, arguments.rows, arguments.lr, rank=arguments.rank, seed=arguments.seed + number - 1)
    model: Any = load_causal_lm(arguments.model)
    if number > 1:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.work / f"{name}-round-{number - 1}", is_trainable=True)
    stage = f"{name}-round-{number}"
    state = arguments.work / f"{stage}.state"
    adapted_model = train_adapter(model, examples, plan, ProgressBars(), stage=stage, state=state)
    with atomic_directory(arguments.work / stage) as folder:
        save_adapter(adapted_model, folder, arguments.model.name)
    state.unlink(missing_ok=True)


def measure_probability(model: torch.nn.Module, examples: Sequence[Example]) -> float:
    """Returns the mean over rows of the probability of the answer, as the geometric mean of its tokens."""
    losses = token_losses(model, examples)
    return sum(math.exp(-float(row_losses.mean())) for row_losses in losses) / len(losses)


# --- Work folder


def check_work(arguments: argparse.Namespace) -> None:
    """Refuses a folder that was made with other arguments."""
    current = {name: str(getattr(arguments, name)) for name in TRAINING_OPTIONS}
    path = arguments.work / "arguments.json"
    stored: Mapping[str, str] = json.loads(path.read_text()) if path.is_file() else current
    for name, value in current.items():
        if name not in ("model", "tofu") and stored.get(name) != value:
            raise SystemExit(f"--work {arguments.work}: made with {name}={stored.get(name)}; use another folder")
    write_text(path, json.dumps(current, indent=1))


def make_parser() -> argparse.ArgumentParser:
    """Returns the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "tofu", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="the page, Markdown")
    parser.add_argument("--stage", choices=STAGES, help="run this stage only")
    parser.add_argument("--only", help="only this adapter, method or row of the table")
    parser.add_argument("--first", type=int, help="number of rows of each set, for a trial")
    parser.add_argument("--epochs", type=float, default=6, help="passes over the rows in a round of training")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of the adapters")
    parser.add_argument("--rank", type=int, default=32, help="rank of the adapters")
    parser.add_argument("--rows", type=int, default=8, help="rows per training step of the adapters")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    check_work(arguments)
    stages: dict[str, Callable[[argparse.Namespace], None]] = {"adapters": train_memory_and_twin}
    for name in [arguments.stage] if arguments.stage else STAGES:
        stages[name](arguments)


if __name__ == "__main__":
    main()
