"""Runs a board, tuning first, then the cells, and reports its status."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_ortho.harness import distributed
from lm_ortho.leaderboard.config import Board
from lm_ortho.leaderboard.executor import Executor, follow_jobs, make_executor
from lm_ortho.leaderboard.plan import Plan, plan_board, resolve_tuning
from lm_ortho.leaderboard.progress import ProgressScreen, TimeEstimate, describe_piece
from lm_ortho.leaderboard.retain_samples import attach_samples, needed_pieces
from lm_ortho.leaderboard.scheduler import Tally, count_pieces, log_run, run_jobs
from lm_ortho.leaderboard.store import DONE, FAILED, RUNNING, WAITING, Record, Store
from lm_ortho.leaderboard.sweep import open_store
from lm_ortho.leaderboard.worker import Job
from lm_ortho.markup import terminal_text
from lm_ortho.runtime.progress import format_duration


def run_board(
    board: Board,
    directory: Path,
    console: Any,
    command: str = "",
    retry_failed: bool = False,
    only: str = "",
    quiet: bool = False,
) -> Tally | None:
    """Runs the pieces that are missing; returns None in all processes of torchrun but the first.

    ``only`` restricts the run to the cells of a method, or to those whose hash begins with it.

    Raises:
        UserError: for an unknown method, setting, task or model, before anything is written.
    """
    plan = plan_board(board, directory)
    selected_plan = plan_board(board, directory, only) if only else plan
    if distributed.rank():
        follow_jobs()
        return None
    store = open_store(directory, "board", board.name)
    _delete_stale_files(store, directory)
    facts = {"name": board.name, "kind": "board", "board": board.model_dump(mode="json"), "command": command}
    store.plan(plan.pieces, facts=facts)
    with log_run(store, directory) as log, ProgressScreen(store.records(results=False), console, quiet) as screen:
        executor = make_executor(board.resources, screen.progress)
        try:
            _run_phases(store, selected_plan, executor, screen, retry_failed=retry_failed, log=log)
        except BaseException:
            executor.close(clean=False)
            raise
        executor.close()
    return count_pieces(store, [piece.key for piece in selected_plan.pieces])


def _run_phases(
    store: Store, plan: Plan, executor: Executor, screen: ProgressScreen, *, retry_failed: bool, log: Path
) -> None:
    # 1. Try the settings.
    run_jobs(store, [replace(job, log=log) for job in plan.tuning], executor, screen, retry_failed)
    trials = [record for record in store.records() if record.piece.kind == "tune"]
    # 2. Fill in the best ones; without any, a cell fails, unless another process is still trying.
    ready, unresolved = resolve_tuning(plan.cells, trials)
    is_tuning_open = any(record.status in (WAITING, RUNNING) for record in trials)
    for job, reason in [] if is_tuning_open else unresolved:
        _fail_job(store, job, reason, screen)
    # 3. Measure the retain-only model on the tasks that compare others with it.
    logged_jobs = [replace(job, log=log) for job in ready]
    needed = needed_pieces(logged_jobs)
    run_jobs(store, [job for job in logged_jobs if needed & set(job.keys)], executor, screen, retry_failed)
    # 4. Make and measure the models. What lacks samples waits for another process, or fails as the retain-only model.
    jobs, held = attach_samples(store, logged_jobs)
    for hold in held:
        if hold.reason:
            _fail_job(store, hold.job, hold.reason, screen)
    run_jobs(store, jobs, executor, screen, retry_failed)


def _fail_job(store: Store, job: Job, reason: str, screen: ProgressScreen) -> None:
    for key in store.claim(job.keys, retry_failed=True):
        store.fail(key, reason)
    screen.print_line(f"{job.label}: {reason}")


def _delete_stale_files(store: Store, directory: Path) -> None:
    """Deletes partly written folders of killed runs, unless a live run may be writing them."""
    if any(run["alive"] for run in store.runs()):
        return
    for path in [*directory.glob("models/.*.tmp-*"), *directory.glob("results/.*.tmp-*")]:
        shutil.rmtree(path, ignore_errors=True)


def status(directory: Path) -> dict[str, Any]:
    """The status of a board or sweep: counts, cells, errors, seconds left (None where unknown), and its runs."""
    store = Store(directory, create=False)
    records = store.records(results=False)
    cells: dict[str, list[Record]] = {}
    for record in records:
        cells.setdefault(record.piece.cell, []).append(record)
    return {
        "name": store.get_fact("name"),
        **_count_statuses(records),
        "seconds_left": TimeEstimate(records).seconds(),
        "cells": [
            {"cell": key[:12], "label": _cell_label(cell_records), **_count_statuses(cell_records)}
            for key, cell_records in cells.items()
        ],
        "errors": [
            {"cell": r.piece.cell[:12], "label": _cell_label([r]), "piece": describe_piece(r), "error": r.error}
            for r in records
            if r.status == FAILED
        ],
        "runs": store.runs(),
    }


def _count_statuses(records: Sequence[Record]) -> dict[str, int]:
    return {name: sum(r.status == name for r in records) for name in (DONE, FAILED, RUNNING, WAITING)}


def _cell_label(records: Sequence[Record]) -> str:
    config = records[0].piece.config
    if records[0].piece.kind == "tune":
        return f"tuning {config['method']}"
    return str(config["label"]) + (f" seed={config['seed']}" if "seed" in config else "")


def print_status(summary: dict[str, Any], console: Any) -> None:
    """Prints the result of ``status`` as a table and lines."""
    from rich.table import Table

    statuses = (DONE, FAILED, RUNNING, WAITING)
    table = Table("cell", "", *statuses)
    for cell in summary["cells"]:
        table.add_row(*map(terminal_text, (cell["cell"], cell["label"])), *(str(cell[name] or "") for name in statuses))
    console.print(table)
    for error in summary["errors"]:
        first = (error["error"].splitlines() or ["?"])[0]
        line = f"failed: {error['label']}, {error['piece']}: {first}"
        console.print(terminal_text(line), highlight=False, soft_wrap=True)
    seconds = summary["seconds_left"]
    time_left = "unknown" if seconds is None else format_duration(seconds)
    total = sum(summary[name] for name in statuses)
    line = f"{summary['name']}: {summary[DONE]} of {total} done, {summary[FAILED]} failed, time left {time_left}"
    console.print(terminal_text(line))
    for run in summary["runs"]:
        state = "running" if run["alive"] else "ended" if run["ended"] else "interrupted"
        line = f"run: {run['command']} ({state}; {run['log']})"
        console.print(terminal_text(line), highlight=False, soft_wrap=True)
