"""Progress of long computations: the type of the callback, bars on a terminal, lines with the time left elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

ProgressCallback = Callable[[str, int, int, str], None]
"""Called with the stage, the number of steps completed, the total number of steps and a short text.

A stage may begin with step 0. It ends with a step that equals the total, which is smaller than before if it ends early.
"""
Item = TypeVar("Item")
FIRST_LINE, LINE_INTERVAL = 5.0, 30.0
"""Seconds after which a stage gets its first line, and seconds between two lines, where the output is no terminal."""
_BAR_DELAY = 1.0
"""Seconds that a stage takes at least before it gets a bar."""


def no_progress(stage: str, step: int, total: int, text: str) -> None:
    """A ``ProgressCallback`` that reports nothing."""


class ProgressBars:
    """A ``ProgressCallback`` with a bar per stage on a terminal, and ``ProgressLines`` where the output is none.

    A stage with a single step is a line; one that begins with step 0 of 1 is shown until it ends.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._bars: dict[str, Any] = {}
        self._lines = None if self._stream.isatty() else ProgressLines(self._print, clock)

    def __call__(self, stage: str, step: int, total: int, text: str) -> None:
        if self._lines is not None:
            self._lines(stage, step, total, text)
            return
        bar = self._bars.get(stage)
        if bar is None and step == total == 1:
            self._print(f"{stage}: {text}")
            return
        if bar is None:
            bar = self._bars[stage] = self._make_bar(stage, step, total)
        bar.total = total
        bar.set_postfix_str(text, refresh=False)
        bar.update(step - bar.n)
        if step >= total:
            bar.close()
            del self._bars[stage]

    def _make_bar(self, stage: str, step: int, total: int) -> Any:
        # The time of a step is unknown before the second call, so the speed is measured from the first one.
        options: dict[str, Any] = {"total": total, "initial": step, "desc": stage, "file": self._stream}
        if total == 1:
            return tqdm(**options, leave=False, bar_format="{desc} ...{postfix}")
        return tqdm(**options, unit="step", delay=_BAR_DELAY, miniters=1)

    def _print(self, line: str) -> None:
        tqdm.write(line, file=self._stream)
        self._stream.flush()


@dataclass
class _Stage:
    """A stage that has begun: seconds on the clock at its begin, at its first call and at its last line, and steps."""

    start: float
    first_time: float
    first_step: int
    line_time: float
    lines: int = 0
    reminder: threading.Timer | None = None

    def describe_time_left(self, step: int, total: int, now: float) -> str:
        """The time left in words, from the mean time of the steps since the first call."""
        if step <= self.first_step:
            return "time left unknown yet"
        seconds = (now - self.first_time) / (step - self.first_step) * (total - step)
        return f"about {format_duration(seconds)} left"


class ProgressLines:
    """A ``ProgressCallback`` for files and pipes: a line per stage after 5 seconds, then every 30, and at its end.

    Stages that take less than 5 seconds have no line, except those of a single step, which is all that they report.
    Lines about a stage that begins with step 0 of 1 come from a thread, because nothing more is heard before its end.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._stages: dict[str, _Stage] = {}
        self._last_call = clock()

    def __call__(self, stage: str, step: int, total: int, text: str) -> None:
        now, begin = self._clock(), self._last_call
        self._last_call = now
        state = self._stages.get(stage)
        if state is None and step == total == 1:
            self._write(_join(stage, text))
            return
        # 1. A new stage: it has begun with the last call of any stage, unless it says so itself.
        if state is None:
            start = now if step == 0 else begin
            state = self._stages[stage] = _Stage(start, now, step, line_time=start)
            if step == 0 and total == 1:
                self._set_reminder(state, stage, text)
        # 2. The end of a stage that has taken some time.
        if step >= total:
            del self._stages[stage]
            if state.reminder is not None:
                state.reminder.cancel()
            if now - state.start >= FIRST_LINE:
                end = f"took {format_duration(now - state.start)}"
                self._write(_join(stage, text if total == 1 else f"{step}/{total}", end, "" if total == 1 else text))
            return
        # 3. A line now and then.
        if now - state.line_time >= (LINE_INTERVAL if state.lines else FIRST_LINE):
            left = state.describe_time_left(step, total, now)
            self._write_line(state, _join(stage, f"{step}/{total}", left, text), now)

    def drop(self, stage: str) -> None:
        """Ends a stage without a line, also one that fails; nothing happens if it has not begun."""
        state = self._stages.pop(stage, None)
        if state is not None and state.reminder is not None:
            state.reminder.cancel()

    def _set_reminder(self, state: _Stage, stage: str, text: str) -> None:
        def remind() -> None:
            if self._stages.get(stage) is state:
                now = self._clock()
                self._write_line(state, _join(stage, text, f"{format_duration(now - state.start)} so far"), now)
                self._set_reminder(state, stage, text)

        state.reminder = threading.Timer(LINE_INTERVAL if state.lines else FIRST_LINE, remind)
        state.reminder.daemon = True
        state.reminder.start()

    def _write_line(self, state: _Stage, line: str, now: float) -> None:
        self._write(line)
        state.line_time = now
        state.lines += 1


def _join(stage: str, *parts: str) -> str:
    """``stage: part, part``, without parts that are empty."""
    return ": ".join(filter(None, (stage, ", ".join(filter(None, parts)))))


def format_duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours, whichever is easiest to read."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


_displays: list[ProgressCallback] = []
"""The displays of running computations, the innermost last; progress is shown once per process, as logs are."""


@contextmanager
def show_progress(progress: ProgressCallback) -> Iterator[None]:
    """Context in which ``track`` and ``long_stage`` report to ``progress``, however deep they are called."""
    _displays.append(progress)
    try:
        yield
    finally:
        _displays.pop()


def report_progress(stage: str, step: int, total: int, text: str = "") -> None:
    """Reports to the display of ``show_progress``; outside of it nothing happens."""
    if _displays:
        _displays[-1](stage, step, total, text)


def track(items: Sequence[Item], stage: str, text: str = "") -> Iterator[Item]:
    """Yields ``items`` and reports after the work on each one; see ``report_progress``.

    The stage ends early if the work on an item raises, or if no further item is asked for.
    """
    total, finished = len(items), 0
    if total <= 1:
        yield from items
        return
    report_progress(stage, 0, total, text)
    try:
        for item in items:
            yield item
            finished += 1
            report_progress(stage, finished, total, text)
    finally:
        if finished < total:
            report_progress(stage, finished, finished, text)


@contextmanager
def long_stage(stage: str, text: str = "") -> Iterator[None]:
    """Context of a call that may take long and reports nothing itself; its begin and its end are reported."""
    report_progress(stage, 0, 1, text)
    try:
        yield
    finally:
        report_progress(stage, 1, 1, text)
