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
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from peft import PeftModel
from tofu1000.bars import COLUMNS, MEMBERSHIP, Bar, Values, check_forgetting, check_remembering
from tofu1000.cost import Cost, OperationCounter, measure_cost
from tofu1000.rows import (
    CHAT,
    FORGET,
    LEFT_OUT,
    RETAIN,
    SYSTEM_INSTRUCTION,
    TUNING_FORGET,
    TUNING_HELD_OUT,
    read_tofu,
    render_chat,
    write_measured_files,
)
from transformers import AutoTokenizer

from lm_ortho.baselines import METHODS, Budget, Material, Method, TuningSplit, save, tune
from lm_ortho.baselines.tuning import secret_loss
from lm_ortho.data import Row
from lm_ortho.data.encoding import Example, encode, token_losses
from lm_ortho.errors import UserError
from lm_ortho.files import atomic_directory
from lm_ortho.finetune import FinetunePlan, load_causal_lm, merge_adapter, save_adapter, train_adapter
from lm_ortho.finetune.lora import suppress_peft_warnings
from lm_ortho.harness.baseline_model import BaselineLM
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.markdown import markdown_table, versions, write_text
from lm_ortho.metrics import clustered_mean
from lm_ortho.plugin.bridges import find_tasks_dir
from lm_ortho.runtime.progress import ProgressBars
from lm_ortho.runtime.resume import ResumeFolder

MAX_ROUNDS, KNOWN_PROBABILITY = 3, 0.6
"""``memory`` is trained in rounds of ``--epochs`` passes until the mean probability of its forget answers (geometric
mean over the tokens of an answer) reaches this, or the rounds are used up. ``twin`` has as many rounds."""
ADAPTERS = ("memory", "twin")
PROTOCOLS = ("published", "left-out")
OURS = {
    "ours-base-0.01": ("ortho", 0.01),
    "ours-base-0.05": ("ortho", 0.05),
    "ours-merged-0.01": ("ortho_merged", 0.01),
    "ours-merged-0.05": ("ortho_merged", 0.05),
}
"""Our decompositions: the method (base known, or merged weights only) and the density."""
MAIN = "ours-base-0.01"
"""The decomposition whose operations are the budget of every other method, and that the bars are about."""
COMPETITORS = (
    "altpo",
    "repselect",
    "simnpo",
    "npo",
    "undial",
    "grad_diff",
    "rmu",
    "task_arithmetic",
    "idk_dpo",
)
TRAINING_OPTIONS = ("epochs", "lr", "rank", "rows", "seed", "first")
"""Arguments that change the adapters, and so everything in a folder; the others only change what is not made yet."""


# --- Adapters


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


# --- Entries of the table


@dataclass(frozen=True)
class Entry:
    """A model of the table: a method under a protocol, measured at each of ``alphas``, or as it is without any."""

    name: str
    method: str
    protocol: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    alphas: tuple[float, ...] = ()
    is_competitor: bool = False

    @property
    def labels(self) -> dict[str, float | None]:
        """The names of the measurements of this entry, with the alpha of each."""
        return {f"{self.name}, alpha={alpha:g}": alpha for alpha in self.alphas} or {self.name: None}


def list_entries(edit_steps: int | None) -> list[Entry]:
    """Returns every entry, in the order in which they are made."""
    entries = [Entry("memory", "unedited", ""), Entry("twin", "never_saw", "")]
    steps = {} if edit_steps is None else {"steps": edit_steps}
    for protocol in PROTOCOLS:
        entries.append(Entry(f"{protocol}-int4", "int4_gptq", protocol))
        for name, (method, density) in OURS.items():
            settings = {"density": density, **steps}
            entries.append(Entry(f"{protocol}-{name}", method, protocol, settings, alphas=(1.0, 0.0)))
        for method in COMPETITORS:
            entries.append(Entry(f"{protocol}-{method}", method, protocol, is_competitor=True))
    return entries


def is_selected(arguments: argparse.Namespace, name: str) -> bool:
    """Returns whether ``--only`` selects a name."""
    return arguments.only is None or fnmatchcase(name, arguments.only)


def select_entries(arguments: argparse.Namespace) -> list[Entry]:
    """Returns the entries that ``--only`` selects, of the methods that are installed; names those that are not."""
    entries = [entry for entry in list_entries(arguments.edit_steps) if is_selected(arguments, entry.name)]
    for name in dict.fromkeys(entry.method for entry in entries if entry.method not in METHODS):
        print(f"method={name} is not installed and is left out", file=sys.stderr)
    return [entry for entry in entries if entry.method in METHODS]


# --- Operations and time


