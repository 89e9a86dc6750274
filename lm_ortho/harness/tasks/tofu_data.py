"""Documents of the published TOFU, from a local directory or from the hub (``locuslab/TOFU``).

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
from lm_ortho.finetune.loading import find_place
from lm_ortho.harness.tasks.aggregation import not_available
from lm_ortho.harness.tasks.datasets import ROW_FEATURES
from lm_ortho.harness.tasks.samples import read_samples, values_by_question
from lm_ortho.hub import first_line

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

HUB = "locuslab/TOFU"
DIRECTORY_VARIABLE = "LM_ORTHO_TOFU_DIR"
AUTHOR_ROWS = 20
"""Number of consecutive rows about the same author."""
FULL_ROWS = 4000
FORGET_ROWS = {"01": 40, "05": 200, "10": 400}
"""Number of questions to forget: the last rows of ``full``, and of every larger forget set."""
RETAIN_SHARES = {"99": "01", "95": "05", "90": "10"}
FORMS = ("plain", "llama2")
"""Prompt formats without a chat template: that of phi, or the tags of Llama 2."""

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
"""``part`` is the set of a row, ``retrained_*`` the value that the retain-only model logged for it, ``no_*`` the reason
if there is none."""


def tofu(split: str, **metadata: Any) -> dict[str, datasets.Dataset]:
    """Returns the documents of ``tofu_<split>``; forget splits have the held-out rows at their end.

    Raises:
        UserError: for a directory without the file, a hub that cannot be reached, and other invalid arguments.
    """
    source = directory(metadata)
    if split.startswith("forget"):
        return {"test": _build_forget_documents(split, source, metadata)}
    rows = _add_perturbed_answers(_read_table(split, source), _read_perturbed(split, source))
    return {"test": _build_documents([(split, row) for row in _limit_rows(rows, metadata)], metadata)}


def utility(**metadata: Any) -> dict[str, datasets.Dataset]:
    """Returns the three sets of model utility, in the order of ``lm_ortho.metrics.tofu.SETS``."""
    source, rows = directory(metadata), []
    for part, name in (("retain", "retain_perturbed"), ("real_authors", None), ("world_facts", None)):
        table = [_fill_paraphrase(row) for row in _read_table(name or f"{part}_perturbed", source)]
        rows += [(part, row) for row in _limit_rows(table, metadata)]
    return {"test": _build_documents(rows, metadata)}


def directory(metadata: Mapping[str, Any]) -> str:
    """Returns the local directory with the files of TOFU; "" for the hub.

    Raises:
        UserError: for a directory that does not exist.
    """
    paths = {"tofu_dir": metadata.get("tofu_dir"), DIRECTORY_VARIABLE: os.environ.get(DIRECTORY_VARIABLE)}
    for name, path in paths.items():
        if not path:
            continue
        folder = find_place(path, name)
        if not folder.is_dir():
            raise UserError(f"{name}={path!r}: no such directory; it should hold the JSONL files of {HUB}")
        return str(folder.resolve())
    return ""


def _build_forget_documents(split: str, source: str, metadata: Mapping[str, Any]) -> datasets.Dataset:
    task = f"tofu_{split}"
    # 1. The rows of the forget set, and the held-out rows of PrivLeak, if they are available.
    forget_rows = _read_perturbed(split, source) or _read_table(split, source)
    rows = [("forget", row) for row in _limit_rows(forget_rows, metadata)]
    no_score = ""
    try:
        holdout_rows = _read_table(f"holdout{split.removeprefix('forget')}", source)
        rows += [("holdout", row) for row in _limit_rows(holdout_rows, metadata)]
    except UserError as error:
        log.info("%s: no PrivLeak: %s", task, error)
        no_score = not_available("no held-out rows, which are on the hub only")
    # 2. The values that the retain-only model logged for the same questions.
    samples = metadata.get("tofu_retain_samples")
    if not samples:
        missing = not_available("no samples of the retain-only model; --metadata tofu_retain_samples=PATH")
        return _build_documents(rows, metadata, no_ratio=missing, no_score=no_score or missing)
    records = read_samples(samples, task, "tofu_retain_samples")
    ratios = values_by_question(records, "forget_quality", task=task, argument="tofu_retain_samples")
    _check_questions([row.question for part, row in rows if part == "forget"], ratios, samples, task)
    scores = values_by_question(records, "priv_leak", task=task, argument="tofu_retain_samples")
    return _build_documents(rows, metadata, no_score=no_score, ratios=ratios, scores=scores)


def _check_questions(questions: Sequence[str], ratios: Mapping[str, Any], samples: Any, task: str) -> None:
    """Raises ``UserError`` where the retain-only model logged no value for a question."""
    logged = [ratios.get(question) is not None for question in questions]
    if all(logged):
        return
    advice = f"log the whole task {task} with the retain-only model, without --limit"
    count = sum(logged)
    if count and all(logged[:count]):  # the first ones, as a run with --limit logs them
        advice += f"; or compare the first {count} rows of each set: --metadata tofu_first={count}"
    elif not count:
        advice = f"the log is of other rows; {advice}"
    raise UserError(
        f"tofu_retain_samples={str(samples)!r}: {len(logged) - count} of {len(logged)} questions are not in the "
        f"samples; {advice}"
    )


def _build_documents(
    rows: Sequence[tuple[str, Row]],
    metadata: Mapping[str, Any],
    *,
    no_ratio: str = "",
    no_score: str = "",
    ratios: Mapping[str, float | None] | None = None,
    scores: Mapping[str, float | None] | None = None,
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
                "retrained_ratio": (ratios or {}).get(row.question),
                "retrained_score": (scores or {}).get(row.question),
                "no_ratio": no_ratio,
                "no_score": no_score,
            }
        )
    return datasets.Dataset.from_list(docs, features=FEATURES)


def _limit_rows(rows: Sequence[Row], metadata: Mapping[str, Any]) -> Sequence[Row]:
    """Returns the first ``tofu_first`` rows of a set (300 in the published logs); all rows without it."""
    limit = metadata.get("tofu_first")
    if limit is None:
        return rows
    if not str(limit).isdecimal() or int(limit) < 1:
        raise UserError(f"tofu_first={limit!r}: must be a whole number above 0")
    return rows[: int(limit)]


def _read_perturbed(split: str, source: str) -> list[Row]:
    """Returns the rows of a set that have wrong answers; an empty list if the set has none."""
    if split.startswith("holdout"):
        return []
    name = "retain_perturbed" if split.startswith("retain") else f"{split}_perturbed"
    return [_fill_paraphrase(row) for row in _read_table(name, source)]


def _add_perturbed_answers(rows: Sequence[Row], perturbed_rows: Sequence[Row]) -> list[Row]:
    """Replaces the rows that also exist with wrong answers by these; the group stays."""
    by_text = {(row.question, row.answer): row for row in perturbed_rows}
    matches = [(row, by_text.get((row.question, row.answer))) for row in rows]
    return [row if match is None else replace(match, group=row.group) for row, match in matches]


def _fill_paraphrase(row: Row) -> Row:
    """Uses the answer as the paraphrase of real authors and world facts, which have none."""
    if row.paraphrased_answer or not row.perturbed_answer:
        return row
    return replace(row, paraphrased_answer=row.answer)


@lru_cache(maxsize=32)
def _read_table(name: str, source: str) -> list[Row]:
    """Reads one configuration of TOFU. The groups are authors, if the rows are about authors.

    The text stays as it was published: numbers are compared with those of published models, and the values that a
    retain-only model logged are found by the question.
    """
    if not source:
        return _add_groups(name, _load_from_hub(name))
    if path := find_table(Path(source), name):
        return _add_groups(name, read_rows(path, "tofu_dir", normalise=False))
    if position := _find_slice(name):
        superset, start, stop = position
        return _read_table(superset, source)[start:stop]
    raise UserError(
        f"tofu_dir={source!r}: {name}.jsonl is missing in this directory; it is a configuration of {HUB} on the hub"
    )


def find_table(folder: Path, name: str) -> Path | None:
    """Returns the file of a configuration in ``folder``: ``<name>.jsonl``, or ``<name>.json`` as on the hub."""
    paths = (folder / f"{name}{ending}" for ending in (".jsonl", ".json"))
    return next((path for path in paths if path.is_file()), None)


def _find_slice(name: str) -> tuple[str, int | None, int | None] | None:
    """Returns the larger configuration that contains ``name``, with the start and stop of its rows."""
    share = name.removeprefix("forget").removesuffix("_perturbed")
    if name.startswith("forget") and share in FORGET_ROWS:
        if name.endswith("_perturbed"):
            return ("forget10_perturbed", -FORGET_ROWS[share], None) if share != "10" else None
        return "full", FULL_ROWS - FORGET_ROWS[share], FULL_ROWS
    retain_share = name.removeprefix("retain")
    if name.startswith("retain") and retain_share in RETAIN_SHARES:
        return "full", 0, FULL_ROWS - FORGET_ROWS[RETAIN_SHARES[retain_share]]
    return None


def _add_groups(name: str, rows: Sequence[Row]) -> list[Row]:
    about_authors = not name.startswith(("real_authors", "world_facts"))
    size = AUTHOR_ROWS if about_authors else 1
    return [replace(row, group=row.group or f"{number // size}") for number, row in enumerate(rows)]


def _load_from_hub(name: str) -> list[Row]:
    try:
        return read_rows(f"hub:{HUB}:{name}:train", "tofu", normalise=False)
    except UserError as error:
        raise UserError(
            f"{first_line(error)}; without a network pass --metadata tofu_dir=DIR (or set {DIRECTORY_VARIABLE}) "
            f"with the files of {HUB}"
        ) from None
