"""Makes the models of the table: the operations of each, its settings, and its model."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lm_ortho.baselines import METHODS, Budget, Material, Method, TuningSplit, save, tune
from lm_ortho.baselines.tuning import secret_loss
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_causal_lm, merge_adapter
from lm_ortho.markdown import write_text
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.runtime.resume import ResumeFolder
from tofu1000.cost import Cost, OperationCounter, measure_cost
from tofu1000.entries import ADAPTERS, MAIN, PROTOCOLS, Entry, select_entries
from tofu1000.rows import CHAT, FORGET, LEFT_OUT, RETAIN, TUNING_FORGET, TUNING_HELD_OUT, read_tofu

# --- Operations and time


def read_cost(work: Path, name: str) -> Cost | None:
    """Returns the cost of a finished entry, of an adapter that of its training; None if it is not made yet."""
    if not is_made(work, name):
        return None
    if name in ADAPTERS:
        return Cost(**json.loads((work / "costs" / f"{name}.json").read_text()))
    return Cost(**json.loads((work / "records" / f"{name}.json").read_text())["cost"])


def count_step_operations(arguments: argparse.Namespace, method: Method) -> tuple[float, float]:
    """Returns the operations of a method before and after its steps, and those of one step; stored once counted.

    Both follow from runs of one and of two steps, whatever a method does in them.
    """
    file = arguments.work / "costs" / f"step-{method.name}.json"
    if not file.is_file():
        counts, material = [], load_material(arguments, PROTOCOLS[0])
        for steps in (1, 2):
            with OperationCounter() as counter:
                method.make(material, seed=arguments.seed, budget=make_budget(arguments, steps))
            counts.append(counter.operations)
        write_text(file, json.dumps({"fixed": 2 * counts[0] - counts[1], "step": counts[1] - counts[0]}))
    record = json.loads(file.read_text())
    return record["fixed"], record["step"]


def make_budget(arguments: argparse.Namespace, steps: int) -> Budget:
    """Returns a budget of ``steps`` with the batch of all methods."""
    return Budget(steps=steps, forget_rows=arguments.batch_rows, retain_rows=arguments.batch_rows)


def choose_budget(arguments: argparse.Namespace, method: Method, protocol: str, share: float = 1.0) -> Budget | None:
    """Returns the budget with ``share`` of the operations of our decomposition; None for a method without steps.

    Raises:
        UserError: if our decomposition is not made yet.
    """
    if not method.trains:
        return None
    cost = read_cost(arguments.work, f"{protocol}-{MAIN}")
    if cost is None:
        raise UserError(f"stage='methods': make {protocol}-{MAIN} first (stage decompose); it sets the budget")
    fixed, step = count_step_operations(arguments, method)
    return make_budget(arguments, max(1, round((share * cost.operations - fixed) / step)))


# --- Making models


def load_material(arguments: argparse.Namespace, protocol: str) -> Material:
    """Loads models and rows that methods may read under a protocol; without a protocol also the twin."""
    rows = read_tofu(arguments.tofu, arguments.first)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    retain = rows.select(RETAIN, without=LEFT_OUT if protocol == "left-out" else ())
    return Material(
        tokenizer=tokenizer,
        merged=merge_adapter(load_causal_lm(arguments.model), arguments.work / "memory"),
        forget=rows.select(FORGET),
        retain=retain,
        prompts=CHAT,
        base=load_causal_lm(arguments.model),
        reference=None if protocol else merge_adapter(load_causal_lm(arguments.model), arguments.work / "twin"),
    )


def make_tuning_split(arguments: argparse.Namespace) -> TuningSplit:
    """Returns rows on which settings are tried; the same for both protocols, without measured and forget rows."""
    rows = read_tofu(arguments.tofu, arguments.first)
    material = load_material(arguments, "left-out")
    unread_numbers = [*LEFT_OUT, *TUNING_FORGET, *TUNING_HELD_OUT]
    split = replace(
        material,
        forget=rows.select(TUNING_FORGET),
        retain=rows.select(RETAIN, without=unread_numbers),
    )
    ignorance = secret_loss(material.merged, material, rows.unknown_rows)
    return TuningSplit(split, rows.select(TUNING_HELD_OUT), ignorance)


def choose_settings(arguments: argparse.Namespace, method: Method) -> dict[str, Any]:
    """Tries the grid of a method on the tuning split, each point with a share of the budget; returns the best one.

    Finished trials are stored. A point that fails (because the training diverges) cannot be chosen.

    Raises:
        UserError: when every point failed.
    """
    file = arguments.work / "tuning" / f"{method.name}.json"
    trials: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    grid = [dict(settings) for settings in method.grid][: arguments.grid]
    if len(grid) == 1:
        return grid[0]
    split = None
    for settings in grid[len(trials) :]:
        split = split or make_tuning_split(arguments)
        budget = choose_budget(arguments, method, PROTOCOLS[0], arguments.tuning_share)
        try:
            result = tune(method, split, [settings], seed=arguments.seed, budget=budget, progress=ProgressBars())
            (_, score) = result.trials[0]
        except UserError as error:
            print(f"method={method.name}, {settings}: {error}", file=sys.stderr)
            score = None
        scores = {} if score is None else {"forget": score.forget, "retain": score.retain, "total": score.total}
        trials.append({"settings": settings, **scores})
        write_text(file, json.dumps(trials, indent=1))
    finished_trials = [trial for trial in trials if "total" in trial]
    if not finished_trials:
        raise UserError(f"method={method.name}: no setting of its grid finished; delete {file.name} to try again")
    best: dict[str, Any] = min(finished_trials, key=lambda trial: trial["total"])["settings"]
    return best


def is_made(work: Path, name: str) -> bool:
    """Returns whether a model is made; the directory of a dense one is deleted once it is measured."""
    return (work / "records" / f"{name}.json").is_file()


def hash_choices(choices: Any) -> str:
    """Returns a short hash of the settings and the budget of an entry: states and costs of other choices are others."""
    return hashlib.sha256(json.dumps(choices, sort_keys=True).encode()).hexdigest()[:8]


def make_entry(arguments: argparse.Namespace, entry: Entry) -> None:
    """Makes the model of an entry and writes it; an interrupted method goes on from its saved state."""
    if is_made(arguments.work, entry.name):
        return
    method = METHODS.get(entry.method)
    settings, budget = dict(entry.settings), None
    if entry.is_competitor:
        settings |= choose_settings(arguments, method)
        budget = choose_budget(arguments, method, entry.protocol)
    material = load_material(arguments, entry.protocol)
    key = hash_choices([settings, repr(budget)])
    resume = ResumeFolder(arguments.work / "resume" / f"{entry.name}-{key}")
    cost_file = arguments.work / "costs" / f"unfinished {entry.name}-{key}.json"
    with measure_cost(cost_file) as wrap:
        result = method.make(
            material,
            settings,
            seed=arguments.seed,
            budget=budget,
            progress=wrap(ProgressBars()),
            resume=resume,
        )
    folder = arguments.work / "models" / entry.name
    shutil.rmtree(folder, ignore_errors=True)
    save(result, folder, material.tokenizer, {"method": entry.method, "settings": settings})
    record = {
        "method": entry.method,
        "settings": settings,
        "steps": None if budget is None else budget.steps,
        "cost": json.loads(cost_file.read_text()),
    }
    write_text(arguments.work / "records" / f"{entry.name}.json", json.dumps(record))  # last: the entry is made now
    cost_file.unlink()
    resume.clear()


def make_decompositions(arguments: argparse.Namespace) -> None:
    """Makes the controls, plain INT4 and our decompositions."""
    for entry in select_entries(arguments):
        if not entry.is_competitor:
            make_entry(arguments, entry)


def make_competitors(arguments: argparse.Namespace) -> None:
    """Makes the other methods."""
    for entry in select_entries(arguments):
        if entry.is_competitor:
            make_entry(arguments, entry)
