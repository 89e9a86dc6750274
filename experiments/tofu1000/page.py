"""The page with the results: a table for each protocol, the bars, and the settings of each method."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lm_ortho.finetune import load_causal_lm
from lm_ortho.markdown import markdown_table, versions, write_text
from tofu1000.adapters import KNOWN_PROBABILITY, MAX_ROUNDS
from tofu1000.bars import COLUMNS, Bar, Values, check_forgetting, check_remembering
from tofu1000.cost import Cost
from tofu1000.entries import ADAPTERS, MAIN, PROTOCOLS, Entry, list_entries, read_edit_settings
from tofu1000.making import read_cost
from tofu1000.rows import TUNING_FORGET, TUNING_HELD_OUT


def write_page(arguments: argparse.Namespace) -> None:
    """Writes the page from all measurements that are there, and prints it."""
    page = make_page(arguments)
    if arguments.out:
        write_text(arguments.out, page)
    print(page)


def make_page(arguments: argparse.Namespace) -> str:
    """Returns the page: what was done, a table for each protocol, the bars, and the settings of each method."""
    measurements = read_measurements(arguments.work)
    parts = [make_head(arguments)]
    for protocol in PROTOCOLS:
        parts += [f"## {protocol.capitalize()} protocol", make_table(arguments, measurements, protocol)]
    parts += ["## Bars", make_bars(measurements), "## Settings", make_settings(arguments)]
    missing = [
        label
        for entry in list_entries(read_edit_settings(arguments))
        for label in entry.labels
        if label not in measurements
    ]
    if missing:
        parts.append(f"Not measured: {'; '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def read_measurements(work: Path) -> dict[str, Values]:
    """Returns the values of every measured model by its label."""
    files = sorted((work / "measurements").glob("*.json"))
    return {file.stem: json.loads(file.read_text())["values"] for file in files}


def make_head(arguments: argparse.Namespace) -> str:
    """Returns title, model, rows, training and the rules of the comparison."""
    training = {
        name: json.loads(path.read_text()) for name in ADAPTERS if (path := arguments.work / f"{name}.json").is_file()
    }
    passes = "; ".join(
        f"{name}: {record['passes']:g} passes, probability of the forget answers {record['probability']:.3f}"
        for name, record in training.items()
    )
    training_text = (
        f"LoRA of rank {arguments.rank}, peak rate {arguments.lr:g}, {arguments.rows} rows a step, rounds of "
        f"{arguments.epochs:g} passes until the mean probability of the forget answers is {KNOWN_PROBABILITY:g} or "
        f"{MAX_ROUNDS} rounds are over, as many for the twin ({passes or 'not trained yet'})."
    )
    cost_text = (
        "Operations are those of all matrix products and of attention, forward and backward, counted while a method "
        f"runs; those of `{MAIN}` are the budget of every method that trains. Tokens are these operations over those "
        "of one forward and backward pass of one token. Seconds are processor time. The search for settings is not "
        "counted."
    )
    tuning_text = (
        f"Settings are chosen on rows {TUNING_FORGET.start} to {TUNING_FORGET.stop - 1} (forgotten) and "
        f"{TUNING_HELD_OUT.start} to {TUNING_HELD_OUT.stop - 1} (to keep), which are neither forgotten nor measured "
        f"here, each trial with {arguments.tuning_share:g} of the budget; ours is not tuned."
    )
    command = f"`python experiments/tofu_1000.py {' '.join(sys.argv[1:])}`"
    setup = (
        f"{arguments.model.name}; {versions()}; seed {arguments.seed}; "
        f"{arguments.retain_questions} questions of each measured retain author."
    )
    return "\n\n".join(["# TOFU-1000", command, f"{setup} {training_text}", cost_text, tuning_text])


def make_table(arguments: argparse.Namespace, measurements: Mapping[str, Values], protocol: str) -> str:
    """Returns the table of one protocol: a row for each measured model, its cost, its values, and the bars it meets."""
    lines = []
    token = count_token_operations(arguments)
    for entry in list_entries(read_edit_settings(arguments)):
        cost = read_cost(arguments.work, entry.name)
        for label in entry.labels:
            if entry.protocol in ("", protocol) and label in measurements:
                name = label.removeprefix(f"{protocol}-")
                lines.append(
                    [
                        name,
                        *format_cost(cost, token),
                        *map(format_value, measurements[label].values()),
                        format_bars(measurements, entry, label),
                    ]
                )
    titles = ["model", "operations", "tokens", "CPU seconds", *(column.name for column in COLUMNS), "bars"]
    return markdown_table(titles, lines)


@cache
def count_parameters(model: Path) -> int:
    """Returns the number of weights of matrices through which a token goes: all layers and the output embedding."""
    loaded: Any = load_causal_lm(model)
    matrices = {
        id(module.weight): module.weight.numel() for module in loaded.modules() if isinstance(module, torch.nn.Linear)
    }
    return sum(matrices.values())


def count_token_operations(arguments: argparse.Namespace) -> float:
    """Returns the operations of the forward and backward pass of one token: six per weight."""
    return 6.0 * count_parameters(arguments.model)


def format_cost(cost: Cost | None, token: float) -> list[str]:
    """Returns operations, tokens and seconds as text."""
    if cost is None:
        return ["", "", ""]
    return [f"{cost.operations:.2e}", f"{cost.operations / token:.2e}", f"{cost.seconds:.0f}"]


def format_value(value: Sequence[float | None]) -> str:
    """Returns a value with its interval, if it has one."""
    number, low, high = value
    if number is None:
        return "n/a"
    return f"{number:.3g}" if low is None or high is None else f"{number:.3g} [{low:.3g}, {high:.3g}]"


def check_entry(measurements: Mapping[str, Values], entry: Entry, label: str) -> list[Bar]:
    """Returns the bars of a measured model; none for the controls, and where twin or plain INT4 is not measured."""
    plain, twin = measurements.get(f"{entry.protocol}-int4"), measurements.get("twin")
    if plain is None or twin is None or entry.method == "int4_gptq" or label not in measurements:
        return []
    if entry.labels[label] == 1.0:
        return check_remembering(measurements[label], plain)
    return check_forgetting(measurements[label], twin, plain)


def format_bars(measurements: Mapping[str, Values], entry: Entry, label: str) -> str:
    """Returns how many bars a model meets."""
    bars = check_entry(measurements, entry, label)
    return f"{sum(bar.is_met for bar in bars)} of {len(bars)}" if bars else ""


def make_bars(measurements: Mapping[str, Values]) -> str:
    """Returns every bar of every model as a list, pass or miss with the value."""
    lines = []
    for entry in list_entries({}):
        for label in entry.labels:
            bars = check_entry(measurements, entry, label)
            texts = [f"{'pass' if bar.is_met else 'MISS'} {bar.name} ({bar.value:.3g})" for bar in bars]
            if texts:
                lines.append(f"* {label}: {'; '.join(texts)}")
    return "\n".join(lines) or "None measured yet."


def make_settings(arguments: argparse.Namespace) -> str:
    """Returns settings and steps of every model that is made."""
    lines = []
    for entry in list_entries(read_edit_settings(arguments)):
        file = arguments.work / "records" / f"{entry.name}.json"
        if file.is_file():
            record = json.loads(file.read_text())
            settings = ", ".join(f"{name}={value}" for name, value in record["settings"].items()) or "defaults"
            steps = "" if record["steps"] is None else f"; {record['steps']} steps"
            lines.append(f"* {entry.name}: {record['method']}, {settings}{steps}")
    return "\n".join(lines) or "None made yet."
