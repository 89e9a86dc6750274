"""Runs a job: makes the model of one cell if it is missing, and measures it, piece by piece.

Events are generated one by one, so that the driver can store every piece as soon as it is finished, wherever the job
runs.
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

from lm_ortho.checkpoint.input_files import sha256
from lm_ortho.errors import UserError
from lm_ortho.files import atomic_directory, make_private_directory, private_opener
from lm_ortho.leaderboard.batch_halving import halve_batch_on_oom
from lm_ortho.leaderboard.cells import Cell
from lm_ortho.leaderboard.makers import Maker, find_maker
from lm_ortho.leaderboard.store import Piece
from lm_ortho.runtime.progress import ProgressCallback, show_progress

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only


@dataclass(frozen=True)
class Job:
    """The unfinished pieces of one model. ``model_args`` load the model.

    ``cell`` says how to make the model, None for an existing one; ``make`` is the piece that makes it, None where it
    was made before. ``samples`` are files of samples of the retain-only model by the key of the piece that wrote them.
    """

    label: str
    directory: Path
    pieces: tuple[Piece, ...]
    cell: Cell | None = None
    make: Piece | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    imports: tuple[str, ...] = ()
    log: Path | None = None
    samples: Mapping[str, str] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """The keys of all pieces, that of the model first."""
        return [*([self.make.key] if self.make else []), *(piece.key for piece in self.pieces)]


@dataclass(frozen=True)
class Event:
    """An event of a piece: its ``kind`` is ``begin``, ``done`` (with a result) or ``failed`` (with an error)."""

    kind: str
    key: str
    result: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


def run_job(job: Job, progress: ProgressCallback) -> Iterator[Event]:
    """Runs the job. A failing task does not stop the others; if the model cannot be made or loaded, all pieces fail."""
    steps = _run_steps(job, progress)
    while True:
        with _redirect_output(job.log):  # never across a yield: output of the driver is not redirected
            event = next(steps, None)
        if event is None:
            return
        yield event


def _run_steps(job: Job, progress: ProgressCallback) -> Iterator[Event]:
    from lm_ortho.harness import distributed

    if job.cell and job.pieces and job.pieces[0].kind == "tune":
        yield from _run_tuning(job, progress)
        return
    # 1. Make the model, unless it exists.
    place = Path(job.model_args["pretrained"]) if job.cell else None
    if job.cell and place:
        if distributed.broadcast(not place.is_dir()):
            key = job.make.key if job.make else ""
            report = yield from _attempt_piece(key, partial(_make_model, job, place, progress))
            if report is None:
                yield from (Event("failed", piece.key, error="its model could not be made") for piece in job.pieces)
                return
        elif job.make:  # made by a run that was interrupted before it recorded the piece
            yield from _attempt_piece(job.make.key, partial(_describe_model, job.cell, place))
    if not job.pieces:
        return
    # 2. Load it.
    notes: list[str] = []
    try:
        lm = _load_model(job, notes)
    except Exception as error:
        yield from (Event("failed", piece.key, error=describe_error(error)) for piece in job.pieces)
        return
    # 3. Measure it.
    for number, piece in enumerate(job.pieces):
        progress(job.label, number, len(job.pieces), _describe_point(piece))
        notes.clear()
        yield from _attempt_piece(piece.key, partial(_measure_piece, lm, job, piece, notes))


def _attempt_piece(key: str, function: Callable[[], dict[str, Any]]) -> Generator[Event, None, dict[str, Any] | None]:
    """Calls ``function`` and yields the events of its piece; returns the result, None after a failure."""
    from lm_ortho.harness import distributed

    if key:
        yield Event("begin", key)
    start_time = time.perf_counter()
    try:
        result = function()
    except Exception as error:
        log.exception("failed")
        if key:
            yield Event("failed", key, error=describe_error(error), seconds=time.perf_counter() - start_time)
        if distributed.world_size() > 1:
            raise UserError(
                f"{describe_error(error).splitlines()[0]}; start again to continue without this piece"
            ) from None
        return None
    if key:
        yield Event("done", key, result=result, seconds=time.perf_counter() - start_time)
    return result


def _run_tuning(job: Job, progress: ProgressCallback) -> Iterator[Event]:
    """Tries settings on the tuning split; under torchrun only in the first process."""
    from lm_ortho.harness import distributed

    if distributed.rank():
        return
    assert job.cell is not None
    maker = find_maker(job.cell.method, job.imports)
    for piece in job.pieces:
        cell = replace(job.cell, **{name: piece.config[name] for name in ("settings", "seed", "budget")})
        yield from _attempt_piece(piece.key, partial(_score_settings, maker, cell, progress))


def _score_settings(maker: Maker, cell: Cell, progress: ProgressCallback) -> dict[str, Any]:
    with show_progress(progress):
        return dict(maker.score(cell, progress))


def _make_model(job: Job, place: Path, progress: ProgressCallback) -> dict[str, Any]:
    """Makes the model of the cell, in the first process only, and returns its report."""
    from lm_ortho.harness import distributed

    cell = job.cell
    assert cell is not None
    accelerator = distributed.make_accelerator("cpu") if distributed.world_size() > 1 else None
    report: dict[str, Any] = {}
    if distributed.rank() == 0:
        make_private_directory(place.parent)  # it holds memories in clear, as the cache does
        with atomic_directory(place) as scratch:
            maker = find_maker(cell.method, job.imports)
            with show_progress(progress):
                report = dict(maker.make(cell, scratch, progress))
            report |= _describe_model(cell, scratch)
    if accelerator is not None:
        accelerator.wait_for_everyone()
    return report


def _describe_model(cell: Cell, directory: Path) -> dict[str, Any]:
    """The fields of the report of a model that the table needs."""
    from lm_ortho.pipeline.cache_key import files_hash

    fields = {"settings": dict(cell.settings), "checkpoint": files_hash(str(directory))}
    return {**fields, "layers": _read_layer_shares(directory)} if cell.dial else fields


def _read_layer_shares(directory: Path) -> dict[str, Any]:
    """For each layer the number of values of the ortho stream and the number of weights."""
    from lm_ortho.checkpoint.contents import read_contents

    return {layer.name: [layer.values or 0, layer.weights] for layer in read_contents(directory).layers}


def _load_model(job: Job, notes: list[str]) -> Any:
    from lm_ortho.leaderboard.evaluation import load_lm

    def warn(text: str) -> None:
        log.warning("%s", text)
        notes.append(text)

    options = dict(job.model_args)
    has_alpha = any(piece.config["alpha"] is not None for piece in job.pieces)
    lm = load_lm(options.pop("pretrained"), has_alpha, options)
    halve_batch_on_oom(lm, warn)
    return lm


def _measure_piece(lm: Any, job: Job, piece: Piece, notes: Sequence[str]) -> dict[str, Any]:
    from lm_ortho.leaderboard.evaluation import evaluate

    alpha = piece.config["alpha"]
    suffix = "" if alpha is None else f"__alpha_{alpha:g}" if isinstance(alpha, int | float) else f"__alpha_{alpha}"
    folder = job.directory / "results" / f"{piece.config['folder']}{suffix}".replace("/", "_").replace(":", "-")
    config = dict(piece.config)
    samples = config.get("retain_samples")
    if samples:
        config["metadata"] = {**config["metadata"], samples["argument"]: job.samples[samples["piece"]]}
    result = evaluate(lm, config, folder)
    if result is None:
        return {}
    if samples:
        result["retain_samples"] = sha256(Path(job.samples[samples["piece"]]))
    folder_name = str(folder.relative_to(job.directory))
    return {**result, "files": [f"{folder_name}/{name}" for name in result["files"]], "notes": list(notes)}


def _describe_point(piece: Piece) -> str:
    alpha = piece.config["alpha"]
    return piece.config["task"] + ("" if alpha is None else f" alpha={alpha}")


def describe_error(error: BaseException) -> str:
    """The text that the store keeps of an error: one line for bad input, else also the end of the traceback."""
    if isinstance(error, UserError):
        return str(error)
    last_lines = traceback.format_exception(error)[-4:]
    return f"{type(error).__name__}: {error}\n{''.join(last_lines)}".strip()


@contextlib.contextmanager
def _redirect_output(path: Path | None) -> Iterator[None]:
    """Redirects progress bars and messages of lm-eval, transformers and this package into the log file."""
    if path is None:
        yield
        return
    make_private_directory(path.parent)
    with open(path, "a", encoding="utf-8", opener=private_opener) as stream:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        level = root.level
        root.setLevel(logging.INFO)
        try:
            with contextlib.redirect_stderr(stream):
                yield
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
