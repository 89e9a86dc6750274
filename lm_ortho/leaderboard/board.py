"""A board from its YAML file to finished pieces: tuning first, then the cells; and how far it is."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_ortho.errors import UserError
from lm_ortho.harness import distributed
from lm_ortho.leaderboard.config import Board
from lm_ortho.leaderboard.executor import Executor, follow, make_executor
from lm_ortho.leaderboard.plan import Plan, plan_board, settled
from lm_ortho.leaderboard.progress import Left, ProgressScreen, span, what
from lm_ortho.leaderboard.scheduler import Tally, drive, logged_run, tally
from lm_ortho.leaderboard.store import DONE, FAILED, RUNNING, WAITING, Record, Store
from lm_ortho.leaderboard.worker import Job


def run_board(
    board: Board,
    directory: Path,
    console: Any,
    command: str = "",
    retry_failed: bool = False,
    only: str = "",
    quiet: bool = False,
) -> Tally | None:
    """Does what is missing; None in a process of torchrun that only helps.

    Raises:
        UserError: before anything is written, for whatever the board names that is not there.
    """
    plan = plan_board(board, directory)
    wanted = plan_board(board, directory, only) if only else plan
    if distributed.rank():
        follow()
        return None
    store = _store(board, directory)
    _sweep_leavings(store, directory)
    store.plan(plan.pieces, facts={"name": board.name, "kind": "board", "board": board.model_dump(mode="json"),
                                   "command": command})  # fmt: skip
    with logged_run(store, directory) as log, ProgressScreen(store.records(results=False), console, quiet) as screen:
        executor = make_executor(board.resources, screen.progress)
        try:
            _both_phases(store, wanted, executor, screen, retry_failed, log)
        except BaseException:
            executor.close(clean=False)
            raise
        executor.close()
    return tally(store, [piece.key for piece in wanted.pieces])


def _both_phases(
    store: Store, plan: Plan, executor: Executor, screen: ProgressScreen, retry_failed: bool, log: Path
) -> None:
    drive(store, [replace(job, log=log) for job in plan.tuning], executor, screen, retry_failed)
    tuned = [record for record in store.records() if record.piece.kind == "tune"]
    ready, stuck = settled(plan.cells, tuned)
    open_tuning = any(record.status in (WAITING, RUNNING) for record in tuned)
    for job, reason in [] if open_tuning else stuck:
        _give_up(store, job, reason, screen)
    drive(store, [replace(job, log=log) for job in ready], executor, screen, retry_failed)


def _give_up(store: Store, job: Job, reason: str, screen: ProgressScreen) -> None:
    for key in store.claim(job.keys, retry_failed=True):
        store.fail(key, reason)
    screen.say(f"{job.label}: {reason}")


def _store(board: Board, directory: Path) -> Store:
    store = Store(directory)
    name = store.fact("name")
    if name is not None and name != board.name:
        raise UserError(f"out={str(directory)!r} holds {name!r}; choose another folder for {board.name!r}")
    return store


def _sweep_leavings(store: Store, directory: Path) -> None:
    """Removes what a killed run left half-written, unless another run is alive that may be writing it."""
    if any(run["alive"] for run in store.runs()):
        return
    for path in [*directory.glob("models/.*.tmp-*"), *directory.glob("results/.*.tmp-*")]:
        shutil.rmtree(path, ignore_errors=True)


def status(directory: Path) -> dict[str, Any]:
    """How far a board or sweep is: counts, cells, errors, seconds left if anything tells, and its runs."""
    store = Store(directory, create=False)
    records = store.records(results=False)
    cells: dict[str, list[Record]] = {}
    for record in records:
        cells.setdefault(record.piece.cell, []).append(record)
    return {
        "name": store.fact("name"),
        **_counts(records),
        "seconds_left": Left(records).seconds(),
        "cells": [{"cell": key[:12], "label": _title(found), **_counts(found)} for key, found in cells.items()],
        "errors": [
            {"cell": r.piece.cell[:12], "label": _title([r]), "piece": what(r), "error": r.error}
            for r in records
            if r.status == FAILED
        ],
        "runs": store.runs(),
    }


def _counts(records: Sequence[Record]) -> dict[str, int]:
    return {name: sum(r.status == name for r in records) for name in (DONE, FAILED, RUNNING, WAITING)}


def _title(records: Sequence[Record]) -> str:
    config = records[0].piece.config
    if records[0].piece.kind == "tune":
        return f"tuning {config['method']}"
    return str(config["label"]) + (f" seed={config['seed']}" if "seed" in config else "")


def print_status(found: dict[str, Any], console: Any) -> None:
    """The same for people."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("cell", "", DONE, FAILED, RUNNING, WAITING)
    for cell in found["cells"]:
        table.add_row(
            cell["cell"], escape(cell["label"]), *(str(cell[name] or "") for name in (DONE, FAILED, RUNNING, WAITING))
        )
    console.print(table)
    for error in found["errors"]:
        first = (error["error"].splitlines() or ["?"])[0]
        console.print(
            f"failed: {error['label']}, {error['piece']}: {first}", highlight=False, markup=False, soft_wrap=True
        )
    left = found["seconds_left"]
    told = "unknown" if left is None else span(left)
    total = sum(found[name] for name in (DONE, FAILED, RUNNING, WAITING))
    console.print(f"{found['name']}: {found[DONE]} of {total} done, {found[FAILED]} failed, time left {told}")
    for run in found["runs"]:
        state = "at work" if run["alive"] else "ended" if run["ended"] else "interrupted"
        console.print(f"run: {run['command']} ({state}; {run['log']})", highlight=False, markup=False, soft_wrap=True)
