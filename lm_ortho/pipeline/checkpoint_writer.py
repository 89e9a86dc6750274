"""A decomposition in a directory that the user names, with what was reached and what to run next."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lm_ortho
from lm_ortho import checkpoint
from lm_ortho.checkpoint import cache
from lm_ortho.config import Recipe, format_model_args, make_recipe
from lm_ortho.data import Row, read_rows
from lm_ortho.errors import UserError
from lm_ortho.files import atomic_directory, check_output_directory
from lm_ortho.finetune import load_tokenizer
from lm_ortho.layer import get_streams, ortho_layers, patch, unpatch
from lm_ortho.pipeline.build import (
    BuiltModel,
    decompose_model,
    files_hash,
    load_base,
    resume_folder,
    rows_hash,
    tokenizer_hash,
)
from lm_ortho.pipeline.memories import add_memory
from lm_ortho.pipeline.spec import ModelSpec, base_label, locate_model, recorded_in, resolve
from lm_ortho.runtime.device import require_device
from lm_ortho.runtime.progress import ProgressBars, ProgressCallback
from lm_ortho.runtime.resume import ResumeFolder

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only
_LATTICE = {"bits", "group_size", "projection", "targets"}
"""What a memory that is added takes from the checkpoint."""


@dataclass(frozen=True)
class CheckpointSummary:
    """A written checkpoint. ``target`` is None where the recipe needs none; ``recipe`` is the whole one."""

    directory: str
    layers: int
    weights: int
    density: float
    bits_per_weight: float
    base: str
    target: Mapping[str, Any] | None
    recipe: Mapping[str, Any]
    checkpoint: str
    seconds: float
    next: str
    memories: tuple[str, ...]


def write_checkpoint(
    order: ModelSpec,
    directory: Path,
    progress: ProgressCallback | None = None,
    device: str | None = None,
    offload: bool = False,
) -> CheckpointSummary:
    """The checkpoint of a decomposition made now, whatever is shipped or cached; an interrupted one goes on.

    ``device`` None is a GPU where there is one. With ``offload`` it holds one block of the model at a time.

    Raises:
        UserError: before anything is computed for a bad order or an occupied ``directory``; nothing is left there.
    """
    began = time.perf_counter()
    check_output_directory(directory)
    if order.pretrained and checkpoint.is_checkpoint(locate_model(str(order.pretrained))):
        raise UserError(
            f"pretrained={order.pretrained!r} is decomposed already; give the model it came from, or --add a memory"
        )
    chosen = require_device(device)
    if offload and chosen.choice == "cpu":
        raise UserError("offload: weights come to a GPU block by block, and this would run on the CPU, where they are")
    source = resolve(replace(order, fresh=True))
    resume = resume_folder(source)
    log.info("device=%s: %s", *chosen)
    model, tokenizer, meta = decompose_model(source, progress or ProgressBars(), resume, chosen.choice, offload)
    made = _written(directory, order, (model, tokenizer, meta), meta, began)
    resume.clear()
    return made


def write_checkpoint_with_memory(
    order: ModelSpec, name: str, directory: Path, progress: ProgressCallback | None = None, device: str | None = None
) -> CheckpointSummary:
    """A new checkpoint that is the one of ``order.pretrained`` with one more memory; the old one stays as it is.

    ``order.base`` may be the path of a model that knows nothing of it. Of ``order.recipe`` lattice and targets are the
    checkpoint's own. Raises ``UserError`` as ``write_checkpoint`` does, and where the file of a memory is missing.
    """
    began = time.perf_counter()
    check_output_directory(directory)
    old = locate_model(str(order.pretrained)) if order.pretrained else ""
    if not checkpoint.is_checkpoint(old):
        named = f"={order.pretrained!r}" if order.pretrained else " is not given"
        raise UserError(f"pretrained{named}: a memory is added to a decomposed checkpoint; name its directory")
    missing = [argument for argument in ("forget", "retain") if not getattr(order, argument)]
    if missing:
        raise UserError(f"{missing[0]}: an added memory needs {missing[0]}=file.jsonl")
    if order.source.get("revision"):
        raise UserError(f"revision={order.source['revision']!r}: a memory is added to a directory, which has none")
    if order.peft:
        raise UserError("peft: a decomposed checkpoint takes no adapter; merge it into the model before that")
    order = replace(order, base="none" if order.base == "auto" else order.base)
    _check_lattice(order, old)
    forget, retain = read_rows(order.forget or ""), read_rows(order.retain or "", "retain")
    recipe, where = make_recipe(**order.recipe), require_device(device).choice
    model = checkpoint.load(old, device=where, trust_remote_code=bool(order.source.get("trust_remote_code")))
    tokenizer = load_tokenizer(order.tokenizer or old, **order.source)
    base = None if order.base == "none" else load_base(order)
    resume = ResumeFolder(cache.unfinished_directory(cache.key(_addition(order, name, forget, retain, recipe))))
    made = add_memory(
        model, tokenizer, name, forget, retain, recipe,
        base_model=None if base is None else base.to(where), progress=progress or ProgressBars(), resume=resume,
    )  # fmt: skip
    unpatch(model, 0.0)
    patch(model, made.streams)
    recorded = checkpoint.read_meta(old)
    first = next(iter(made.streams.values())).base
    own = {"bits": first.bits, "group_size": first.group_size}
    whole = {**recorded.get("recipe", {}), **recipe.model_dump(exclude=_LATTICE), **own}
    told = {"recipe": whole, "base": base_label(order)}
    meta = {**recorded, "added": {**recorded.get("added", {}), name: told}}
    done = _written(directory, order, (model, tokenizer, meta), told | {"report": made.report}, began)
    resume.clear()
    return done


def _check_lattice(order: ModelSpec, checkpoint_place: str) -> None:
    """Raises ``UserError`` for a lattice or layers that are named and are not those of the checkpoint."""
    recorded = recorded_in(checkpoint.read_meta(checkpoint_place))
    for name in sorted(_LATTICE & order.recipe.keys()):
        if order.recipe[name] != recorded.get(name):
            raise UserError(
                f"{name}={order.recipe[name]!r}: an added memory lies on the lattice and in the layers that the "
                f"checkpoint has ({name}={recorded.get(name)!r}); leave it out"
            )


def _addition(
    order: ModelSpec, name: str, forget: Sequence[Row], retain: Sequence[Row], recipe: Recipe
) -> dict[str, Any]:
    """Everything that decides what an added memory is."""
    return {
        "added": name,
        "version": lm_ortho.__version__,
        "to": files_hash(str(order.pretrained)),
        "base": order.base if order.base == "none" else files_hash(order.base),
        "tokenizer": tokenizer_hash(order.tokenizer),
        "forget": rows_hash(forget),
        "retain": rows_hash(retain),
        "recipe": recipe.model_dump(),
    }


def _written(
    directory: Path, order: ModelSpec, parts: tuple[Any, Any, dict[str, Any]], told: Mapping[str, Any], began: float
) -> CheckpointSummary:
    """Saves a patched model with its tokenizer and meta data; ``told`` has the recipe, base and report to speak of."""
    model, tokenizer, meta = parts
    with atomic_directory(directory) as scratch:
        checkpoint.save(scratch, model, tokenizer, meta)
    streams, info = get_streams(model), BuiltModel(model, meta, directory).info()
    return CheckpointSummary(
        str(directory),
        len(streams),
        sum(layer.n_weights for layer in streams.values()),
        info["density"],
        info["bits_per_weight"],
        told["base"],
        told["report"]["target"],
        told["recipe"],
        info["checkpoint"],
        round(time.perf_counter() - began, 1),
        lm_eval_line(directory, order),
        next(iter(ortho_layers(model).values())).memories,
    )


def lm_eval_line(directory: Path, order: ModelSpec) -> str:
    """The command that measures the checkpoint at alpha=0 on what it was made with, ready for a shell."""
    given: dict[str, Any] = {"pretrained": str(directory)}
    given |= {name: path for name in ("forget", "retain") if (path := getattr(order, name))}
    given |= {"trust_remote_code": True} if order.source.get("trust_remote_code") else {}
    given["alpha"] = 0
    told = format_model_args(given)
    tasks = "tofu_forget,tofu_retain" if order.pretrained is None else "forget_set,retain_set"
    return f"lm_eval --model libortho --model_args {shlex.quote(told)} --tasks {tasks}"
