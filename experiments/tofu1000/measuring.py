"""Measures every model with the tasks of this package, as ``lm_eval`` with a chat template does."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from lm_ortho.errors import UserError
from lm_ortho.harness.baseline_model import BaselineLM
from lm_ortho.harness.model import LibOrthoLM
from lm_ortho.markdown import write_text
from lm_ortho.metrics import clustered_mean
from lm_ortho.plugin.bridges import find_tasks_dir
from tofu1000.bars import COLUMNS, MEMBERSHIP
from tofu1000.entries import Entry, select_entries
from tofu1000.making import is_made
from tofu1000.rows import LEFT_OUT, SYSTEM_INSTRUCTION, read_tofu, write_measured_files

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
