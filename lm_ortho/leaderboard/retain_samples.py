"""Hands the samples of the retain-only model to the tasks that compare a model with it.

``forget_quality`` of TOFU and ``priv_leak`` of TOFU and MUSE compare with what the retain-only model logged for the
same documents. A board measures the row ``never_saw`` first, and its samples become the metadata of the other rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lm_ortho.leaderboard.config import Board
from lm_ortho.leaderboard.store import DONE, FAILED, Record, Store
from lm_ortho.leaderboard.worker import Job

METHOD = "never_saw"
"""The method whose model is the retain-only one."""
_ARGUMENTS = {
    "tofu_forget01": "tofu_retain_samples",
    "tofu_forget05": "tofu_retain_samples",
    "tofu_forget10": "tofu_retain_samples",
    "muse_news_privleak": "muse_retain_samples",
    "muse_books_privleak": "muse_retain_samples",
}
"""The metadata that names the samples, by task."""


class Hold(NamedTuple):
    """Pieces that cannot run: ``reason`` says why, "" where another process is still measuring the samples."""

    job: Job
    reason: str


def find_argument(task: str, limit: int | None, metadata: Mapping[str, Any]) -> str:
    """The metadata that names the samples for ``task``; "" if it needs none or cannot have any (``explain_absence``).

    The comparison of TOFU is over the whole set, so ``limit`` excludes it, and ``tofu_first`` takes its place.
    """
    argument = _ARGUMENTS.get(task, "")
    is_cut = limit is not None and argument == "tofu_retain_samples"
    is_given = argument in metadata or (argument == "muse_retain_samples" and "muse_retrained_auc" in metadata)
    return "" if is_cut or is_given else argument


def explain_absence(board: Board, limits: Mapping[str, int | None]) -> list[str]:
    """A sentence for each reason why a metric that needs the samples is left out; ``limits`` by task."""
    tasks = [task for task in limits if _ARGUMENTS.get(task) and _ARGUMENTS[task] not in board.metadata]
    cut = [task for task in tasks if limits[task] and not find_argument(task, limits[task], board.metadata)]
    missing, reason = [], ""
    if all(entry.method != METHOD for entry in board.methods):
        missing, reason = tasks, "the board has no row `method: never_saw`"
    elif cut:
        missing, reason = cut, "it is over whole sets, and the board has a limit; `metadata: {tofu_first: N}` cuts them"
    if not missing:
        return []
    return [
        f"The comparison of {', '.join(missing)} with the retain-only model (forget_quality, forget_ks, priv_leak) "
        f"is left out: {reason}."
    ]


def needed_pieces(jobs: Iterable[Job]) -> set[str]:
    """The keys of the pieces whose samples the pieces of ``jobs`` need."""
    samples = (piece.config.get("retain_samples") for job in jobs for piece in job.pieces)
    return {entry["piece"] for entry in samples if entry}


def attach_samples(store: Store, jobs: Sequence[Job]) -> tuple[list[Job], list[Hold]]:
    """The jobs with the files of samples that their pieces need, and the pieces without them, as jobs of their own."""
    needed = needed_pieces(jobs)
    records = {record.piece.key: record for record in store.records() if record.piece.key in needed}
    files = {key: _find_file(store.path.parent, record) for key, record in records.items() if record.status == DONE}
    ready, held = [], list[Hold]()
    for job in jobs:
        missing = [piece for piece in job.pieces if needed_pieces([replace(job, pieces=(piece,))]) - set(files)]
        rest = tuple(piece for piece in job.pieces if piece not in missing)
        ready.append(replace(job, pieces=rest, samples=files))
        if missing:
            key = missing[0].config["retain_samples"]["piece"]
            has_failed = key in records and records[key].status == FAILED
            reason = "the retain-only model (never_saw) could not be measured on this task" if has_failed else ""
            held.append(Hold(replace(job, make=None, pieces=tuple(missing)), reason))
    return ready, held


def _find_file(directory: Path, record: Record) -> str:
    start = f"samples_{record.piece.config['task']}_"
    return next(str(directory / name) for name in record.result["files"] if Path(name).name.startswith(start))
