"""The published TOFU as documents: from a local directory, or from the hub (``locuslab/TOFU``).

Source: Maini et al. 2024, TOFU: A Task of Fictitious Unlearning for LLMs, arXiv 2401.06121.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets

from lm_ortho.data.rows import Row, read_rows
from lm_ortho.errors import UserError
from lm_ortho.harness.tasks.aggregation import not_available
from lm_ortho.harness.tasks.datasets import ROW_FEATURES
from lm_ortho.harness.tasks.samples import by_question, read_samples
from lm_ortho.hub import first_line

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

HUB = "locuslab/TOFU"
DIRECTORY_VARIABLE = "LM_ORTHO_TOFU_DIR"
AUTHOR_ROWS = 20
"""Consecutive rows about the same author."""
FULL_ROWS = 4000
FORGET_ROWS = {"01": 40, "05": 200, "10": 400}
"""Questions to forget; they are the last rows of ``full``, and of the larger ones."""
RETAIN_SHARES = {"99": "01", "95": "05", "90": "10"}
FORMS = ("plain", "llama2")
"""How a question is put without a chat template: as for phi, or in the tags of Llama 2."""

_TEXT = datasets.Value("string")
_NUMBER = datasets.Value("float64")
FEATURES = datasets.Features(
    {
        **ROW_FEATURES,
        "part": _TEXT,
        "retrained_ratio": _NUMBER,
        "retrained_score": _NUMBER,
        "no_ratio": _TEXT,
        "no_score": _TEXT,
    }
)
"""``part`` is the set a row belongs to; ``retrained_*`` is what the retain-only model logged for it, ``no_*`` why
there is nothing."""


def tofu(split: str, **metadata: Any) -> dict[str, datasets.Dataset]:
    """The documents of ``tofu_<split>``; forget splits have the hold-out rows after their own.

    Raises:
        UserError: for a directory without the file, a hub that cannot be reached, and other bad arguments.
    """
    source = directory(metadata)
    if split.startswith("forget"):
        return {"test": _forget(split, source, metadata)}
    rows = _with_answers(_table(split, source), _perturbed(split, source))
    return {"test": _documents([(split, row) for row in _first(rows, metadata)], metadata)}


def utility(**metadata: Any) -> dict[str, datasets.Dataset]:
    """The three sets of model utility, in the order of ``lm_ortho.metrics.tofu.SETS``."""
    source, rows = directory(metadata), []
    for part, name in (("retain", "retain_perturbed"), ("real_authors", None), ("world_facts", None)):
        table = _table(name or f"{part}_perturbed", source)
        rows += [(part, row) for row in _first([_right_for_paraphrase(row) for row in table], metadata)]
    return {"test": _documents(rows, metadata)}


def directory(metadata: Mapping[str, Any]) -> str:
    """The local directory with the files of TOFU; "" for the hub. Raises ``UserError`` if it is not there."""
    named = {"tofu_dir": metadata.get("tofu_dir"), DIRECTORY_VARIABLE: os.environ.get(DIRECTORY_VARIABLE)}
    for name, given in named.items():
        if not given:
            continue
        if not Path(given).expanduser().is_dir():
            raise UserError(f"{name}={given!r}: no such directory; it should hold the JSONL files of {HUB}")
        return str(Path(given).expanduser().resolve())
    return ""


def _forget(split: str, source: str, metadata: Mapping[str, Any]) -> datasets.Dataset:
    task = f"tofu_{split}"
    rows = [("forget", row) for row in _first(_perturbed(split, source) or _table(split, source), metadata)]
    no_score = ""
    try:
        held = _table(f"holdout{split.removeprefix('forget')}", source)
        rows += [("holdout", row) for row in _first(held, metadata)]
    except UserError as error:
        log.info("%s: no PrivLeak: %s", task, error)
        no_score = not_available("no hold-out rows, which are on the hub only")
    samples = metadata.get("tofu_retain_samples")
    if not samples:
        missing = not_available("no samples of the retain-only model; --metadata tofu_retain_samples=PATH")
        return _documents(rows, metadata, no_ratio=missing, no_score=no_score or missing)
    logged = read_samples(samples, task, "tofu_retain_samples")
    ratios = by_question(logged, "forget_quality", task, "tofu_retain_samples")
    asked = {row.question for part, row in rows if part == "forget"}
    if missing_rows := asked - ratios.keys():
        raise UserError(
            f"tofu_retain_samples={str(samples)!r}: {len(missing_rows)} of {len(asked)} questions are not in the "
            f"samples; log the whole task {task} with the retain-only model"
        )
    scores = by_question(logged, "priv_leak", task, "tofu_retain_samples")
    return _documents(rows, metadata, no_score=no_score, ratios=ratios, scores=scores)


def _documents(
    rows: Sequence[tuple[str, Row]],
    metadata: Mapping[str, Any],
    no_ratio: str = "",
    no_score: str = "",
    ratios: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
) -> datasets.Dataset:
    form = metadata.get("tofu_form", "plain")
    if form not in FORMS:
        raise UserError(f"tofu_form={form!r} is unknown; known: {', '.join(FORMS)}; for chats --apply_chat_template")
    docs = []
    for number, (part, row) in enumerate(rows):
        prompt = f"[INST] {row.question} [/INST]" if form == "llama2" else ""
        context = prompt or row.context
        docs.append(
            {
                "id": number,
                **row.as_dict(),
                "prompt": prompt,
                "context": context,
                "target": row.answer if prompt else f" {row.answer}",
                "group": f"{part} {row.group}",
                "part": part,
                "retrained_ratio": _logged(ratios, row.question),
                "retrained_score": _logged(scores, row.question),
                "no_ratio": no_ratio,
                "no_score": no_score,
            }
        )
    return datasets.Dataset.from_list(docs, features=FEATURES)


def _logged(values: Mapping[str, Any] | None, question: str) -> float | None:
    """The first number of what was logged for a question; None where nothing, or only a reason, was logged."""
    found = (values or {}).get(question)
    entries = found if isinstance(found, list) else []
    return next((float(entry) for entry in entries if isinstance(entry, float | int)), None)


def _first(rows: Sequence[Row], metadata: Mapping[str, Any]) -> Sequence[Row]:
    """The first ``tofu_first`` rows of a set, as the published logs have it (300); all without it."""
    most = metadata.get("tofu_first")
    if most is None:
        return rows
    if not str(most).isdigit() or int(most) < 1:
        raise UserError(f"tofu_first={most!r}: must be a whole number above 0")
    return rows[: int(most)]


def _perturbed(split: str, source: str) -> list[Row]:
    """The rows of a set that have wrong answers; empty where the set has none."""
    if split.startswith("holdout"):
        return []
    name = "retain_perturbed" if split.startswith("retain") else f"{split}_perturbed"
    return [_right_for_paraphrase(row) for row in _table(name, source)]


def _with_answers(rows: Sequence[Row], perturbed: Sequence[Row]) -> list[Row]:
    """The rows, those among them that have wrong answers with these."""
    known = {(row.question, row.answer): row for row in perturbed}
    found = [(row, known.get((row.question, row.answer))) for row in rows]
    return [row if full is None else replace(full, group=row.group) for row, full in found]


def _right_for_paraphrase(row: Row) -> Row:
    """Real authors and world facts have no paraphrase: the answer takes its place."""
    if row.paraphrased_answer or not row.perturbed_answer:
        return row
    return replace(row, paraphrased_answer=row.answer)


@lru_cache(maxsize=32)
def _table(name: str, source: str) -> list[Row]:
    """The rows of one configuration of TOFU; groups are authors where the rows are about authors."""
    if not source:
        return _with_groups(name, _from_hub(name))
    for path in (Path(source) / f"{name}{end}" for end in (".jsonl", ".json")):
        if path.is_file():
            return _with_groups(name, read_rows(path, "tofu_dir"))
    if larger := _slice_of(name):
        whole, start, stop = larger
        return _table(whole, source)[start:stop]
    raise UserError(f"tofu_dir={source!r}: no {name}.jsonl there; it is a configuration of {HUB} on the hub")


def _slice_of(name: str) -> tuple[str, int | None, int | None] | None:
    """The larger configuration that holds ``name``, and where."""
    share = name.removeprefix("forget").removesuffix("_perturbed")
    if name.startswith("forget") and share in FORGET_ROWS:
        if name.endswith("_perturbed"):
            return ("forget10_perturbed", -FORGET_ROWS[share], None) if share != "10" else None
        return "full", FULL_ROWS - FORGET_ROWS[share], FULL_ROWS
    kept = name.removeprefix("retain")
    if name.startswith("retain") and kept in RETAIN_SHARES:
        return "full", 0, FULL_ROWS - FORGET_ROWS[RETAIN_SHARES[kept]]
    return None


def _with_groups(name: str, rows: Sequence[Row]) -> list[Row]:
    about_authors = not name.startswith(("real_authors", "world_facts"))
    size = AUTHOR_ROWS if about_authors else 1
    return [replace(row, group=row.group or f"{number // size}") for number, row in enumerate(rows)]


def _from_hub(name: str) -> list[Row]:
    try:
        return read_rows(f"hub:{HUB}:{name}:train", "tofu")
    except UserError as error:
        raise UserError(
            f"{first_line(error)}; without a network pass --metadata tofu_dir=DIR (or set {DIRECTORY_VARIABLE}) "
            f"with the files of {HUB}"
        ) from None
