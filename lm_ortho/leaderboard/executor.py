"""Where jobs run: here one after the other, here in the processes of torchrun, or on a Ray cluster.

An executor takes jobs and gives back events, piece by piece, so the store is written by the driver alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from lm_ortho.errors import UserError
from lm_ortho.hub import first_line
from lm_ortho.leaderboard.config import Resources
from lm_ortho.leaderboard.worker import Event, Job, work
from lm_ortho.runtime.progress import ProgressCallback

LOST = "lost"
"""Kind of the event of a job whose worker died; what it had finished has been told before."""

Told = tuple[Job, Event]


class Executor(Protocol):
    """Takes jobs while it has room, and tells what happens to them."""

    def has_room(self) -> bool:
        """Whether another job can start at once."""

    def submit(self, job: Job) -> None:
        """Takes a job."""

    def busy(self) -> bool:
        """Whether a job is under way."""

    def events(self) -> Iterator[Told]:
        """What happened next; ends when there is room again or nothing is left."""

    def close(self, clean: bool = True) -> None:
        """Ends the workers; after an error (``clean`` false) without waiting for any of them."""


class Local:
    """In this process, one job at a time; under torchrun every process takes part in each."""

    def __init__(self, progress: ProgressCallback) -> None:
        self.progress = progress
        self._jobs: deque[Job] = deque()

    def has_room(self) -> bool:
        return not self._jobs

    def submit(self, job: Job) -> None:
        _share(job)
        self._jobs.append(job)

    def busy(self) -> bool:
        return bool(self._jobs)

    def events(self) -> Iterator[Told]:
        while self._jobs:
            job = self._jobs.popleft()
            for event in work(job, self.progress):
                yield job, event

    def close(self, clean: bool = True) -> None:
        if clean:  # after an error the others may wait for something else; torchrun ends them
            _share(None)


def _share(job: Job | None) -> None:
    """Tells the other processes of torchrun what to do next; None: nothing more."""
    from lm_ortho.harness import distributed

    if distributed.world_size() > 1:
        distributed.broadcast(job)


def follow() -> None:
    """What the other processes of torchrun do: their share of every job, until there is none."""
    from lm_ortho.harness import distributed

    while (job := distributed.broadcast(None)) is not None:
        for _ in work(job, lambda *_: None):
            pass


class OnRay:
    """Each job a Ray task that asks for its resources; events come back as it goes."""

    def __init__(self, resources: Resources) -> None:
        """Raises ``UserError`` without Ray, and where the cluster cannot be reached or is too small for any job."""
        self._ray = _import_ray()
        self._started = not self._ray.is_initialized()
        if self._started:
            self._connect(resources.address)
        self._task = self._ray.remote(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_retries=0,  # what a dead worker leaves is asked for again by the driver, without what it had finished
            num_returns="streaming",
            **({"memory": int(resources.memory_gb * 2**30)} if resources.memory_gb else {}),
        )(_on_worker)
        self._slots = self._count_slots(resources)
        self._running: dict[Any, Job] = {}

    def _connect(self, address: str | None) -> None:
        try:
            self._ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"resources.address={address!r}: no Ray cluster there ({first_line(error)})") from None

    def _count_slots(self, resources: Resources) -> int:
        there = self._ray.cluster_resources()
        asked = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": (resources.memory_gb or 0) * 2**30}
        short = [name for name, number in asked.items() if number > there.get(name, 0)]
        if short:
            raise UserError(
                f"resources: a cell asks for {asked[short[0]]:g} {short[0]}, the cluster has {there.get(short[0], 0):g}"
            )
        return max(1, min(int(there.get(name, 0) // number) for name, number in asked.items() if number))

    def has_room(self) -> bool:
        return len(self._running) < self._slots

    def submit(self, job: Job) -> None:
        self._running[self._task.remote(job)] = job

    def busy(self) -> bool:
        return bool(self._running)

    def events(self) -> Iterator[Told]:
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
        if self._started:
            self._ray.shutdown()


def _on_worker(job: Job) -> Iterator[Event]:
    """The job in a Ray worker. Its threads are those it was given."""
    yield from work(job, lambda *_: None)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise UserError('resources.executor=ray needs Ray: pip install "lm-ortho[ray]"') from None
    return ray


def make_executor(resources: Resources, progress: ProgressCallback) -> Executor:
    """The executor that was asked for."""
    from lm_ortho.harness import distributed

    if resources.executor == "local":
        return Local(progress)
    if distributed.world_size() > 1:
        raise UserError("resources.executor=ray under torchrun: let Ray start the cells, or torchrun, not both")
    return OnRay(resources)
