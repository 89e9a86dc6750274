"""Plans a board as pieces and jobs: models to make, tasks to measure them on, settings to try first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lm_ortho import world
from lm_ortho.config import format_model_args, make_spec
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_tokenizer as load_directory
from lm_ortho.leaderboard import retain_samples
from lm_ortho.leaderboard.cells import (
    METHOD_CODE,
    Cell,
    build_evaluation_piece,
    build_model_piece,
    digest,
    format_lm_eval_command,
    hash_task_files,
)
from lm_ortho.leaderboard.config import Board, Entry, Model
from lm_ortho.leaderboard.evaluation import check_chat, expand_groups
from lm_ortho.leaderboard.makers import Maker, find_maker
from lm_ortho.leaderboard.retain_samples import needed_pieces
from lm_ortho.leaderboard.store import DONE, Piece, Record
from lm_ortho.leaderboard.sweep import SEEDS
from lm_ortho.leaderboard.worker import Job
from lm_ortho.pipeline.code_hash import code_hash, versions
from lm_ortho.pipeline.loading import load_tokenizer
from lm_ortho.pipeline.spec import resolve
from lm_ortho.runtime.device import require_device


@dataclass(frozen=True)
class Plan:
    """The jobs of a board; ``tuning`` has to be finished before ``cells``."""

    tuning: tuple[Job, ...]
    cells: tuple[Job, ...]

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of all jobs, in the order of the table."""
        pieces = [piece for job in self.tuning for piece in job.pieces]
        for job in self.cells:
            pieces += [job.make] if job.make else []
            pieces += job.pieces
        return pieces


@dataclass(frozen=True)
class _ModelTasks:
    """The tasks of a model with their limits, their metadata, and hashes of the files that the metadata names."""

    limits: Mapping[str, int | None]
    metadata: Mapping[str, Any]
    file_hashes: Mapping[str, str]


def plan_board(board: Board, directory: Path, only: str = "") -> Plan:
    """The plan of the board; ``only`` restricts it to the cells of a method, or to those whose hash begins with it.

    Raises:
        UserError: for an unknown method, setting, task or model, before anything is written.
    """
    _check_values(board)
    for name, model in board.models.items():
        _hash_model(model)  # kept; what is wrong with a model is found before the tasks of lm-eval are indexed
        _check_chat(board, name, model)
    model_tasks = {}
    for name, model in board.models.items():
        metadata = build_metadata(board, model)
        model_tasks[name] = _ModelTasks(expand_limits(board, metadata), metadata, hash_task_files(metadata))
    tuning: dict[str, Job] = {}
    cells: dict[str, Job] = {}
    expanded = list(_expand_cells(board))
    samples = {name: _plan_samples(board, name, tasks, expanded) for name, tasks in model_tasks.items()}
    for cell, entry in expanded:
        pieces = list(
            _evaluation_pieces(board, cell, entry, tasks=model_tasks[cell.model], samples=samples[cell.model])
        )
        if cell.key in cells:
            raise UserError(f"methods: {cell.label} seed={cell.seed} is listed twice")
        cells[cell.key] = _make_cell_job(board, cell, directory, pieces)
    selected = _select_jobs(list(cells.values()), only)
    for job in selected:
        if job.cell and job.cell.tuned:
            tuning.setdefault(digest(job.cell.tuned), _make_tuning_job(board, job.cell, directory))
    return Plan(tuple(tuning.values()), tuple(selected))


def _select_jobs(jobs: Sequence[Job], only: str) -> list[Job]:
    """The jobs of a method or hash, in order, with the pieces of the retain-only model whose samples they need."""
    if not only:
        return list(jobs)
    chosen = [job for job in jobs if job.cell and (only == job.cell.method or job.cell.key.startswith(only))]
    if not chosen:
        raise UserError(f"only={only!r}: no cell of the board has this method or hash")
    needed = needed_pieces(chosen)
    selected = []
    for job in jobs:
        pieces = job.pieces if job in chosen else tuple(piece for piece in job.pieces if piece.key in needed)
        if pieces:
            selected.append(replace(job, pieces=pieces))
    return selected


class _Samples(NamedTuple):
    """Samples of the retain-only model: the metadata that names them, the piece that logs them, its cell and folder."""

    argument: str
    piece: str
    cell: str
    folder: str


def _plan_samples(
    board: Board, model: str, tasks: _ModelTasks, cells: Sequence[tuple[Cell, Entry]]
) -> dict[str, _Samples]:
    """By task the samples that the row ``never_saw`` of ``model`` logs for the other rows, with its first seed."""
    reference = next(((c, e) for c, e in cells if c.model == model and c.method == retain_samples.METHOD), None)
    if reference is None:
        return {}
    cell, entry = reference
    samples = dict[str, _Samples]()
    for piece in _evaluation_pieces(board, cell, entry, tasks=tasks, samples={}):
        task = piece.config["task"]
        if argument := retain_samples.find_argument(task, tasks.limits[task], tasks.metadata):
            samples.setdefault(task, _Samples(argument, piece.key, cell.key, cell.folder))
    return samples