def read_cost(work: Path, name: str) -> Cost | None:
    """Returns the cost of a finished entry; None if it is not made yet."""
    file = work / "costs" / f"{name}.json"
    return Cost(**json.loads(file.read_text())) if is_made(work, name) and file.is_file() else None


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
    resume = ResumeFolder(arguments.work / "resume" / entry.name)
    cost_name = f"copy of {entry.name}" if entry.name in ADAPTERS else entry.name  # its cost is that of the training
    with measure_cost(arguments.work / "costs" / f"{cost_name}.json") as wrap:
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
    record = {"method": entry.method, "settings": settings, "steps": None if budget is None else budget.steps}
    write_text(arguments.work / "records" / f"{entry.name}.json", json.dumps(record))
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


# --- Measurements

TASKS = ("tofu_forget10", "tofu_model_utility", MEMBERSHIP)
_AGGREGATION = "!function lm_ortho.harness.tasks.aggregation.auc"
MEMBERSHIP_YAML = f"""\
include: {{template}}
task: {MEMBERSHIP}
custom_dataset: !function lm_ortho.harness.tasks.membership.user_sets
dataset_kwargs:
  task: {MEMBERSHIP}
metric_list:
  - {{{{metric: auc_loss, aggregation: {_AGGREGATION}, higher_is_better: false}}}}
  - {{{{metric: auc_loss_low, aggregation: {_AGGREGATION}_low, higher_is_better: false}}}}
  - {{{{metric: auc_loss_high, aggregation: {_AGGREGATION}_high, higher_is_better: false}}}}
"""
"""``membership_set`` with the attack on the loss alone; others cost a backward pass per row."""


def measure_entries(arguments: argparse.Namespace) -> None:
    """Measures every model that is made, twin first: forget quality compares the others with its samples."""
    entries = sorted(select_entries(arguments), key=lambda entry: entry.name != "twin")
    for entry in entries:
        for label, alpha in entry.labels.items():
            file = arguments.work / "measurements" / f"{label}.json"
            if is_made(arguments.work, entry.name) and not file.is_file():
                measure_model(arguments, entry, label, alpha)
        done = all((arguments.work / "measurements" / f"{label}.json").is_file() for label in entry.labels)
        if done and not entry.alphas and not arguments.keep:
            shutil.rmtree(arguments.work / "models" / entry.name, ignore_errors=True)


def measure_model(arguments: argparse.Namespace, entry: Entry, label: str, alpha: float | None) -> None:
    """Evaluates one model with the tasks; writes the samples without their texts, then the values."""
    start = time.process_time()
    place = str(arguments.work / "models" / entry.name)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
    options["batch_size"] = arguments.measured_rows
    lm: Any = BaselineLM(place, **options) if alpha is None else LibOrthoLM(place, alpha=alpha, **options)
    samples_folder = arguments.work / "samples"
    metadata = write_task_files(arguments)
    if entry.name != "twin":
        metadata["tofu_retain_samples"] = str(samples_folder / "twin")
        if not (samples_folder / "twin").is_dir():
            raise UserError("stage='measure': measure twin first; forget quality compares with its samples")
    manager = TaskManager(
        include_defaults=False,
        include_path=[str(find_tasks_dir()), str(write_membership_task(arguments.work))],
        metadata=metadata,
    )
    result = lm_eval.simple_evaluate(
        lm,
        tasks=list(TASKS),
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=True,
        system_instruction=SYSTEM_INSTRUCTION,
    )
    assert result is not None
    folder = samples_folder / label
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        lines = [json.dumps(shorten_sample(sample)) + "\n" for sample in result["samples"][task]]
        write_text(folder / f"samples_{task}_0.jsonl", "".join(lines))
    values = collect_values(result["results"], result["samples"], get_left_out_questions(arguments))
    record = {"values": values, "seconds": time.process_time() - start}
    write_text(arguments.work / "measurements" / f"{label}.json", json.dumps(record))


def write_task_files(arguments: argparse.Namespace) -> dict[str, str]:
    """Writes the rows that the tasks measure; returns the metadata that name them, and where the tokenizer is.

    Raises:
        UserError: if other rows of the table were measured on other rows.
    """
    folder, file = arguments.work / "measured", arguments.work / "measured.json"
    questions = json.loads(file.read_text()) if file.is_file() else arguments.retain_questions
    if questions != arguments.retain_questions:
        raise UserError(
            f"retain_questions={arguments.retain_questions}: this folder has measurements with {questions}; use the "
            f"same number, or delete measurements/, samples/ and {file.name} in it"
        )
    write_text(file, json.dumps(questions))
    write_measured_files(arguments.tofu, folder, arguments.first, arguments.retain_questions)
    return {
        "pretrained": str(arguments.model),
        "tofu_dir": str(folder),
        "forget": str(folder / "forget.jsonl"),
        "holdout": str(folder / "holdout.jsonl"),
    }


