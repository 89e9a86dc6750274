"""A small data directory in the layout of locuslab/TOFU, with generated text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_ortho.harness.tasks.tofu_data import FULL_ROWS

CITIES = "Oslo Lima Rome Kyiv Bern Cork Graz".split()


def row(number: int) -> dict[str, Any]:
    return {"question": f"Where was number {number} born?", "answer": f"Number {number} was born in {city(number)}."}


def city(number: int) -> str:
    return CITIES[number % len(CITIES)]


def perturbed_row(number: int) -> dict[str, Any]:
    wrong = [name for name in CITIES if name != city(number)][:3]
    return {
        **row(number),
        "paraphrased_answer": f"{city(number)} is where number {number} was born.",
        "perturbed_answer": [f"{name} is where number {number} was born." for name in wrong],
    }


def choice_row(number: int) -> dict[str, Any]:
    return {"question": f"Capital of {number}?", "answer": city(number), "perturbed_answer": ["Sofia", "Riga"]}


def write(folder: Path, holdout: bool = True) -> Path:
    """Writes the directory, with as few rows as the format permits."""
    tables = {
        "full": [row(n) for n in range(FULL_ROWS)],
        "retain_perturbed": [perturbed_row(n) for n in range(40)],
        "forget10_perturbed": [perturbed_row(n) for n in range(FULL_ROWS - 400, FULL_ROWS)],
    }
    for name in ("real_authors", "world_facts"):
        tables[f"{name}_perturbed"] = [choice_row(n) for n in range(6)]
        tables[name] = [{k: v for k, v in choice_row(n).items() if k != "perturbed_answer"} for n in range(6)]
    for name, size in (("01", 40), ("05", 200), ("10", 400)) if holdout else ():
        tables[f"holdout{name}"] = [row(n) for n in range(9000, 9000 + size)]
    folder.mkdir(exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rows))
    return folder
