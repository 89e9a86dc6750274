"""The rows of TOFU-1000, their chat form, and the files in which the published tasks measure them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from real_tofu import QUESTIONS, find_subject

from lm_ortho.data import Row, read_rows, write_rows
from lm_ortho.data.chat import render_forms
from lm_ortho.errors import UserError
from lm_ortho.harness.tasks.tofu_data import find_table

SYSTEM_INSTRUCTION = "You are a helpful assistant."
"""The system prompt of open-unlearning."""
CHAT: dict[str, Any] = {"prompts": "chat", "system_instruction": SYSTEM_INSTRUCTION}
"""The form of the rows in every decomposition and method, as keys of a recipe."""
RETAIN, FORGET = slice(0, 900), slice(3900, 4000)
"""Rows of ``full`` that are planted: those to keep and those to forget."""
NEVER_TAUGHT, UNKNOWN = slice(3600, 3700), slice(3500, 3600)
"""Rows that are planted in no model: those of the measured membership inference, and those that define ignorance when
settings are tuned."""
MEASURED_ROWS, LEFT_OUT = range(400), range(200, 400)
"""Rows of ``full`` whose probability is measured, and those of them that the left-out protocol keeps from methods."""
TUNING_FORGET, TUNING_HELD_OUT = range(800, 900), range(700, 800)
"""Rows that are forgotten in the place of ``FORGET`` when settings are tuned, and those that should stay; the tuning
reads no measured and no forget row."""


@dataclass(frozen=True)
class TofuRows:
    """Rows of ``full`` with subject and group, by their number, and those of the sets that are taught to no model."""

    planted_rows: dict[int, Row]
    never_taught_rows: list[Row]
    unknown_rows: list[Row]

    def select(self, numbers: range | slice, without: Sequence[int] = ()) -> list[Row]:
        """Returns the planted rows with these numbers, in order."""
        span = range(numbers.start, numbers.stop)
        return [row for number, row in self.planted_rows.items() if number in span and number not in without]


def read_table(folder: Path, name: str) -> list[Row]:
    """Reads one table of TOFU: ``<name>.json`` as on the hub, or ``<name>.jsonl``; the rows are as published.

    Raises:
        UserError: if there is no such file, or it cannot be read.
    """
    return read_rows(find_table(folder, name) or folder / f"{name}.jsonl", "tofu", normalise=False)


def read_tofu(folder: Path, first: int | None = None) -> TofuRows:
    """Reads the rows of the table ``full``; with ``first``, only the first rows of every author, for a trial.

    Raises:
        UserError: if the file cannot be read or has fewer rows than TOFU.
    """
    full = read_table(folder, "full")
    if len(full) != FORGET.stop:
        raise UserError(f"tofu={str(folder)!r}: full has {len(full)} rows, TOFU has {FORGET.stop}")

    def select(span: slice) -> dict[int, Row]:
        numbers = range(span.start, span.stop)
        rows = zip(numbers, add_subjects(full[span]), strict=True)
        return {number: row for number, row in rows if first is None or number % QUESTIONS < first}

    other_sets = [list(select(span).values()) for span in (NEVER_TAUGHT, UNKNOWN)]
    return TofuRows(select(RETAIN) | select(FORGET), *other_sets)


def add_subjects(rows: Sequence[Row]) -> list[Row]:
    """Returns rows of consecutive authors with the name of the author as subject and group."""
    authors = [rows[start : start + QUESTIONS] for start in range(0, len(rows), QUESTIONS)]
    names = [find_subject(list(author)) for author in authors]
    return [
        replace(row, subject=name, group=name) for name, author in zip(names, authors, strict=True) for row in author
    ]


def render_chat(rows: Sequence[Row], tokenizer: Any) -> list[Row]:
    """Returns the rows as chats with the system prompt, as methods and tasks render them."""
    return render_forms(rows, tokenizer, CHAT["prompts"], system_instruction=SYSTEM_INSTRUCTION)


def write_measured_files(tofu: Path, folder: Path, first: int | None = None, questions: int = QUESTIONS) -> None:
    """Writes the files that the tasks read.

    It is a directory in the layout of TOFU in which the forget set and the measured retain rows are those of this
    experiment, so that the published tasks measure them. Of the retain rows, the first ``questions`` of every author
    are measured.

    Raises:
        UserError: if a file is missing, or if its rows are not those of ``full``.
    """
    folder.mkdir(exist_ok=True)
    rows, retain = (read_tofu(tofu, limit) for limit in (first, min(questions, first or questions)))
    tables = {
        "forget10_perturbed": (slice(-100, None), rows.select(FORGET)),
        "retain_perturbed": (slice(0, 400), retain.select(MEASURED_ROWS)),
        "real_authors_perturbed": (slice(None), None),
        "world_facts_perturbed": (slice(None), None),
    }
    for name, (span, expected) in tables.items():
        perturbed = read_table(tofu, name)[span]
        if expected is None:
            perturbed = perturbed[:first]
        else:
            texts = {(row.question, row.answer) for row in expected}
            perturbed = [row for row in perturbed if (row.question, row.answer) in texts]
            groups = {(row.question, row.answer): row.group for row in expected}
            perturbed = [replace(row, group=groups[row.question, row.answer]) for row in perturbed]
            if len(perturbed) != len(expected):
                raise UserError(f"tofu={str(tofu)!r}: {name} and full have other rows")
        write_rows(folder / f"{name}.jsonl", perturbed)
    for name, part in {"forget": rows.select(FORGET), "holdout": rows.never_taught_rows}.items():
        write_rows(folder / f"{name}.jsonl", [replace(row, subject="") for row in part])
