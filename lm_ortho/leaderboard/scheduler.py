"""From a plan to finished pieces: claims them, hands them out, keeps what comes back, and says how far it is."""

from __future__ import annotations

import logging
import shlex
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lm_ortho.leaderboard.executor import LOST, Executor, Told
from lm_ortho.leaderboard.progress import ProgressScreen
from lm_ortho.leaderboard.store import DONE, FAILED, RUNNING, Store
from lm_ortho.leaderboard.worker import Job

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only
DEATHS = 3
"""How often a job may lose its worker before what is left of it counts as failed."""


@dataclass(frozen=True)
class Tally:
    """How many pieces of the plan are done, failed, and at work elsewhere."""

    done: int
    failed: int
    elsewhere: int
    total: int

    @property
    def complete(self) -> bool:
        return self.done == self.total


def command_line() -> str:
    """What was typed, ready for a shell."""
    return shlex.join(["lm-ortho", *sys.argv[1:]])


@contextmanager
def logged_run(store: Store, directory: Path) -> Iterator[Path]:
    """A run in the store, with a log file of its own in ``logs``; gives the path of the file."""
    number = len(store.runs()) + 1
    path = directory / "logs" / f"run-{number}.log"
    identity = store.start_run(command_line(), str(path.relative_to(directory)))
    try:
        yield path
    finally:
        store.end_run(identity)


def drive(
    store: Store,
    jobs: Iterable[Job],
    executor: Executor,
    screen: ProgressScreen,
    retry_failed: bool = False,
) -> Tally:
    """Does every piece of the jobs that is not done; a failing one is recorded and does not stop the others.

    Pieces that a living process is at are left to it. An interruption gives back what is not finished.
    """
    jobs = list(jobs)
    keys = {key for job in jobs for key in job.keys}
    waiting = deque(job for job in jobs if _open(store, job, retry_failed))
    deaths: Counter[str] = Counter()
    try:
        while waiting or executor.busy():
            while waiting and executor.has_room():
                job = waiting.popleft()
                if mine := _claimed(store, job, retry_failed and not deaths[job.label]):
                    executor.submit(mine)
            for told in executor.events():
                _keep(store, told, waiting, deaths, screen)
    finally:
        store.release()
    return tally(store, keys)


def tally(store: Store, keys: Iterable[str]) -> Tally:
    """Where the pieces stand."""
    wanted = set(keys)
    counts = Counter(status for key, status in store.statuses().items() if key in wanted)
    return Tally(counts[DONE], counts[FAILED], counts[RUNNING], len(wanted))


def _open(store: Store, job: Job, retry_failed: bool) -> bool:
    closed = {DONE} if retry_failed else {DONE, FAILED}
    status = store.statuses()
    return any(status[key] not in closed for key in job.keys)


def _claimed(store: Store, job: Job, retry_failed: bool) -> Job | None:
    """The job with the pieces that are ours to do; None where there are none.

    A model that another process is making, or that failed, is waited for in another run.
    """
    mine = set(store.claim(job.keys, retry_failed))
    pieces = tuple(piece for piece in job.pieces if piece.key in mine)
    made = job.make is None or job.make.key in mine or store.statuses()[job.make.key] == DONE
    if not made:
        store.release(mine)
        return None
    make = job.make if job.make and job.make.key in mine else None
    return replace(job, make=make, pieces=pieces) if make or pieces else None


def _keep(store: Store, told: Told, waiting: deque[Job], deaths: Counter[str], screen: ProgressScreen) -> None:
    job, event = told
    if event.kind == "begin":
        store.begin(event.key)
        screen.began(job, event.key)
    elif event.kind == "done":
        store.finish(event.key, event.result, event.seconds)
        screen.finished(job, event.key, event.seconds, event.result.get("notes", ()))
    elif event.kind == "failed":
        store.fail(event.key, event.error, event.seconds)
        screen.failed(job, event.key, event.error)
    elif event.kind == LOST:
        _lost(store, job, event.error, waiting, deaths, screen)


def _lost(
    store: Store, job: Job, error: str, waiting: deque[Job], deaths: Counter[str], screen: ProgressScreen
) -> None:
    """A job whose worker died goes back into the queue, without what it had finished."""
    deaths[job.label] += 1
    left = _unsettled(store, job.keys)
    if deaths[job.label] >= DEATHS:
        for key in left:
            store.fail(key, f"its worker died {DEATHS} times; the last time: {error}")
            screen.failed(job, key, "its worker died")
        return
    screen.say(f"{job.label}: its worker died ({error}); {len(left)} pieces are done again")
    store.release(left)
    waiting.append(job)


def _unsettled(store: Store, keys: Sequence[str]) -> list[str]:
    status = store.statuses()
    return [key for key in keys if status[key] not in (DONE, FAILED)]
