"""From a board to pieces and jobs: which models are made, what each is measured on, which settings are tried first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lm_ortho import world
from lm_ortho.config import format_model_args
from lm_ortho.errors import UserError
from lm_ortho.leaderboard.cells import (
    METHOD_CODE,
    Cell,
    Maker,
    asked_of,
    digest,
    evaluate_piece,
    find_maker,
    lm_eval_command,
    make_piece,
)
from lm_ortho.leaderboard.config import Board, Entry, Model
from lm_ortho.leaderboard.evaluation import leaf_tasks
from lm_ortho.leaderboard.store import DONE, Piece, Record
from lm_ortho.leaderboard.sweep import SEEDS
from lm_ortho.leaderboard.worker import Job
from lm_ortho.pipeline.code_hash import code_hash, versions
from lm_ortho.runtime.device import require_device


@dataclass(frozen=True)
class Plan:
    """``tuning`` has to be finished before ``cells``; ``pieces`` are those of both, in the order of the table."""

    tuning: tuple[Job, ...]
    cells: tuple[Job, ...]

    @property
    def pieces(self) -> list[Piece]:
        found = [piece for job in self.tuning for piece in job.pieces]
        for job in self.cells:
            found += [job.make] if job.make else []
            found += job.pieces
        return found


def plan_board(board: Board, directory: Path, only: str = "") -> Plan:
    """Everything the board asks for; ``only`` keeps the cells of a method, or those whose hash begins so.

    Raises:
        UserError: for a method, a setting, a task or a model that is not known, before anything is written.
    """
    require_device(board.device)
    metadata = {model: metadata_of(board, source) for model, source in board.models.items()}
    limits = {model: limits_of(board, told) for model, told in metadata.items()}
    contents = {model: asked_of(told) for model, told in metadata.items()}
    tuning: dict[str, Job] = {}
    cells: dict[str, Job] = {}
    for cell, entry in _cells(board):
        if only and only != cell.method and not cell.key.startswith(only):
            continue
        if cell.tuned:
            tuning.setdefault(digest(cell.tuned), _tuning_job(board, cell, directory))
        told = limits[cell.model], metadata[cell.model], contents[cell.model]
        pieces = list(_measurements(board, cell, entry, *told))
        if cell.key in cells:
            raise UserError(f"methods: {cell.label} seed={cell.seed} is asked for twice")
        cells[cell.key] = _cell_job(board, cell, directory, pieces)
    if not cells:
        raise UserError(f"only={only!r}: no cell of the board has this method or hash")
    return Plan(tuple(tuning.values()), tuple(cells.values()))


def limits_of(board: Board, metadata: Mapping[str, Any]) -> dict[str, int | None]:
    """The tasks of a model in order, groups taken apart, with the documents each is limited to.

    Raises:
        UserError: for a task that is not known, and a limit of one that is not asked for.
    """
    tasks = leaf_tasks(list(board.tasks), metadata)
    inside = {}
    for name in board.limits:
        inside[name] = [name] if name in tasks else leaf_tasks([name], metadata)
        if not set(inside[name]) <= set(tasks):
            raise UserError(f"limits names {name!r}, which is not among the tasks")
    found: dict[str, int | None] = dict.fromkeys(tasks, board.limit)
    for name, leaves in sorted(inside.items(), key=lambda each: -len(each[1])):  # the narrowest has the last word
        found |= dict.fromkeys(leaves, board.limits[name])
    return found


def metadata_of(board: Board, source: Model) -> dict[str, Any]:
    """What tasks are told beside what the board says: the rows of a model of one's own."""
    rows = {name: value for name in ("forget", "retain") if (value := getattr(source, name))}
    return {**rows, **board.metadata}


def _cells(board: Board) -> Iterator[tuple[Cell, Entry]]:
    for name, model in board.models.items():
        source = model.model_dump()
        for entry in board.methods:
            maker = find_maker(entry.method, board.imports)
            seeds = (entry.seeds or board.seeds)[: 1 if maker.mode == "end" and entry.seeds is None else None]
            for settings in entry.combinations():
                maker.check(settings)
                whole = Cell(
                    name, source, entry.method, settings, 0, maker.mode, board.budget.model_dump(),
                    _tuning(board, entry, maker, source), maker.dial, _identity(model),
                )  # fmt: skip
                for seed in seeds:
                    yield replace(whole, seed=seed), entry


