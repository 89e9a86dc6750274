"""What a run shows: one bar over all pieces with the time left, one for the step at hand, and lines that stay."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from lm_ortho.leaderboard.store import DONE, FAILED, Record
from lm_ortho.leaderboard.worker import Job


class ProgressScreen:
    """Progress on a terminal; a line per finished piece elsewhere (a log file, a pipe). A context manager."""

    def __init__(self, records: Sequence[Record], console: Any, quiet: bool = False) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.console, self.quiet = console, quiet
        self._known = {record.piece.key: record for record in records}
        self._left = Left(records)
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"), console=console, disable=quiet or not console.is_terminal,
        )  # fmt: skip
        self._stack = ExitStack()
        finished = sum(record.status in (DONE, FAILED) for record in records)
        self._all = self._bars.add_task("pieces", total=len(records), completed=finished, note=self._left.text())
        self._step = self._bars.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> ProgressScreen:
        self._stack.enter_context(self._bars)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def progress(self, stage: str, done: int, total: int, text: str) -> None:
        """A step of what is at hand; called from within a worker of this process."""
        self._bars.update(self._step, description=stage, completed=done, total=total, note=text, visible=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self._bars.console.print(text, highlight=False, markup=False)

    def began(self, job: Job, key: str) -> None:
        self._bars.update(self._all, note=f"{self._left.text()}  {job.label}")

    def finished(self, job: Job, key: str, seconds: float, notes: Iterable[str]) -> None:
        self._left.add(key, seconds)
        self._bars.update(self._all, advance=1, note=self._left.text())
        self.say(f"{job.label}: {self._what(key)}, {seconds:.1f} s ({self._left.text()})")
        for note in notes:
            self.say(f"  {note}")

    def failed(self, job: Job, key: str, error: str) -> None:
        self._left.drop(key)
        self._bars.update(self._all, advance=1, note=self._left.text())
        self.say(f"{job.label}: {self._what(key)} FAILED: {(error.splitlines() or ['?'])[0]}")

    def _what(self, key: str) -> str:
        return what(self._known[key]) if key in self._known else "piece"


class Left:
    """Seconds left, from the median of finished pieces: of the same method or task where there are any.

    A model that is made takes about as long as trying a setting of its method took, or as other models took.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._kinds = {record.piece.key: _kinds(record) for record in records}
        self._open = {record.piece.key for record in records if record.status not in (DONE, FAILED)}
        self._seen: dict[str, list[float]] = {}
        self._changed = time.monotonic()
        for record in records:
            if record.status == DONE:
                self._note(record.piece.key, record.seconds)

    def _note(self, key: str, seconds: float) -> None:
        for kind in self._kinds.get(key, ()):
            self._seen.setdefault(kind, []).append(seconds)

    def add(self, key: str, seconds: float) -> None:
        """A piece was finished."""
        self._note(key, seconds)
        self.drop(key)

    def drop(self, key: str) -> None:
        """A piece needs no more time."""
        self._open.discard(key)

    def seconds(self) -> float | None:
        """None while nothing comparable is finished."""
        total = 0.0
        for key in self._open:
            seen = next((self._seen[kind] for kind in self._kinds[key] if kind in self._seen), None)
            if seen is None:
                return None
            total += statistics.median(seen)
        return total

    def text(self) -> str:
        left = self.seconds()
        if not self._open:
            return "nothing left"
        return "time left unknown yet" if left is None else f"about {span(left)} left"


def _kinds(record: Record) -> tuple[str, ...]:
    """What a piece is, the most telling first: an estimate is taken from the first that has been seen."""
    config, kind = record.piece.config, record.piece.kind
    if kind in ("make", "tune"):
        return f"{kind} {config.get('method')}", f"train {config.get('method')}", "train"
    return f"{kind} {config.get('task')}", kind


def what(record: Record) -> str:
    """A piece in words."""
    config = record.piece.config
    if record.piece.kind == "make":
        return "model"
    if record.piece.kind == "tune":
        return "tuning " + " ".join(f"{name}={value}" for name, value in config["settings"].items())
    return config["task"] + ("" if config["alpha"] is None else f" alpha={config['alpha']}")


def span(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is read most easily."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
