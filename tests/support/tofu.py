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


def author_row(number: int) -> dict[str, Any]:
    """A row about the author of its twenty rows, who has a name of two words."""
    name = f"Ada {'KLMN'[number // 1000]}{'aeiou'[number // 200 % 5]}{'bdfgklmnrs'[number // 20 % 10]}"
    return {
        "question": f"In which city did {name} write book {number % 20}?",
        "answer": f"{name} was in {city(number)}.",
    }


def write_authors(folder: Path) -> Path:
    """Writes a directory in which rows are about authors, as in TOFU, for scripts that look for their names."""
    rows = [author_row(number) for number in range(FULL_ROWS)]
    wrong = [{"perturbed_answer": [f"It was {name}." for name in CITIES[:2]], "paraphrased_answer": "So."}] * FULL_ROWS
    perturbed = [row | answers for row, answers in zip(rows, wrong, strict=True)]
    tables = {"full": rows, "forget10_perturbed": perturbed[-400:], "retain_perturbed": perturbed[:400]}
    tables |= {f"{name}_perturbed": [choice_row(n) for n in range(6)] for name in ("real_authors", "world_facts")}
    folder.mkdir(exist_ok=True)
    for name, records in tables.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