def _tuning(board: Board, entry: Entry, maker: Maker, source: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the settings of an entry are chosen; None where they are named, or there is nothing to choose."""
    tried = [{**settings, **entry.settings} for settings in maker.grid()] if entry.tune else []
    tried = [settings for number, settings in enumerate(tried) if settings not in tried[:number]]
    if len(tried) < 2:
        return None
    if source["pretrained"]:
        raise UserError(f"methods: tune of {entry.method}: there is a tuning split for the embedded model only")
    for settings in tried:
        maker.check(settings)
    budget = (board.tuning.budget or board.budget).model_dump()
    seed = board.tuning.seed
    return {
        "method": entry.method,
        "grid": tried,
        "seed": seed,
        "budget": budget,
        "identity": _identity(Model.model_validate({})),
    }


@lru_cache(maxsize=32)
def _identity(model: Model) -> str:
    """Hash of the content of models and rows, of the code that works on them, and of the packages it uses."""
    from lm_ortho.pipeline.build import adapter_hash, files_hash, rows_hash
    from lm_ortho.pipeline.spec import ModelSpec, calibration_sets, resolve

    if model.pretrained is None:
        weights = [files_hash(str(world.path(name))) for name in ("base", "memory", "never_saw")]
        return digest([weights, code_hash(*METHOD_CODE), versions()])
    where = {name: value for name in ("revision", "trust_remote_code") if (value := getattr(model, name))}
    order = ModelSpec(
        model.pretrained, model.peft, model.base or "auto", forget=model.forget, retain=model.retain, source=where
    )
    source = resolve(order)
    if source.kind != "model":
        raise UserError(
            f"models: {model.pretrained!r} is decomposed already; methods start from the model it came from"
        )
    forget, retain = calibration_sets(source)
    rows = [[name, rows_hash(each)] for name, each in forget.items()], rows_hash(retain)
    others = [files_hash(place) for place in (model.base, model.never_saw) if place and place not in ("auto", "none")]
    weights = [files_hash(model.pretrained, **where), adapter_hash(model.peft), *others]
    return digest([weights, rows, model.base, code_hash(*METHOD_CODE), versions()])


def _tuning_job(board: Board, cell: Cell, directory: Path) -> Job:
    tuned = cell.tuned or {}
    group = digest(tuned)
    pieces = []
    for settings in tuned["grid"]:
        tried = replace(cell, settings=settings, seed=tuned["seed"], budget=tuned["budget"])
        label = replace(tried, tuned=None).label
        pieces.append(Piece(digest([group, settings]), group, "tune", {**asdict(tried), "label": f"tuning {label}"}))
    return Job(f"tuning {cell.method}", directory, tuple(pieces), cell, imports=board.imports)


def _measurements(
    board: Board,
    cell: Cell,
    entry: Entry,
    limits: Mapping[str, int | None],
    metadata: Mapping[str, Any],
    content: Mapping[str, str],
) -> Iterator[Piece]:
    """A piece per alpha and task, alphas in the outer loop."""
    place = f"models/{cell.folder}"
    for alpha in (entry.alphas or board.alphas) if cell.dial else (None,):
        args = {"pretrained": place, **({} if alpha is None else {"alpha": alpha}), "dtype": board.dtype}
        args |= {"softmax_dtype": "float32"} if alpha is None else {}
        told = format_model_args(args)
        described = {
            "label": cell.label, "folder": cell.folder, "method": cell.method, "mode": cell.mode, "model": cell.model,
            "settings": dict(cell.settings), "tuned": bool(cell.tuned), "seed": cell.seed, "model_args": told,
            "row": row_of(cell, alpha), "cell": cell.key, "batch_size": board.batch_size,
        }  # fmt: skip
        for task, limit in limits.items():
            command = lm_eval_command("hf" if alpha is None else "libortho", told, task, limit, metadata)
            how = {"limit": limit, "metadata": metadata, "seeds": SEEDS, "dtype": board.dtype}
            yield evaluate_piece(cell.key, {**described, "command": command}, alpha, task, content, **how)


def row_of(cell: Cell, alpha: float | None) -> str:
    """What the seeds of one row of the table have in common."""
    return digest([replace(cell, seed=0).key, cell.model, alpha])[:16]


def _cell_job(board: Board, cell: Cell, directory: Path, pieces: Sequence[Piece]) -> Job:
    loading = {
        "pretrained": str(directory / "models" / cell.folder), "device": board.device, "dtype": board.dtype,
        "batch_size": board.batch_size, "parallelize": board.parallelize,
    }  # fmt: skip
    label = f"{cell.label} seed={cell.seed}" + (f" {cell.model}" if len(board.models) > 1 else "")
    return Job(label, directory, tuple(pieces), cell, make_piece(cell), loading, board.imports)


def settled(jobs: Sequence[Job], records: Sequence[Record]) -> tuple[list[Job], list[tuple[Job, str]]]:
    """The jobs with the settings that tuning chose, and those that have none with the reason."""
    ready, stuck = [], list[tuple[Job, str]]()
    for job in jobs:
        cell = job.cell
        if cell is None or not cell.tuned:
            ready.append(job)
            continue
        chosen = best_settings(records, digest(cell.tuned))
        if chosen is None:
            stuck.append((job, "tuning: no setting came to an end; see the pieces of kind tune"))
        else:
            ready.append(replace(job, cell=replace(cell, settings=chosen)))
    return ready, stuck


def best_settings(records: Sequence[Record], group: str) -> Mapping[str, Any] | None:
    """Of the finished settings of a tuning the one with the lowest total, the first of equals."""
    tried = [r for r in records if r.piece.kind == "tune" and r.piece.cell == group and r.status == DONE]
    best = min(tried, key=lambda record: record.result["total"], default=None)
    return None if best is None else dict(best.piece.config["settings"])