def write_membership_task(work: Path) -> Path:
    """Writes the task file of membership inference and returns its folder."""
    folder = work / "tasks"
    folder.mkdir(exist_ok=True)
    template = find_tasks_dir() / "_templates" / "membership"
    write_text(folder / f"{MEMBERSHIP}.yaml", MEMBERSHIP_YAML.format(template=template))
    return folder


def shorten_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a logged sample with the question, its set, and the values of its metrics."""
    doc = {name: sample["doc"][name] for name in ("id", "question", "group", "part")}
    metrics = {name: sample[name] for name in sample["metrics"] if not name.endswith(("_low", "_high"))}
    return {"doc": doc, **metrics}


def get_left_out_questions(arguments: argparse.Namespace) -> set[str]:
    """Returns the questions of the rows that the left-out protocol keeps from every method."""
    rows = read_tofu(arguments.tofu, arguments.first)
    return {row.question for row in rows.select(LEFT_OUT)}


def collect_values(
    results: Mapping[str, Any], samples: Mapping[str, Any], left_out: set[str]
) -> dict[str, list[float | None]]:
    """Returns value, lower and upper bound by column; None for what a task does not give."""
    values: dict[str, list[float | None]] = {}
    for column in COLUMNS:
        if column.is_left_out:
            items = [
                sample[column.metric]
                for sample in samples[column.task]
                if column.metric in sample and sample["doc"]["question"] in left_out
            ]
            numbers, groups = [number for number, _ in items], [group for _, group in items]
            values[column.name] = list(clustered_mean(numbers, groups)) if numbers else [None] * 3
            continue
        entries = (results[column.task].get(f"{column.metric}{end},none") for end in ("", "_low", "_high"))
        values[column.name] = [entry if isinstance(entry, float) else None for entry in entries]
    return values


# --- Page


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
        label for entry in list_entries(arguments.edit_steps) for label in entry.labels if label not in measurements
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
        f"here, each trial with {arguments.tuning_share:g} of the budget; ours has its default settings."
    )
    command = f"`python experiments/tofu_1000.py {' '.join(sys.argv[1:])}`"
    setup = (
        f"{arguments.model.name}; {versions()}; one thread; seed {arguments.seed}; "
        f"{arguments.retain_questions} questions of each measured retain author."
    )
    return "\n\n".join(["# TOFU-1000", command, f"{setup} {training_text}", cost_text, tuning_text])


def make_table(arguments: argparse.Namespace, measurements: Mapping[str, Values], protocol: str) -> str:
    """Returns the table of one protocol: a row for each measured model, its cost, its values, and the bars it meets."""
    lines = []
    token = count_token_operations(arguments)
    for entry in list_entries(arguments.edit_steps):
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
    for entry in list_entries(None):
        for label in entry.labels:
            bars = check_entry(measurements, entry, label)
            texts = [f"{'pass' if bar.is_met else 'MISS'} {bar.name} ({bar.value:.3g})" for bar in bars]
            if texts:
                lines.append(f"* {label}: {'; '.join(texts)}")
    return "\n".join(lines) or "None measured yet."


def make_settings(arguments: argparse.Namespace) -> str:
    """Returns settings and steps of every model that is made."""
    lines = []
    for entry in list_entries(arguments.edit_steps):
        file = arguments.work / "records" / f"{entry.name}.json"
        if file.is_file():
            record = json.loads(file.read_text())
            settings = ", ".join(f"{name}={value}" for name, value in record["settings"].items()) or "defaults"
            steps = "" if record["steps"] is None else f"; {record['steps']} steps"
            lines.append(f"* {entry.name}: {record['method']}, {settings}{steps}")
    return "\n".join(lines) or "None made yet."


# --- Command

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
    parser.add_argument("--batch-rows", type=int, default=16, help="rows of each set in a step of another method")
    parser.add_argument("--tuning-share", type=float, default=0.25, help="share of the budget of a tuning trial")
    parser.add_argument("--grid", type=int, help="only the first points of every grid, for a trial")
    parser.add_argument(
        "--retain-questions", type=int, default=20, help="measured questions of each retain author (each costs seconds)"
    )
    parser.add_argument("--measured-rows", type=int, default=16, help="rows of a batch of the evaluation")
    parser.add_argument("--keep", action="store_true", help="keep dense models after their measurement")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    try:
        check_work(arguments)
        for name in [arguments.stage] if arguments.stage else STAGES:
            STAGES[name](arguments)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
