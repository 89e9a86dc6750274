"""Evaluates one checkpoint at several alphas on several tasks: loads it once and stores every result immediately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_ortho.config import format_model_args, split_model_args
from lm_ortho.dial import format_alpha, parse_alpha
from lm_ortho.errors import UserError
from lm_ortho.harness import distributed
from lm_ortho.leaderboard.cells import build_evaluation_piece, digest, format_lm_eval_command, hash_task_files
from lm_ortho.leaderboard.evaluation import check_chat, check_options, expand_groups
from lm_ortho.leaderboard.executor import LocalExecutor, follow_jobs
from lm_ortho.leaderboard.progress import ProgressScreen
from lm_ortho.leaderboard.scheduler import Tally, log_run, run_jobs
from lm_ortho.leaderboard.store import Piece, Store
from lm_ortho.leaderboard.worker import Job
from lm_ortho.pipeline.code_hash import evaluation_hash, versions
from lm_ortho.pipeline.loading import load_tokenizer
from lm_ortho.pipeline.spec import check_alpha, resolve
from lm_ortho.runtime.device import require_device

_CHAT = ("apply_chat_template", "system_instruction")
"""How the tasks of a sweep ask, as ``simple_evaluate`` names it."""
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234}
"""The default seeds of lm-eval."""


@dataclass(frozen=True)
class Sweep:
    """Configuration of a sweep. ``model_args`` are those of ``libortho`` without alpha; {} is the embedded model.

    ``apply_chat_template`` and ``system_instruction`` are those of ``lm_eval``; variables of the template are among
    the model args.
    """

    tasks: Sequence[str]
    alphas: Sequence[Any]
    model_args: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None
    dtype: str = "auto"
    batch_size: int | str = 1
    parallelize: bool = False
    seeds: Mapping[str, int] = field(default_factory=lambda: dict(SEEDS))
    apply_chat_template: bool | str = False
    system_instruction: str | None = None


def run_sweep(
    sweep: Sweep, directory: Path, console: Any, retry_failed: bool = False, quiet: bool = False
) -> Tally | None:
    """Runs the pieces that are missing; returns None in all processes of torchrun but the first.

    Raises:
        UserError: for an unknown alpha, task or model arg, before anything is written.
    """
    pieces, job = plan_sweep(sweep, directory)
    if distributed.rank():
        follow_jobs()
        return None
    store = open_store(directory, "sweep")
    store.plan(pieces, facts={"name": directory.resolve().name, "kind": "sweep"}, keep=True)
    with log_run(store, directory) as log:
        keys = {piece.key for piece in pieces}
        records = [record for record in store.records(results=False) if record.piece.key in keys]
        with ProgressScreen(records, console, quiet) as screen:
            executor = LocalExecutor(screen.progress)
            try:
                tally = run_jobs(store, [replace(job, log=log)], executor, screen, retry_failed)
            except BaseException:
                executor.close(clean=False)
                raise
            executor.close()
    return tally


def open_store(directory: Path, kind: str, name: str | None = None) -> Store:
    """The store of a sweep or board (``kind``) in ``directory``.

    Raises:
        UserError: where the folder holds the other kind, or a board of another name.
    """
    store = Store(directory)
    found_kind, found_name = store.get_fact("kind"), store.get_fact("name")
    if found_kind not in (None, kind) or (name is not None and found_name not in (None, name)):
        raise UserError(
            f"out={str(directory)!r} holds the {found_kind or 'board'} {found_name!r}; choose another folder for "
            f"the {kind}{'' if name is None else f' {name!r}'}"
        )
    return store


def plan_sweep(sweep: Sweep, directory: Path) -> tuple[list[Piece], Job]:
    """The pieces in order, and the job that runs them."""
    # 1. Check the arguments.
    alphas = [format_alpha(parse_alpha(alpha)) for alpha in sweep.alphas]
    for name, values in (("alpha", alphas), ("tasks", sweep.tasks)):
        if not values:
            raise UserError(f"{name} is empty; name at least one")
    check_options(sweep.dtype, sweep.batch_size)
    if len(set(alphas)) < len(alphas):
        raise UserError(f"alpha: {', '.join(alphas)} names one value twice")
    require_device(sweep.device)
    args = dict(sweep.model_args)
    model_hash = hash_model(args, alphas)  # before the tasks: indexing those of lm-eval takes ten seconds
    if sweep.apply_chat_template:
        _check_chat(sweep, args)
    elif sweep.system_instruction:
        raise UserError("system_instruction needs apply_chat_template (--apply-chat-template)")
    metadata = _build_metadata(sweep)
    tasks = expand_groups(list(sweep.tasks), metadata)
    if args.get("pretrained"):
        _check_rows(tasks, metadata)
    # 2. Hash what decides the numbers: the model, the conditions, and the files that the tasks read.
    public_args = {name: value for name, value in args.items() if name != "token"}  # they are stored and published
    parallelize = {"parallelize": True} if sweep.parallelize else {}
    dtype = {"dtype": sweep.dtype} if sweep.dtype != "auto" else {}
    cell = digest({"model": model_hash, "dtype": sweep.dtype, "parallelize": sweep.parallelize})
    label = Path(str(args["pretrained"])).name if args.get("pretrained") else "embedded"
    conditions: dict[str, Any] = {
        "limit": sweep.limit,
        "metadata": metadata,
        "seeds": dict(sweep.seeds),
        "dtype": sweep.dtype,
    }
    chat = {name: value for name in _CHAT if (value := getattr(sweep, name))}
    conditions |= {"chat": chat} if chat else {}
    file_hashes = hash_task_files(metadata)
    # 3. Make a piece per alpha and task.
    pieces = []
    for alpha in alphas:
        model_args = format_model_args({**public_args, "alpha": alpha, **dtype, **parallelize})
        description = {
            "label": f"{label} limit={sweep.limit}" if sweep.limit else label,
            "folder": label,
            "method": "checkpoint",
            "model": label,
            "model_args": model_args,
            "batch_size": sweep.batch_size,
            "row": digest([cell, alpha, conditions, file_hashes, versions(), evaluation_hash()])[:16],
        }
        for task in tasks:
            command = format_lm_eval_command(
                "libortho", model_args, task, limit=sweep.limit, metadata=sweep.metadata, chat=chat
            )
            piece = build_evaluation_piece(
                cell,
                {**description, "command": command},
                alpha=float(alpha) if ":" not in alpha else alpha,
                task=task,
                file_hashes=file_hashes,
                conditions=conditions,
            )
            pieces.append(piece)
    loading_args = {
        "pretrained": None,
        **args,
        "device": sweep.device,
        "dtype": sweep.dtype,
        "batch_size": sweep.batch_size,
        "parallelize": sweep.parallelize,
    }
    return pieces, Job(label, directory, tuple(pieces), model_args=loading_args)


_ROWS = {
    "forget_set": ("forget",),
    "retain_set": ("retain",),
    "verbatim_forget": ("forget",),
    "verbatim_retain": ("retain",),
    "membership_set": ("forget", "holdout"),
}
"""The sets of rows that a task needs with a model of the user's own."""


