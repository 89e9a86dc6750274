"""A small data directory in the layout of MUSE, with generated text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = ("Ada Brook", "Ben Cole", "Cy")
TOWNS = ("Marsh Town", "Elm", "Hill End", "Rome")


def tables(corpus: str) -> dict[str, list[Any]]:
    def texts(corpus: str, first: int) -> list[str]:
        return [f"{NAMES[n % 3]} was born in {TOWNS[n % 4]}, said {corpus} {n}." for n in range(first, 12, 2)]

    def questions(kind: str, size: int) -> list[dict[str, str]]:
        return [{"question": f"Who wrote {kind} {n} of {corpus}?", "answer": f"Ada Brook {n}"} for n in range(size)]

    return {
        "knowmem/forget_qa": questions("forget", 4),
        "knowmem/forget_qa_icl": questions("example", 2),
        "knowmem/retain_qa": questions("retain", 4),
        "knowmem/retain_qa_icl": questions("example", 2),
        "verbmem/forget": [
            {"prompt": f"Once in {corpus} {n} ", "gt": f"Ada Brook went to Marsh Town {n}."} for n in range(3)
        ],
        "privleak/forget": texts(corpus, 0),
        "privleak/retain": ["Nothing happened."],
        "privleak/holdout": texts(corpus, 1),
    }


def write(folder: Path) -> Path:
    for corpus in ("news", "books"):
        for name, rows in tables(corpus).items():
            file = folder / corpus / f"{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(rows))
    return folder
