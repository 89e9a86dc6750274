"""Alphas x tasks on one checkpoint, the model loaded once, every result kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lm_ortho.config import format_alpha, format_model_args, parse_alpha
from lm_ortho.errors import UserError
from lm_ortho.harness import distributed
from lm_ortho.leaderboard.cells import asked_of, digest, evaluate_piece, lm_eval_command
from lm_ortho.leaderboard.evaluation import leaf_tasks
from lm_ortho.leaderboard.executor import Local, follow
from lm_ortho.leaderboard.progress import ProgressScreen
from lm_ortho.leaderboard.scheduler import Tally, drive, logged_run
from lm_ortho.leaderboard.store import Piece, Store
from lm_ortho.leaderboard.worker import Job
from lm_ortho.pipeline.code_hash import evaluation_hash, versions
from lm_ortho.runtime.device import require_device

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234}
"""lm-eval's own."""


@dataclass(frozen=True)
class Sweep:
    """What to measure. ``model_args`` are those of ``libortho`` without alpha; {} is the embedded default."""

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


def run_sweep(
    sweep: Sweep, directory: Path, console: Any, retry_failed: bool = False, quiet: bool = False
) -> Tally | None:
    """Does what is missing; None in a process of torchrun that only helps.

    Raises:
        UserError: before anything is written, for an alpha, a task or a model arg that is not known.
    """
    pieces, job = plan_sweep(sweep, directory)
    if distributed.rank():
        follow()
        return None
    store = Store(directory)
    store.plan(pieces, facts={"name": directory.resolve().name, "kind": "sweep"}, keep=True)
    with logged_run(store, directory) as log:
        mine = {piece.key for piece in pieces}
        records = [record for record in store.records(results=False) if record.piece.key in mine]
        with ProgressScreen(records, console, quiet) as screen:
            executor = Local(screen.progress)
            try:
                tally = drive(store, [replace(job, log=log)], executor, screen, retry_failed)
            except BaseException:
                executor.close(clean=False)
                raise
            executor.close()
    return tally


def plan_sweep(sweep: Sweep, directory: Path) -> tuple[list[Piece], Job]:
    """The pieces in order, and the job that does them."""
    alphas = [format_alpha(parse_alpha(alpha)) for alpha in sweep.alphas]
    if len(set(alphas)) < len(alphas):
        raise UserError(f"alpha: {', '.join(alphas)} names one value twice")
    require_device(sweep.device)
    metadata = _metadata(sweep)
    tasks = leaf_tasks(list(sweep.tasks), metadata)
    args = dict(sweep.model_args)
    cell = digest({"model": model_identity(args), "dtype": sweep.dtype, "parallelize": sweep.parallelize})
    label = Path(str(args["pretrained"])).name if args.get("pretrained") else "embedded"
    how = {"limit": sweep.limit, "metadata": metadata, "seeds": dict(sweep.seeds), "dtype": sweep.dtype}
    content = asked_of(metadata)
    limited = f"{label} limit={sweep.limit}" if sweep.limit else label
    pieces = []
    for alpha in alphas:
        own = {"dtype": sweep.dtype} if sweep.dtype != "auto" else {}
        told = format_model_args(
            {**args, "alpha": alpha, **own, **({"parallelize": True} if sweep.parallelize else {})}
        )
        described = {
            "label": limited, "folder": label, "method": "checkpoint", "model": label, "model_args": told,
            "batch_size": sweep.batch_size,
            "row": digest([cell, alpha, how, content, versions(), evaluation_hash()])[:16],
        }  # fmt: skip
        dial: Any = float(alpha) if ":" not in alpha else alpha
        for task in tasks:
            command = lm_eval_command("libortho", told, task, sweep.limit, sweep.metadata)
            pieces.append(evaluate_piece(cell, {**described, "command": command}, dial, task, content, **how))
    loading = {
        "pretrained": None, **args, "device": sweep.device, "dtype": sweep.dtype, "batch_size": sweep.batch_size,
        "parallelize": sweep.parallelize,
    }  # fmt: skip
    return pieces, Job(label, directory, tuple(pieces), loading=loading)


def _metadata(sweep: Sweep) -> dict[str, Any]:
    """What tasks are told: the rows of the model args, which ``lm_eval --model_args`` would tell them, too."""
    rows = {name: sweep.model_args[name] for name in ("forget", "retain") if sweep.model_args.get(name)}
    own = {"pretrained": sweep.model_args["pretrained"]} if rows and sweep.model_args.get("pretrained") else {}
    return {**own, **rows, **sweep.metadata}


def model_identity(args: Mapping[str, Any]) -> str:
    """Hash of the model args with the content of the directories and rows that they name.

    Raises:
        UserError: for a model arg that libortho does not have, and whatever cannot be read.
    """
    from lm_ortho.harness.model import LibOrthoLM
    from lm_ortho.pipeline.build import cache_key, files_hash
    from lm_ortho.pipeline.spec import RECIPE_ARGUMENTS, ModelSpec, calibration_sets, resolve

    known = {name: args[name] for name in ("pretrained", "peft", "base", "fresh", "forget", "retain") if name in args}
    recipe = {name: args[name] for name in RECIPE_ARGUMENTS if name in args}
    where = {name: args[name] for name in ("revision", "subfolder", "trust_remote_code") if name in args}
    others = {name: value for name, value in args.items() if name not in {*known, *recipe, *where}}
    LibOrthoLM.refuse(others)
    source = resolve(ModelSpec(**known, recipe=recipe, source=where))
    if source.kind == "checkpoint":
        return digest([files_hash(str(source.location), **where), others])
    return digest([cache_key(source, *calibration_sets(source)), others])