def _check_rows(tasks: Sequence[str], metadata: Mapping[str, Any]) -> None:
    """Raises ``UserError`` for a task without the rows that it needs: it would fail at every alpha."""
    for task in tasks:
        if missing := [name for name in _ROWS.get(task, ()) if not metadata.get(name)]:
            raise UserError(f"metadata: {task} needs rows; add {missing[0]}=rows.jsonl to --metadata")


def _check_chat(sweep: Sweep, args: Mapping[str, Any]) -> None:
    """Raises ``UserError`` where the tokenizer of the model cannot render a question as the sweep asks it."""
    spec, _ = split_model_args(args)
    resolved = resolve(spec)
    chat = {name: getattr(sweep, name) for name in _CHAT}
    check_chat(load_tokenizer(resolved), {**chat, "chat_template_args": spec.recipe.chat_template_args})


def _build_metadata(sweep: Sweep) -> dict[str, Any]:
    """The metadata of the tasks, with what they read of the model args, as ``lm_eval --model_args`` adds them."""
    rows = {name: sweep.model_args[name] for name in ("forget", "retain") if sweep.model_args.get(name)}
    names = ["pretrained", "tokenizer"] if rows and sweep.model_args.get("pretrained") else []
    if "retain" in rows and "retain" not in sweep.metadata:
        names.append("held_out")  # it selects the rows that are measured
    model = {name: sweep.model_args[name] for name in names if sweep.model_args.get(name)}
    return {**model, **rows, **sweep.metadata}


def hash_model(args: Mapping[str, Any], alphas: Sequence[str]) -> str:
    """Hash of the model args with the content of the directories and rows that they name.

    Raises:
        UserError: for a model arg that libortho does not have, for files that cannot be read, and for an alpha of a
            memory that the model does not have.
    """
    from lm_ortho.harness.model import LibOrthoLM
    from lm_ortho.pipeline.cache_key import files_hash, key_parts

    spec, options = split_model_args(args)
    LibOrthoLM.refuse(options, spec.kernel)
    resolved = resolve(spec)
    for alpha in alphas:
        check_alpha(replace(resolved, spec=split_model_args({**args, "alpha": alpha})[0]))
    options |= {"kernel": spec.kernel, "tokenizer": spec.tokenizer}
    if template_args := spec.recipe.chat_template_args:  # of the evaluation, also where the model is decomposed already
        options |= {"chat_template_args": template_args}
    if resolved.kind == "checkpoint":
        return digest([files_hash(str(resolved.location), **spec.loading_options), options])
    return digest([key_parts(resolved), options])
