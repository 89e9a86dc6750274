"""Scheduler: claims pieces, submits jobs to the executor, records their events, and counts what is finished."""

from __future__ import annotations

import logging
import shlex
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lm_ortho.hub import hide_access_tokens
from lm_ortho.leaderboard.executor import LOST, Executor
from lm_ortho.leaderboard.progress import ProgressScreen
from lm_ortho.leaderboard.store import DONE, FAILED, RUNNING, Store
from lm_ortho.leaderboard.worker import Event, Job

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only
MAX_DEATHS = 3
"""Number of times a job may lose its worker before its unfinished pieces count as failed."""


@dataclass(frozen=True)
class Tally:
    """Number of pieces of the plan that are done, failed, and running (in another process)."""

    done: int
    failed: int
    running: int
    total: int

    @property
    def complete(self) -> bool:
        """Whether all pieces are done."""
        return self.done == self.total


def command_line() -> str:
    """The command line of this process, quoted for a shell, without access tokens."""
    return hide_access_tokens(shlex.join(["lm-ortho", *sys.argv[1:]]))


@contextmanager
def log_run(store: Store, directory: Path) -> Iterator[Path]:
    """Context manager: records a run in the store and yields the path of its log file in ``logs``."""
    number = len(store.runs()) + 1
    path = directory / "logs" / f"run-{number}.log"
    identity = store.start_run(command_line(), str(path.relative_to(directory)))
    try:
        yield path
    finally:
        store.end_run(identity)


def run_jobs(
    store: Store,
    jobs: Iterable[Job],
    executor: Executor,
    screen: ProgressScreen,
    retry_failed: bool = False,
) -> Tally:
    """Runs every piece of the jobs that is not done; a failing piece is recorded and does not stop the others.

    Pieces that are running in another live process are left to it. An interruption releases the unfinished pieces.
    """
    jobs = list(jobs)
    keys = {key for job in jobs for key in job.keys}
    waiting = deque(job for job in jobs if _has_open_pieces(store, job, retry_failed))
    deaths: Counter[str] = Counter()
    try:
        while waiting or executor.busy():
            while waiting and executor.has_room():
                job = waiting.popleft()
                if claimed_job := _claim_job(store, job, retry_failed and not deaths[job.label]):
                    executor.submit(claimed_job)
            for job, event in executor.events():
                if event.kind == LOST:
                    _requeue_job(store, job, event.error, screen, waiting=waiting, deaths=deaths)
                else:
                    _record_event(store, job, event, screen)
    finally:
        store.release()
    return count_pieces(store, keys)


def count_pieces(store: Store, keys: Iterable[str]) -> Tally:
    """Counts the pieces with these keys by status."""
    unique_keys = set(keys)
    counts = Counter(status for key, status in store.statuses().items() if key in unique_keys)
    return Tally(counts[DONE], counts[FAILED], counts[RUNNING], len(unique_keys))


def _has_open_pieces(store: Store, job: Job, retry_failed: bool) -> bool:
    final_statuses = {DONE} if retry_failed else {DONE, FAILED}
    status = store.statuses()
    return any(status[key] not in final_statuses for key in job.keys)


def _claim_job(store: Store, job: Job, retry_failed: bool) -> Job | None:
    """The job with the pieces that this process could claim; None where there are none.

    Where another process is making the model, or making it failed, the pieces are left to another run.
    """
    claimed_keys = set(store.claim(job.keys, retry_failed))
    pieces = tuple(piece for piece in job.pieces if piece.key in claimed_keys)
    has_model = job.make is None or job.make.key in claimed_keys or store.statuses()[job.make.key] == DONE
    if not has_model:
        store.release(claimed_keys)
        return None
    make = job.make if job.make and job.make.key in claimed_keys else None
    return replace(job, make=make, pieces=pieces) if make or pieces else None


def _record_event(store: Store, job: Job, event: Event, screen: ProgressScreen) -> None:
    """Writes an event into the store and shows it."""
    if event.kind == "begin":
        store.begin(event.key)
        screen.on_begin(job)
    elif event.kind == "done":
        store.finish(event.key, event.result, event.seconds)
        screen.on_done(job, event.key, event.seconds, event.result.get("notes", ()))
    elif event.kind == "failed":
        store.fail(event.key, event.error, event.seconds)
        screen.on_failure(job, event.key, event.error)


def _requeue_job(
    store: Store, job: Job, error: str, screen: ProgressScreen, *, waiting: deque[Job], deaths: Counter[str]
) -> None:
    """Puts the unfinished pieces of a job whose worker died back into the queue, ``MAX_DEATHS`` times at most."""
    deaths[job.label] += 1
    open_keys = _find_open_keys(store, job.keys)
    if deaths[job.label] >= MAX_DEATHS:
        for key in open_keys:
            store.fail(key, f"its worker died {MAX_DEATHS} times; the last time: {error}")
            screen.on_failure(job, key, "its worker died")
        return
    screen.print_line(f"{job.label}: its worker died ({error}); {len(open_keys)} pieces are done again")
    store.release(open_keys)
    waiting.append(job)


def _find_open_keys(store: Store, keys: Sequence[str]) -> list[str]:
    status = store.statuses()
    return [key for key in keys if status[key] not in (DONE, FAILED)]