def _check_chat(board: Board, name: str, model: Model) -> None:
    """Raises ``UserError`` where the tokenizer of a model cannot render a question as the board asks it."""
    if not board.apply_chat_template:
        return
    spec = make_spec(**model.model_dump(exclude={"never_saw"}))
    try:
        tokenizer = load_tokenizer(resolve(spec)) if model.pretrained else load_directory(world.get_path("base"))
        check_chat(tokenizer, board.chat)
    except UserError as error:
        raise UserError(f"models.{name}: {error}") from None


def _check_values(board: Board) -> None:
    """Raises ``UserError`` for a device that is not there, and for an unknown method or setting."""
    require_device(board.device)
    for entry in board.methods:
        maker = find_maker(entry.method, board.imports)
        for settings in entry.combinations():
            maker.check(settings)


def expand_limits(board: Board, metadata: Mapping[str, Any]) -> dict[str, int | None]:
    """The tasks of a model in order, groups replaced by their tasks, with the number of documents of each (or None).

    Raises:
        UserError: for an unknown task, and for a limit of a task that the board does not evaluate.
    """
    tasks = expand_groups(list(board.tasks), metadata)
    members = {}
    for name in board.limits:
        members[name] = [name] if name in tasks else expand_groups([name], metadata)
        if not set(members[name]) <= set(tasks):
            raise UserError(f"limits names {name!r}, which is not among the tasks")
    limits: dict[str, int | None] = dict.fromkeys(tasks, board.limit)
    # A narrower group overrides a wider one, so it is applied later.
    for name, leaves in sorted(members.items(), key=lambda item: -len(item[1])):
        limits |= dict.fromkeys(leaves, board.limits[name])
    return limits


def build_metadata(board: Board, source: Model) -> dict[str, Any]:
    """The metadata of the tasks: the rows of your own model, and the metadata of the board."""
    rows = {name: value for name in ("forget", "retain") if (value := getattr(source, name))}
    return {**rows, **board.metadata}


def _expand_cells(board: Board) -> Iterator[tuple[Cell, Entry]]:
    for name, model in board.models.items():
        source = model.model_dump()
        for entry in board.methods:
            maker = find_maker(entry.method, board.imports)
            # The ends of the scale need one seed only, unless the board lists seeds for them.
            seeds = (entry.seeds or board.seeds)[: 1 if maker.mode == "end" and entry.seeds is None else None]
            for settings in entry.combinations():
                maker.check(settings)
                cell = Cell(
                    model=name,
                    source=source,
                    method=entry.method,
                    settings=settings,
                    seed=0,
                    mode=maker.mode,
                    budget=board.budget.model_dump(),
                    tuned=_plan_tuning(board, entry, maker, source),
                    dial=maker.dial,
                    identity=_hash_model(model),
                    prompts=board.recipe_keys,
                    device=board.device,
                )
                for seed in seeds:
                    yield replace(cell, seed=seed), entry


