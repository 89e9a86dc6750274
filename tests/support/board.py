"""Methods of boards that take no time (``imports: [tests.support.board]``), and functions that run such a board."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import yaml

from lm_ortho.leaderboard.board import run_board
from lm_ortho.leaderboard.cells import Cell
from lm_ortho.leaderboard.config import make_board
from lm_ortho.leaderboard.makers import MAKERS
from lm_ortho.leaderboard.scheduler import Tally
from lm_ortho.runtime.progress import ProgressCallback
from tests.support.harness import make_model, make_tokenizer

HOME = "TINY_BOARD_HOME"
"""Environment variable: the folder with a decomposed model and rows (fixture ``home``)."""


@dataclass(frozen=True)
class Tiny:
    """Writes a random model that depends on settings and seed; with ``dial`` copies the decomposed model."""

    mode: str = "none"
    dial: bool = False

    def check(self, settings: Mapping[str, Any]) -> None:
        pass

    def grid(self) -> Sequence[Mapping[str, Any]]:
        return [{"shift": shift} for shift in (0.3, 0.1, 0.2)]

    def score(self, cell: Cell, progress: ProgressCallback) -> Mapping[str, Any]:
        if cell.settings["shift"] == 0.3:
            raise RuntimeError("too far")
        return {"forget": 0.0, "retain": 0.0, "total": cell.settings["shift"]}

    def make(self, cell: Cell, directory: Path, progress: ProgressCallback) -> Mapping[str, Any]:
        progress("tiny", 1, 2, "")
        if pause := cell.settings.get("pause"):
            time.sleep(pause)
        if cell.settings.get("fail"):
            raise ValueError("no such weights")
        if (marker := cell.settings.get("die_once")) and not Path(marker).exists():
            Path(marker).write_text("died")
            os.kill(os.getpid(), 9)
        if cell.settings.get("die_always"):
            os.kill(os.getpid(), 9)
        if self.dial:
            shutil.copytree(Path(os.environ[HOME]) / "decomposed", directory, dirs_exist_ok=True)
            return {}
        tokenizer = make_tokenizer()
        model = make_model(len(tokenizer), seed=0)
        direction = make_model(len(tokenizer), seed=1 + cell.seed)
        for parameter, change in zip(model.parameters(), direction.parameters(), strict=True):
            parameter.data += cell.settings.get("shift", 0.0) * change.data
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return {"loss": 1.0}


for _name, _maker in {
    "tiny": Tiny(),
    "tiny_other": Tiny(),
    "tiny_dial": Tiny("auto", dial=True),
    "never_saw": Tiny("end"),
    "unedited": Tiny("end"),
}.items():
    if _name not in MAKERS:
        MAKERS.register(_name)(_maker)

BOARD = """
name: tiny
title: A tiny board
tasks: [forget_set, retain_set]
alphas: [0, 1]
seeds: [0]
imports: [tests.support.board]
device: cpu
methods:
  - method: tiny
    settings: {shift: 0.1}
  - method: tiny_dial
  - {method: never_saw, settings: {shift: 0.02}}
  - {method: unedited, settings: {shift: 0.0}}
frontier:
  forget: [{task: forget_set, metric: secret_ppl}]
  retain: [{task: retain_set, metric: ppl}]
"""


def board_text(home: Path, **changes: Any) -> str:
    """The YAML of the tiny board with the rows of ``home``."""
    board = yaml.safe_load(BOARD)
    rows = {name: str(home / f"{name}.jsonl") for name in ("forget", "retain")}
    return yaml.safe_dump({**board, "metadata": rows, **changes})


def run_tiny(home: Path, out: Path, retry_failed: bool = False, only: str = "", **changes: Any) -> Tally | None:
    """Runs the tiny board in this process, without output."""
    from rich.console import Console

    os.environ[HOME] = str(home)
    lm_eval.evaluator.add_env_info = lambda storage: None  # runs a dozen subprocesses
    board = make_board(yaml.safe_load(board_text(home, **changes)))
    return run_board(
        board,
        out,
        Console(quiet=True),
        command="lm-ortho board run tiny.yaml",
        retry_failed=retry_failed,
        only=only,
        quiet=True,
    )


def run_and_kill(home: Path, out: Path, seconds: float) -> bool:
    """Runs the tiny board in a process and kills it after some seconds; whether it was still running then."""
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.board"])
    process = context.Process(target=run_tiny, args=(home, out))
    process.start()
    process.join(seconds)
    was_alive = process.is_alive()
    process.kill()
    process.join()
    return was_alive


def numbers(out: Path) -> dict[str, Any]:
    """All fields of the rows of the table, without times."""
    from lm_ortho.leaderboard.report.formats import read_results

    results = read_results(out)
    return {
        row.name: (
            row.numbers,
            row.forget,
            row.retain,
            row.dominated_by,
            row.best_in,
            row.worse_in,
            row.cells,
            row.commands,
        )
        for row in results.rows
    }
