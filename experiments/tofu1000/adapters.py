"""Trains the adapters ``memory`` and ``twin``, in rounds that can be interrupted."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from lm_ortho.data import Row
from lm_ortho.data.encoding import Example, encode, token_losses
from lm_ortho.errors import UserError
from lm_ortho.files import atomic_directory
from lm_ortho.finetune import FinetunePlan, load_causal_lm, merge_adapter, save_adapter, train_adapter
from lm_ortho.finetune.lora import suppress_peft_warnings
from lm_ortho.markdown import write_text
from lm_ortho.runtime.progress import ProgressBars
from tofu1000.cost import measure_cost
from tofu1000.entries import ADAPTERS, is_selected
from tofu1000.rows import FORGET, RETAIN, read_tofu, render_chat

MAX_ROUNDS, KNOWN_PROBABILITY = 3, 0.6
"""``memory`` is trained in rounds of ``--epochs`` passes until the mean probability of its forget answers (geometric
mean over the tokens of an answer) reaches this, or the rounds are used up. ``twin`` has as many rounds."""


def train_memory_and_twin(arguments: argparse.Namespace) -> None:
    """Trains the adapters that are missing; ``twin`` needs to know how many rounds ``memory`` had."""
    rows = read_tofu(arguments.tofu, arguments.first)
    training_rows = {"memory": rows.select(RETAIN) + rows.select(FORGET), "twin": rows.select(RETAIN)}
    for name in ADAPTERS:
        if is_selected(arguments, name) and not (arguments.work / name).is_dir():
            train_rounds(arguments, name, training_rows[name], rows.select(FORGET))


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
        raise UserError("only='twin': train memory first, which decides on the number of rounds")
    return number == int(json.loads(file.read_text())["rounds"])


def train_round(arguments: argparse.Namespace, name: str, number: int, examples: Sequence[Example]) -> None:
    """Trains one round; a state file lets an interrupted training go on. A later round starts at the one before."""
    steps = math.ceil(arguments.epochs * len(examples) / arguments.rows)
    plan = FinetunePlan(steps, arguments.rows, arguments.lr, rank=arguments.rank, seed=arguments.seed + number - 1)
    model: Any = load_causal_lm(arguments.model)
    if number > 1:
        with suppress_peft_warnings():
            model = PeftModel.from_pretrained(model, arguments.work / f"{name}-round-{number - 1}", is_trainable=True)
    stage = f"{name}-round-{number}"
    state = arguments.work / f"{stage}.state"
    with measure_cost(arguments.work / "costs" / f"{name}.json") as wrap:
        adapted_model = train_adapter(model, examples, plan, wrap(ProgressBars()), stage=stage, state=state)
    with atomic_directory(arguments.work / stage) as folder:
        save_adapter(adapted_model, folder, str(arguments.model))
    state.unlink(missing_ok=True)


def measure_probability(model: torch.nn.Module, examples: Sequence[Example]) -> float:
    """Returns the mean over rows of the probability of the answer, as the geometric mean of its tokens."""
    losses = token_losses(model, examples)
    return sum(math.exp(-float(row_losses.mean())) for row_losses in losses) / len(losses)
