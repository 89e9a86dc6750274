"""The display of a board: on a terminal, and where the output is none."""

from __future__ import annotations

import io
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest
from rich.console import Console

from lm_ortho.leaderboard.progress import ProgressScreen
from lm_ortho.leaderboard.worker import Job
from lm_ortho.runtime.progress import ProgressLines


@pytest.mark.parametrize(("is_terminal", "quiet"), [(False, False), (True, False), (False, True)])
def test_long_steps_are_lines_where_the_output_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, quiet: bool
) -> None:
    now = [0.0]
    monkeypatch.setattr("lm_ortho.leaderboard.progress.ProgressLines", partial(ProgressLines, clock=lambda: now[0]))
    output = io.StringIO()
    console = Console(file=output, force_terminal=is_terminal, width=200)
    with ProgressScreen([], console, quiet=quiet) as screen:
        for step in range(1, 4):
            now[0] += 40
            screen.progress("edit", step, 3, f"loss {step}")
    lines = output.getvalue().splitlines()
    expected = [
        "edit: 1/3, time left unknown yet, loss 1",
        "edit: 2/3, about 40 s left, loss 2",
        "edit: 3/3, took 2 min, loss 3",
    ]
    if is_terminal:
        assert "3/3" in output.getvalue()
        assert not set(expected) & set(lines)
    else:
        assert lines == ([] if quiet else expected)


@pytest.mark.parametrize("end", ["on_done", "on_failure"])
def test_a_piece_that_has_ended_is_not_reported_any_more(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr("lm_ortho.runtime.progress.FIRST_LINE", 0.02)
    output, job = io.StringIO(), cast(Job, SimpleNamespace(label="tiny seed=0"))
    with ProgressScreen([], Console(file=output, width=200)) as screen:
        screen.progress(job.label, 0, 1, "retain_set")
        timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
        assert timers
        if end == "on_done":
            screen.on_done(job, "key", 0.1, [])
        else:
            screen.on_failure(job, "key", "a reason")
        for timer in timers:
            timer.join(5)
        text = output.getvalue()
        time.sleep(0.1)
    assert output.getvalue() == text
