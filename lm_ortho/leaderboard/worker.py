"""What a worker does: makes the model of one cell if it is missing, and measures it, piece by piece.

A generator of events, so that the driver can keep every piece the moment it is finished, wherever this runs.
"""

from __future__ import annotations

import contextlib
import logging
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from lm_ortho.errors import UserError
from lm_ortho.files import atomic_directory, make_private_directory
from lm_ortho.leaderboard.cells import Cell, find_maker
from lm_ortho.leaderboard.store import Piece
from lm_ortho.runtime.progress import ProgressCallback

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only


@dataclass(frozen=True)
class Job:
    """The pieces of one model that are not done. ``cell`` is None for a model that is there, named in ``loading``.

    ``make`` is the piece that makes it, or None where it was made before. ``loading`` are model args.
    """

    label: str
    directory: Path
    pieces: tuple[Piece, ...]
    cell: Cell | None = None
    make: Piece | None = None
    loading: Mapping[str, Any] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    log: Path | None = None

    @property
    def keys(self) -> list[str]:
        return [*([self.make.key] if self.make else []), *(piece.key for piece in self.pieces)]


@dataclass(frozen=True)
class Event:
    """What happened to a piece: ``begin``, ``done`` with its result, or ``failed`` with an error."""

    kind: str
    key: str
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


def work(job: Job, progress: ProgressCallback) -> Iterator[Event]:
    """Does the job. A failing task does not stop the others; a model that cannot be made or loaded fails them all."""
    steps = _steps(job, progress)
    while True:
        with _into(job.log):  # never across a yield: what the driver prints is its own
            event = next(steps, None)
        if event is None:
            return
        yield event


def _steps(job: Job, progress: ProgressCallback) -> Iterator[Event]:
    from lm_ortho.harness import distributed

    if job.cell and job.pieces and job.pieces[0].kind == "tune":
        yield from _tune(job, progress)
        return
    place = Path(job.loading["pretrained"]) if job.cell else None
    if job.cell and place:
        if distributed.broadcast(not place.is_dir()):
            key = job.make.key if job.make else ""
            made = yield from _attempt(key, partial(_make, job, place, progress))
            if made is None:
                yield from (Event("failed", piece.key, error="its model could not be made") for piece in job.pieces)
                return
        elif job.make:  # made by a run that was interrupted before it could say so
            yield from _attempt(job.make.key, partial(_described, job.cell, place))
    if not job.pieces:
        return
    notes: list[str] = []
    try:
        lm = _load(job, notes)
    except Exception as error:
        yield from (Event("failed", piece.key, error=describe_error(error)) for piece in job.pieces)
        return
    for number, piece in enumerate(job.pieces):
        progress(job.label, number, len(job.pieces), _at(piece))
        notes.clear()
        yield from _attempt(piece.key, partial(_measure, lm, job, piece, notes))


def _attempt(key: str, do: Callable[[], dict[str, Any]]) -> Generator[Event, None, dict[str, Any] | None]:
    """Events of one piece; gives its result, None after a failure."""
    from lm_ortho.harness import distributed

    if key:
        yield Event("begin", key)
    began = time.perf_counter()
    try:
        result = do()
    except Exception as error:
        log.exception("failed")
        if key:
            yield Event("failed", key, error=describe_error(error), seconds=time.perf_counter() - began)
        if distributed.world_size() > 1:
            raise UserError(
                f"{describe_error(error).splitlines()[0]}; start again to go on without this piece"
            ) from None
        return None
    if key:
        yield Event("done", key, result=result, seconds=time.perf_counter() - began)
    return result


def _tune(job: Job, progress: ProgressCallback) -> Iterator[Event]:
    """Tries settings on the tuning split; under torchrun in the first process, the others have nothing to do."""
    from lm_ortho.harness import distributed

    if distributed.rank():
        return
    assert job.cell is not None
    maker = find_maker(job.cell.method, job.imports)
    for piece in job.pieces:
        tried = replace(job.cell, **{name: piece.config[name] for name in ("settings", "seed", "budget")})
        yield from _attempt(piece.key, lambda cell=tried: dict(maker.score(cell, progress)))  # type: ignore[misc]


def _make(job: Job, place: Path, progress: ProgressCallback) -> dict[str, Any]:
    """Makes the model of the cell and says what it is; in one process only."""
    from lm_ortho.harness import distributed

    cell = job.cell
    assert cell is not None
    accelerator = distributed.make_accelerator("cpu") if distributed.world_size() > 1 else None
    report: dict[str, Any] = {}
    if distributed.rank() == 0:
        with atomic_directory(place) as scratch:
            maker = find_maker(cell.method, job.imports)
            report = dict(maker.make(cell, scratch, progress))
            report |= _described(cell, scratch)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return report


def _described(cell: Cell, directory: Path) -> dict[str, Any]:
    """What the table needs to know of a model that was made."""
    from lm_ortho.pipeline.build import files_hash

    made = {"settings": dict(cell.settings), "checkpoint": files_hash(str(directory))}
    return {**made, "layers": _shares(directory)} if cell.dial else made


def _shares(directory: Path) -> dict[str, Any]:
    """Per layer the values of the ortho stream and the weights they are taken from."""
    from lm_ortho.checkpoint.contents import read_contents

    return {layer.name: [layer.values or 0, layer.weights] for layer in read_contents(directory).layers}


def _load(job: Job, notes: list[str]) -> Any:
    from lm_ortho.leaderboard.batch_halving import halve_when_full
    from lm_ortho.leaderboard.evaluation import load_lm

    def say(text: str) -> None:
        log.warning("%s", text)
        notes.append(text)

    options = dict(job.loading)
    dial = any(piece.config["alpha"] is not None for piece in job.pieces)
    lm = load_lm(options.pop("pretrained"), dial, options)
    halve_when_full(lm, say)
    return lm


def _measure(lm: Any, job: Job, piece: Piece, notes: Sequence[str]) -> dict[str, Any]:
    from lm_ortho.leaderboard.evaluation import evaluate

    alpha = piece.config["alpha"]
    at = "" if alpha is None else f"__alpha_{alpha:g}" if isinstance(alpha, int | float) else f"__alpha_{alpha}"
    folder = job.directory / "results" / f"{piece.config['folder']}{at}".replace("/", "_").replace(":", "-")
    found = evaluate(lm, piece.config, folder)
    if found is None:
        return {}
    folder_name = str(folder.relative_to(job.directory))
    return {**found, "files": [f"{folder_name}/{name}" for name in found["files"]], "notes": list(notes)}


def _at(piece: Piece) -> str:
    alpha = piece.config["alpha"]
    return piece.config["task"] + ("" if alpha is None else f" alpha={alpha}")


def describe_error(error: BaseException) -> str:
    """What the store keeps of a failure: one line for bad input, else the last lines of the traceback, too."""
    if isinstance(error, UserError):
        return str(error)
    last = traceback.format_exception(error)[-4:]
    return f"{type(error).__name__}: {error}\n{''.join(last)}".strip()


@contextlib.contextmanager
def _into(path: Path | None) -> Iterator[None]:
    """Bars and messages of lm-eval, transformers and our own code go into the log file."""
    if path is None:
        yield
        return
    make_private_directory(path.parent)
    with path.open("a", encoding="utf-8") as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        before = root.level
        root.setLevel(logging.INFO)
        try:
            with contextlib.redirect_stderr(stream):
                yield
        finally:
            root.removeHandler(handler)
            root.setLevel(before)
