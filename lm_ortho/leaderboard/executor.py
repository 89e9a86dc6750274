"""Executors run jobs: in this process one after the other, in the processes of torchrun, or on a Ray cluster.

An executor takes jobs and yields events, piece by piece, so that only the driver writes the store.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from lm_ortho.errors import UserError
from lm_ortho.hub import first_line
from lm_ortho.leaderboard.config import Resources
from lm_ortho.leaderboard.worker import Event, Job, run_job
from lm_ortho.runtime.progress import ProgressCallback

LOST = "lost"
"""Kind of the event of a job whose worker died; its finished pieces have been reported before."""

JobEvent = tuple[Job, Event]


class Executor(Protocol):
    """Takes jobs while it has room, and yields their events."""

    def has_room(self) -> bool:
        """Whether another job can start at once."""

    def submit(self, job: Job) -> None:
        """Starts or queues a job."""

    def busy(self) -> bool:
        """Whether a job is running."""

    def events(self) -> Iterator[JobEvent]:
        """The next events; ends when there is room again or no job is left."""

    def close(self, clean: bool = True) -> None:
        """Ends the workers; after an error (``clean=False``) without waiting for any of them."""


class LocalExecutor:
    """Runs jobs in this process, one at a time; under torchrun all processes take part in each."""

    def __init__(self, progress: ProgressCallback) -> None:
        self.progress = progress
        self._jobs: deque[Job] = deque()

    def has_room(self) -> bool:
        return not self._jobs

    def submit(self, job: Job) -> None:
        _broadcast_job(job)
        self._jobs.append(job)

    def busy(self) -> bool:
        return bool(self._jobs)

    def events(self) -> Iterator[JobEvent]:
        while self._jobs:
            job = self._jobs.popleft()
            for event in run_job(job, self.progress):
                yield job, event

    def close(self, clean: bool = True) -> None:
        if clean:  # after an error the other processes may wait for something else; torchrun ends them
            _broadcast_job(None)


def _broadcast_job(job: Job | None) -> None:
    """Sends the next job to the other processes of torchrun; None ends them."""
    from lm_ortho.harness import distributed

    if distributed.world_size() > 1:
        distributed.broadcast(job)


def follow_jobs() -> None:
    """Runs this process's share of every job that the first process of torchrun sends, until it sends None."""
    from lm_ortho.harness import distributed

    while (job := distributed.broadcast(None)) is not None:
        for _ in run_job(job, lambda *_: None):
            pass


class RayExecutor:
    """Runs each job as a Ray task that requests its resources and streams its events."""

    def __init__(self, resources: Resources) -> None:
        """Raises ``UserError`` without Ray, and where the cluster cannot be reached or is too small for any job."""
        self._ray = _import_ray()
        self._owns_connection = not self._ray.is_initialized()
        if self._owns_connection:
            self._connect(resources.address)
        self._task = self._ray.remote(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_retries=0,  # the driver submits the unfinished pieces of a dead worker again
            num_returns="streaming",
            **({"memory": int(resources.memory_gb * 2**30)} if resources.memory_gb else {}),
        )(_run_on_worker)
        self._slots = self._count_slots(resources)
        self._running: dict[Any, Job] = {}

    def _connect(self, address: str | None) -> None:
        try:
            self._ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"resources.address={address!r}: no Ray cluster there ({first_line(error)})") from None

    def _count_slots(self, resources: Resources) -> int:
        """Number of jobs that fit on the cluster at once; ``UserError`` where not even one fits."""
        capacity = self._ray.cluster_resources()
        request = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": (resources.memory_gb or 0) * 2**30}
        for name, number in request.items():
            if number > capacity.get(name, 0):
                raise UserError(
                    f"resources: a cell requests {number:g} {name}, the cluster has {capacity.get(name, 0):g}"
                )
        return max(1, min(int(capacity.get(name, 0) // number) for name, number in request.items() if number))

    def has_room(self) -> bool:
        return len(self._running) < self._slots

    def submit(self, job: Job) -> None:
        self._running[self._task.remote(job)] = job

    def busy(self) -> bool:
        return bool(self._running)

    def events(self) -> Iterator[JobEvent]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=5.0)
        for stream in ready:
            job = self._running[stream]
            try:
                event = self._ray.get(next(stream))
            except StopIteration:
                del self._running[stream]
            except self._ray.exceptions.RayError as error:
                del self._running[stream]
                yield job, Event(LOST, "", error=first_line(error))
            else:
                yield job, event

    def close(self, clean: bool = True) -> None:
        for stream in self._running:
            self._ray.cancel(stream, force=True)
        if self._owns_connection:
            self._ray.shutdown()


def _run_on_worker(job: Job) -> Iterator[Event]:
    """Runs a job in a Ray worker, which sets the number of its threads."""
    yield from run_job(job, lambda *_: None)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError('resources.executor=ray needs Ray: pip install "lm-ortho[ray]"') from None
    return ray


def make_executor(resources: Resources, progress: ProgressCallback) -> Executor:
    """The executor that ``resources`` requests; ``UserError`` for Ray under torchrun."""
    from lm_ortho.harness import distributed

    if resources.executor == "local":
        return LocalExecutor(progress)
    if distributed.world_size() > 1:
        raise UserError("resources.executor=ray under torchrun: let Ray start the cells, or torchrun, not both")
    return RayExecutor(resources)
