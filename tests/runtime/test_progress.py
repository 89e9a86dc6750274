"""Progress: bars on a terminal, lines with the time left elsewhere, and stages deep in a computation."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from lm_ortho.runtime.progress import (
    FIRST_LINE,
    LINE_INTERVAL,
    ProgressBars,
    ProgressLines,
    format_duration,
    long_stage,
    report_progress,
    show_progress,
    track,
)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run_stage(progress: Any, clock: Clock, *, stage: str = "edit", steps: int, seconds: float, first: int = 1) -> None:
    for step in range(first, steps + 1):
        clock.now += seconds
        progress(stage, step, steps, f"loss {step}")


def test_a_line_now_and_then_with_step_and_time_left(clock: Clock) -> None:
    lines: list[str] = []
    run_stage(ProgressLines(lines.append, clock), clock, steps=50, seconds=2)
    assert lines == [
        "edit: 3/50, about 2 min left, loss 3",
        "edit: 18/50, about 64 s left, loss 18",
        "edit: 33/50, about 34 s left, loss 33",
        "edit: 48/50, about 4 s left, loss 48",
        "edit: 50/50, took 2 min, loss 50",
    ]


def test_a_short_stage_has_no_line_and_a_stage_of_one_step_its_text(clock: Clock) -> None:
    lines: list[str] = []
    progress = ProgressLines(lines.append, clock)
    run_stage(progress, clock, steps=49, seconds=FIRST_LINE / 50)
    progress("memory", 1, 1, "about 3 GB")
    assert lines == ["memory: about 3 GB"]


def test_time_before_a_stage_is_not_part_of_it_if_it_begins_with_step_0(clock: Clock) -> None:
    lines: list[str] = []
    progress = ProgressLines(lines.append, clock)
    clock.now += 1000
    progress("loss", 0, 2, "")
    run_stage(progress, clock, stage="loss", steps=2, seconds=1)
    assert not lines


def test_the_time_left_of_a_resumed_stage_is_that_of_its_new_steps(clock: Clock) -> None:
    lines: list[str] = []
    run_stage(ProgressLines(lines.append, clock), clock, steps=1000, seconds=6, first=991)
    assert lines[0] == "edit: 991/1000, time left unknown yet, loss 991"
    assert lines[1] == "edit: 996/1000, about 24 s left, loss 996"


def test_a_slow_step_is_a_line_each(clock: Clock) -> None:
    lines: list[str] = []
    run_stage(ProgressLines(lines.append, clock), clock, steps=3, seconds=2 * LINE_INTERVAL)
    assert [line.partition(",")[0] for line in lines] == ["edit: 1/3", "edit: 2/3", "edit: 3/3"]


class Timer:
    """A ``threading.Timer`` that waits for the fake clock."""

    started: ClassVar[list[Timer]] = []

    def __init__(self, seconds: float, call: Callable[[], None]) -> None:
        self.seconds, self.call, self.is_cancelled = seconds, call, False

    def start(self) -> None:
        self.started.append(self)

    def cancel(self) -> None:
        self.is_cancelled = True


def test_a_call_that_reports_nothing_has_lines_while_it_runs(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_slowly() -> None:
        with long_stage("writing", "/tmp/out"):
            for number in (1, 2):
                clock.now += Timer.started[number].seconds
                Timer.started[number].call()
            clock.now += 5
            raise OSError("full")

    lines: list[str] = []
    monkeypatch.setattr("threading.Timer", Timer)
    Timer.started.clear()
    with show_progress(ProgressLines(lines.append, clock)):
        with long_stage("writing", "/tmp/out"):
            clock.now += 2
        assert Timer.started[0].is_cancelled
        Timer.started[0].call()  # at the same time as it was cancelled
        assert not lines
        with pytest.raises(OSError, match="full"):
            fail_slowly()
        assert Timer.started[3].is_cancelled
    assert [timer.seconds for timer in Timer.started[1:]] == [FIRST_LINE, LINE_INTERVAL, LINE_INTERVAL]
    assert lines == [
        "writing: /tmp/out, 5 s so far",
        "writing: /tmp/out, 35 s so far",
        "writing: /tmp/out, took 40 s",
    ]


def test_a_stage_that_ends_early_has_its_own_number_of_steps(clock: Clock) -> None:
    lines: list[str] = []
    progress = ProgressLines(lines.append, clock)
    run_stage(progress, clock, steps=10, seconds=1)
    lines.clear()
    for step in range(1, 8):
        clock.now += 1
        progress("adapter", step, 7 if step == 7 else 400, "")
    assert lines == ["adapter: 5/400, about 7 min left", "adapter: 7/7, took 7 s"]
    assert progress._stages == {}


def test_a_file_gets_lines_and_a_terminal_bars(clock: Clock) -> None:
    file, terminal = io.StringIO(), Terminal()
    for stream in (file, terminal):
        progress = ProgressBars(stream, clock)
        progress("memory", 1, 1, "about 3 GB")
        run_stage(progress, clock, steps=3, seconds=40)
    assert file.getvalue().startswith("memory: about 3 GB\nedit: 1/3, time left unknown yet, loss 1\n")
    assert "\r" not in file.getvalue()
    assert "memory: about 3 GB" in terminal.getvalue()
    assert "40 s" not in terminal.getvalue()


def test_a_bar_appears_after_a_second_moves_at_every_step_and_shows_the_time_left(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [50.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])  # the clock of tqdm
    terminal = Terminal()
    progress = ProgressBars(terminal, clock)
    for step in range(1, 5):
        progress("adapter", step, 100, f"loss {step}")
        now[0] += 2
        assert ("adapter:" in terminal.getvalue()) == (step > 1)
    assert "4%|" in terminal.getvalue()
    assert "4/100 [00:06<03:12" in terminal.getvalue()
    assert "loss 4" in terminal.getvalue()
    progress("adapter", 5, 5, "")
    assert "5/5 [" in terminal.getvalue()
    assert not progress._bars


def test_a_call_without_reports_is_on_the_terminal_until_it_ends(clock: Clock) -> None:
    terminal = Terminal()
    with show_progress(ProgressBars(terminal, clock)), long_stage("writing", "out"):
        assert "writing" in terminal.getvalue()
    assert terminal.getvalue().rpartition("writing")[2].strip("\r .,out") == ""


def test_tracked_items_are_reported_to_the_innermost_display() -> None:
    outer: list[tuple[Any, ...]] = []
    inner: list[tuple[Any, ...]] = []
    assert list(track("ab", "outside of any")) == ["a", "b"]
    with show_progress(lambda *report: outer.append(report)):
        for item in track("xyz", "hashing", "files"):
            with show_progress(lambda *report: inner.append(report)):
                report_progress("inner", 1, 1, item)
        assert list(track("a", "a single item")) == ["a"]
    report_progress("outside", 1, 1)
    assert outer == [("hashing", step, 3, "files") for step in range(4)]
    assert inner == [("inner", 1, 1, item) for item in "xyz"]


def test_a_stage_of_items_ends_where_the_work_on_one_fails() -> None:
    reports: list[tuple[Any, ...]] = []

    def work() -> None:
        for item in track("xyz", "hashing", "files"):
            if item == "y":
                raise ValueError("broken")

    with show_progress(lambda *report: reports.append(report)), pytest.raises(ValueError, match="broken"):
        work()
    assert reports == [("hashing", 0, 3, "files"), ("hashing", 1, 3, "files"), ("hashing", 1, 1, "files")]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations_are_in_the_unit_that_is_easiest_to_read(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
