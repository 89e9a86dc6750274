"""Progress of a run: a bar over all pieces with the time left, a bar for the current step, and permanent lines."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from lm_ortho.errors import printable
from lm_ortho.leaderboard.store import DONE, FAILED, Record
from lm_ortho.leaderboard.worker import Job
from lm_ortho.markup import terminal_text
from lm_ortho.runtime.progress import ProgressLines, format_duration


class ProgressScreen:
    """Context manager: progress bars on a terminal; elsewhere (a log file, a pipe) lines.

    There is a line per finished piece, and one now and then about the current step.
    """

    def __init__(self, records: Sequence[Record], console: Any, quiet: bool = False) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console, self.quiet = console, quiet
        self._records = {record.piece.key: record for record in records}
        self._estimate = TimeEstimate(records)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._bars = Progress(*columns, console=console, disable=quiet or not console.is_terminal)
        self._lines = None if console.is_terminal else ProgressLines(self.print_line)
        self._stack = ExitStack()
        completed = sum(record.status in (DONE, FAILED) for record in records)
        self._all = self._bars.add_task("pieces", total=len(records), completed=completed, note=self._estimate.text())
        self._step = self._bars.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> ProgressScreen:
        self._stack.enter_context(self._bars)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def progress(self, stage: str, step: int, total: int, text: str) -> None:
        """Shows a step of the current piece; called by a worker in this process."""
        if self._lines is not None:
            self._lines(printable(stage), step, total, printable(text))
        self._bars.update(
            self._step,
            description=printable(stage),
            completed=step,
            total=total,
            note=printable(text),
            visible=True,
        )

    def print_line(self, text: str) -> None:
        """Prints a permanent line, unless quiet."""
        if not self.quiet:
            self._bars.console.print(terminal_text(text), highlight=False)

    def on_begin(self, job: Job) -> None:
        """Shows the job of a piece that begins."""
        self._bars.update(self._all, note=printable(f"{self._estimate.text()}  {job.label}"))

    def on_done(self, job: Job, key: str, seconds: float, notes: Iterable[str]) -> None:
        """Counts a finished piece and prints it with its notes."""
        self._drop_lines(job)
        self._estimate.add(key, seconds)
        self._bars.update(self._all, advance=1, note=self._estimate.text())
        self.print_line(f"{job.label}: {self._describe(key)}, {seconds:.1f} s ({self._estimate.text()})")
        for note in notes:
            self.print_line(f"  {note}")

    def on_failure(self, job: Job, key: str, error: str) -> None:
        """Counts a failed piece and prints the first line of its error."""
        self._drop_lines(job)
        self._estimate.drop(key)
        self._bars.update(self._all, advance=1, note=self._estimate.text())
        self.print_line(f"{job.label}: {self._describe(key)} FAILED: {(error.splitlines() or ['?'])[0]}")

    def _drop_lines(self, job: Job) -> None:
        """Ends the reminders about a piece, whose end has a line of its own."""
        if self._lines is not None:
            self._lines.drop(printable(job.label))

    def _describe(self, key: str) -> str:
        return describe_piece(self._records[key]) if key in self._records else "piece"


class TimeEstimate:
    """Estimates the seconds left from the median of finished pieces of the same method or task, if there are any.

    For a model to make, settings tried with its method count as comparable, and else other models.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._comparison_keys = {record.piece.key: _comparison_keys(record) for record in records}
        self._open = {record.piece.key for record in records if record.status not in (DONE, FAILED)}
        self._durations: dict[str, list[float]] = {}
        for record in records:
            if record.status == DONE:
                self._note(record.piece.key, record.seconds)

    def _note(self, key: str, seconds: float) -> None:
        for comparison_key in self._comparison_keys.get(key, ()):
            self._durations.setdefault(comparison_key, []).append(seconds)

    def add(self, key: str, seconds: float) -> None:
        """Counts a finished piece."""
        self._note(key, seconds)
        self.drop(key)

    def drop(self, key: str) -> None:
        """Removes a piece that needs no more time."""
        self._open.discard(key)

    def seconds(self) -> float | None:
        """Seconds left; None while nothing comparable is finished."""
        total = 0.0
        for key in self._open:
            matches = (self._durations[name] for name in self._comparison_keys[key] if name in self._durations)
            durations = next(matches, None)
            if durations is None:
                return None
            total += statistics.median(durations)
        return total

    def text(self) -> str:
        """The time left in words."""
        seconds = self.seconds()
        if not self._open:
            return "nothing left"
        return "time left unknown yet" if seconds is None else f"about {format_duration(seconds)} left"


def _comparison_keys(record: Record) -> tuple[str, ...]:
    """Names of groups of comparable pieces, the narrowest first; an estimate uses the first with finished pieces."""
    config, kind = record.piece.config, record.piece.kind
    if kind in ("make", "tune"):
        return f"{kind} {config.get('method')}", f"train {config.get('method')}", "train"
    return f"{kind} {config.get('task')}", kind


def describe_piece(record: Record) -> str:
    """A piece in words."""
    config = record.piece.config
    if record.piece.kind == "make":
        return "model"
    if record.piece.kind == "tune":
        return "tuning " + " ".join(f"{name}={value}" for name, value in config["settings"].items())
    return config["task"] + ("" if config["alpha"] is None else f" alpha={config['alpha']}")