def _plan_tuning(board: Board, entry: Entry, maker: Maker, source: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tuning that chooses the settings of an entry; None where the settings are fixed."""
    candidates = [{**settings, **entry.settings} for settings in maker.grid()] if entry.tune else []
    grid = [settings for number, settings in enumerate(candidates) if settings not in candidates[:number]]
    if len(grid) < 2:
        return None
    if source["pretrained"]:
        raise UserError(f"methods: tune of {entry.method}: there is a tuning split for the embedded model only")
    for settings in grid:
        maker.check(settings)
    return {
        "method": entry.method,
        "grid": grid,
        "seed": board.tuning.seed,
        "budget": (board.tuning.budget or board.budget).model_dump(),
        "identity": _hash_model(Model.model_validate({})),
    }


@lru_cache(maxsize=32)
def _hash_model(model: Model) -> str:
    """Hash of the content of models and rows, of the code that makes models, and of the package versions."""
    from lm_ortho.pipeline.cache_key import adapter_hash, files_hash, rows_hash

    if model.pretrained is None:
        weights = [files_hash(str(world.get_path(name))) for name in ("base", "memory", "never_saw")]
        return digest([weights, code_hash(*METHOD_CODE), versions()])
    spec = make_spec(**model.model_dump(exclude={"never_saw"}), held_out="none")
    resolved = resolve(spec)
    if resolved.kind != "model":
        raise UserError(
            f"models: {model.pretrained!r} is decomposed already; methods start from the model it came from"
        )
    forget_sets, retain_rows = resolved.calibration_sets
    row_hashes = [[name, rows_hash(rows)] for name, rows in forget_sets.items()], rows_hash(retain_rows)
    places = [place for place in (model.base, model.never_saw) if place and place not in ("auto", "none")]
    weights = [files_hash(model.pretrained, **spec.loading_options), adapter_hash(model.peft), *map(files_hash, places)]
    return digest([weights, row_hashes, model.base, code_hash(*METHOD_CODE), versions()])


def _make_tuning_job(board: Board, cell: Cell, directory: Path) -> Job:
    """The job that tries every setting of the tuning of ``cell``, a piece each."""
    tuning = cell.tuned or {}
    group = digest(tuning)
    pieces = []
    for settings in tuning["grid"]:
        candidate = replace(cell, settings=settings, seed=tuning["seed"], budget=tuning["budget"])
        label = replace(candidate, tuned=None).label
        config = {**asdict(candidate), "label": f"tuning {label}"}
        pieces.append(Piece(digest([group, settings]), group, "tune", config))
    return Job(f"tuning {cell.method}", directory, tuple(pieces), cell=cell, imports=board.imports)


def _evaluation_pieces(
    board: Board,
    cell: Cell,
    entry: Entry,
    *,
    tasks: _ModelTasks,
    samples: Mapping[str, _Samples],
) -> Iterator[Piece]:
    """A piece per alpha and task, alphas in the outer loop; ``samples`` of the retain-only model by task."""
    place = f"models/{cell.folder}"
    for alpha in (entry.alphas or board.alphas) if cell.dial else (None,):
        args = {"pretrained": place, **({} if alpha is None else {"alpha": alpha}), "dtype": board.dtype}
        args |= {"softmax_dtype": "float32"} if alpha is None else {}
        args |= {"chat_template_args": board.template_args} if board.template_args else {}
        model_args = format_model_args(args)
        description = {
            "label": cell.label,
            "folder": cell.folder,
            "method": cell.method,
            "mode": cell.mode,
            "model": cell.model,
            "settings": dict(cell.settings),
            "tuned": bool(cell.tuned),
            "seed": cell.seed,
            "model_args": model_args,
            "row": hash_row(cell, alpha),
            "cell": cell.key,
            "batch_size": board.batch_size,
        }
        kind = "hf" if alpha is None else "libortho"
        for task, limit in tasks.limits.items():
            conditions = {"limit": limit, "metadata": tasks.metadata, "seeds": SEEDS, "dtype": board.dtype}
            metadata = dict(tasks.metadata)
            conditions |= {"chat": board.chat} if board.chat else {}
            if (source := samples.get(task)) and source.cell != cell.key:
                # The key of the piece that logs the samples is a hash of all that decides them.
                conditions["retain_samples"] = {"argument": source.argument, "piece": source.piece}
                metadata[source.argument] = f"results/{source.folder}"
            command = format_lm_eval_command(kind, model_args, task, limit=limit, metadata=metadata, chat=board.chat)
            yield build_evaluation_piece(
                cell.key,
                {**description, "command": command},
                alpha=alpha,
                task=task,
                file_hashes=tasks.file_hashes,
                conditions=conditions,
            )


def hash_row(cell: Cell, alpha: float | None) -> str:
    """Key of a row of the table, the same for all its seeds."""
    return digest([replace(cell, seed=0).key, cell.model, alpha])[:16]


def _make_cell_job(board: Board, cell: Cell, directory: Path, pieces: Sequence[Piece]) -> Job:
    """The job that makes the model of a cell and measures it."""
    model_args = {
        "pretrained": str(directory / "models" / cell.folder),
        "device": board.device,
        "dtype": board.dtype,
        "batch_size": board.batch_size,
        "parallelize": board.parallelize,
        **({"chat_template_args": board.template_args} if board.template_args else {}),
    }
    label = f"{cell.label} seed={cell.seed}" + (f" {cell.model}" if len(board.models) > 1 else "")
    return Job(
        label,
        directory,
        tuple(pieces),
        cell=cell,
        make=build_model_piece(cell),
        model_args=model_args,
        imports=board.imports,
    )


def resolve_tuning(jobs: Sequence[Job], records: Sequence[Record]) -> tuple[list[Job], list[tuple[Job, str]]]:
    """The jobs with the settings that the tuning chose, and the jobs without settings, each with the reason."""
    ready, unresolved = [], list[tuple[Job, str]]()
    for job in jobs:
        cell = job.cell
        if cell is None or not cell.tuned:
            ready.append(job)
            continue
        settings = select_best_settings(records, digest(cell.tuned))
        if settings is None:
            unresolved.append((job, "tuning: no setting finished; see the pieces of kind tune"))
        else:
            ready.append(replace(job, cell=replace(cell, settings=settings)))
    return ready, unresolved


def select_best_settings(records: Sequence[Record], group: str) -> Mapping[str, Any] | None:
    """The settings with the lowest total among the finished trials of a tuning; the first of equals."""
    trials = [r for r in records if r.piece.kind == "tune" and r.piece.cell == group and r.status == DONE]
    best = min(trials, key=lambda record: record.result["total"], default=None)
    return None if best is None else dict(best.piece.config["settings"])
