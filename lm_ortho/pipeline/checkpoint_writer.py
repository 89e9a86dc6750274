"""Writes a decomposition into a directory that the user names; returns a summary with the command to run next."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lm_ortho
from lm_ortho import checkpoint
from lm_ortho.checkpoint import cache
from lm_ortho.checkpoint.verification import verify_checkpoint
from lm_ortho.config import ModelSpec, format_model_args
from lm_ortho.data import read_rows
from lm_ortho.data.held_out import describe_split, split_retain_rows
from lm_ortho.errors import UserError
from lm_ortho.files import WRITE_ERRORS, atomic_directory, check_output_directory, describe_write_error
from lm_ortho.finetune import load_tokenizer
from lm_ortho.layer import alpha_scope, get_streams, ortho_layers, patch, unpatch
from lm_ortho.pipeline.build import BuiltModel, decompose_model, describe_entry, log_held_out, resume_folder
from lm_ortho.pipeline.cache_key import decomposition_key, files_hash, rows_hash, tokenizer_hash
from lm_ortho.pipeline.decomposition import Decomposition
from lm_ortho.pipeline.loading import load_base
from lm_ortho.pipeline.memories import add_memory, check_can_add
from lm_ortho.pipeline.preflight import check_knowledge
from lm_ortho.pipeline.spec import CalibrationSets, base_label, locate_model, recorded_choices, resolve
from lm_ortho.runtime.device import require_device
from lm_ortho.runtime.progress import ProgressBars, ProgressCallback, show_progress
from lm_ortho.runtime.resume import ResumeFolder

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only
_LATTICE_KEYS = {"bits", "group_size", "projection", "targets"}
"""Recipe keys for which an added memory takes the values of the checkpoint."""


@dataclass(frozen=True)
class CheckpointSummary:
    """The summary of a written checkpoint. ``target`` is None if the recipe needs none; ``recipe`` has all keys.

    ``cache`` says where the decomposition came from or went to, ``held_out`` which retain rows ``next`` measures; each
    is one line, or empty.
    """

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
    cache: str
    held_out: str
    next: str
    memories: tuple[str, ...]


def write_checkpoint(
    spec: ModelSpec,
    directory: Path,
    *,
    progress: ProgressCallback | None = None,
    device: str | None = None,
    offload: bool = False,
) -> CheckpointSummary:
    """Writes the decomposition of a model: that of the cache, or one that is made now and stored there as well.

    ``lm_eval`` with the same model args reads the same entry. ``spec.fresh`` makes it again in any case; a shipped
    decomposition is never taken. An interrupted run resumes. ``device`` None is a GPU if there is one. With ``offload``
    it holds one block of the model at a time.

    Raises:
        UserError: for a bad ``spec`` or an occupied ``directory``, before anything is computed or written.
    """
    start_time = time.perf_counter()
    check_output_directory(directory)
    if spec.pretrained and checkpoint.is_checkpoint(locate_model(spec.pretrained)):
        raise UserError(
            f"pretrained={spec.pretrained!r} is decomposed already; give the model it came from, or --add a memory"
        )
    decision = require_device(device)
    if offload and decision.choice == "cpu":
        raise UserError("offload: weights come to a GPU block by block, and this would run on the CPU, where they are")
    resolved, progress = resolve(spec.model_copy(update={"fresh": True})), progress or ProgressBars()
    with show_progress(progress):
        key = decomposition_key(resolved)
        log_held_out(resolved)
        entry = None if spec.fresh else cache.lookup(key)
        built = None if entry is None else _take_entry(entry, directory, spec)
    cache_line = "taken from the cache, where lm_eval finds it, too; --fresh makes it again"
    if built is None:
        resume = resume_folder(resolved, fresh=spec.fresh)
        log.info("device=%s: %s", *decision)
        model, tokenizer, meta = decompose_model(resolved, progress, resume, device=decision.choice, offload=offload)
        with show_progress(progress), atomic_directory(directory) as scratch:
            checkpoint.save(scratch, model, tokenizer, meta)
        resume.clear()
        built, cache_line = BuiltModel(model, meta, directory), _store_in_cache(key, directory, spec)
    held_out = describe_split(resolved.retain_split, spec.held_out) if spec.retain else ""
    next_line = lm_eval_line(directory, spec, measures_held_out=bool(resolved.retain_split.held_out))
    seconds = time.perf_counter() - start_time
    return _summarise(built, built.meta, seconds, cache_line=cache_line, held_out=held_out, next_line=next_line)


def _take_entry(entry: Path, directory: Path, spec: ModelSpec) -> BuiltModel | None:
    """The decomposition of a cache entry, copied to ``directory`` and verified; None for a damaged one."""
    try:
        verify_checkpoint(entry, trust_remote_code=spec.trust_remote_code)
    except UserError as error:
        log.warning("decomposition: made now, because the cache entry is damaged (%s)", error)
        return None
    with atomic_directory(directory) as scratch:
        cache.copy_entry(entry, scratch)
        model = checkpoint.load(scratch, **spec.access_options)
        return BuiltModel(model, checkpoint.read_meta(scratch), directory)


def _store_in_cache(key: str, directory: Path, spec: ModelSpec) -> str:
    """Stores a written checkpoint in the cache, if that can be written; returns a line about it."""
    try:
        are_links = cache.store_copy(key, directory, describe_entry(spec))
    except WRITE_ERRORS as error:
        return f"not stored in {cache.cache_dir()} ({describe_write_error(error)}); lm_eval would make it again"
    return "stored for lm_eval, too" + (", as links to the same weights" if are_links else ", as a second copy")


def write_checkpoint_with_memory(
    spec: ModelSpec,
    name: str,
    directory: Path,
    *,
    progress: ProgressCallback | None = None,
    device: str | None = None,
) -> CheckpointSummary:
    """Writes a new checkpoint: the one of ``spec.pretrained``, which is not changed, with one more memory.

    ``spec.base`` may be the path of a model that does not have the memory. Lattice and targets are those of the
    checkpoint, not of ``spec.recipe``. Raises ``UserError`` as ``write_checkpoint`` does, and if the file of a memory
    is missing.
    """
    start_time = time.perf_counter()
    # 1. Check directory, checkpoint and arguments, and read the rows.
    check_output_directory(directory)
    location = locate_model(spec.pretrained) if spec.pretrained else ""
    _check_memory_spec(spec, location)
    if spec.base == "auto":
        spec = spec.model_copy(update={"base": "none"})
    forget_rows = read_rows(spec.forget or "")
    split = split_retain_rows(read_rows(spec.retain or "", "retain"), spec.held_out)
    sets = CalibrationSets({name: forget_rows}, split.calibration)
    held_out = describe_split(split, spec.held_out)
    log.info("held out: %s", held_out)
    # 2. Load the checkpoint, and decompose it for the new memory.
    device = require_device(device).choice
    model = checkpoint.load(location, device=device, trust_remote_code=spec.trust_remote_code)
    tokenizer = load_tokenizer(spec.tokenizer or location, **spec.loading_options)
    check_can_add(model, name)
    progress, base_model = progress or ProgressBars(), None if spec.base == "none" else load_base(spec).to(device)
    with show_progress(progress), alpha_scope(1.0):
        check_knowledge(
            model,
            tokenizer,
            sets.forget,
            sets.retain,
            recipe=spec.recipe,
            base_model=base_model,
            force=spec.force,
            progress=progress,
        )
    unfinished = cache.unfinished_directory(cache.compute_key(_memory_key_parts(spec, name, sets)))
    resume = ResumeFolder(unfinished, None if spec.fresh else cache.cache_dir())
    decomposition = add_memory(
        model,
        tokenizer,
        name,
        forget=sets.forget[name],
        retain=sets.retain,
        recipe=spec.recipe,
        base_model=base_model,
        progress=progress,
        resume=resume,
    )
    # 3. Write the model with the streams of all memories.
    meta, memory_meta = _metadata_with_memory(spec, name, location, decomposition)
    unpatch(model, 0.0)
    patch(model, decomposition.streams)
    with show_progress(progress), atomic_directory(directory) as scratch:
        checkpoint.save(scratch, model, tokenizer, meta)
    resume.clear()
    record = {**memory_meta, "report": decomposition.report}
    next_line = lm_eval_line(directory, spec, measures_held_out=bool(split.held_out))
    built, seconds = BuiltModel(model, meta, directory), time.perf_counter() - start_time
    return _summarise(built, record, seconds, cache_line="", held_out=held_out, next_line=next_line)


def _check_memory_spec(spec: ModelSpec, location: str) -> None:
    """Raises ``UserError`` if no memory can be added to ``spec.pretrained``, or not with these arguments."""
    if not checkpoint.is_checkpoint(location):
        value = f"={spec.pretrained!r}" if spec.pretrained else " is not given"
        raise UserError(f"pretrained{value}: a memory is added to a decomposed checkpoint; name its directory")
    for argument in ("forget", "retain"):
        if not getattr(spec, argument):
            raise UserError(f"{argument}: an added memory needs {argument}=file.jsonl")
    if spec.revision:
        raise UserError(f"revision={spec.revision!r}: a memory is added to a directory, which has none")
    if spec.peft:
        raise UserError("peft: a decomposed checkpoint takes no adapter; merge it into the model before that")
    recorded = recorded_choices(checkpoint.read_meta(location))
    for key in sorted(_LATTICE_KEYS & spec.recipe.model_fields_set):
        value = getattr(spec.recipe, key)
        if value != recorded.get(key):
            raise UserError(
                f"{key}={value!r}: an added memory lies on the lattice and in the layers that the "
                f"checkpoint has ({key}={recorded.get(key)!r}); leave it out"
            )


def _memory_key_parts(spec: ModelSpec, name: str, sets: CalibrationSets) -> dict[str, Any]:
    """Everything that decides the result of adding a memory, as plain JSON."""
    return {
        "added": name,
        "version": lm_ortho.__version__,
        "to": files_hash(spec.pretrained),
        "base": spec.base if spec.base == "none" else files_hash(spec.base),
        "tokenizer": tokenizer_hash(spec.tokenizer),
        "forget": rows_hash(sets.forget[name]),
        "retain": rows_hash(sets.retain),
        "recipe": spec.recipe.model_dump(),
    }


def _metadata_with_memory(
    spec: ModelSpec, name: str, location: str, decomposition: Decomposition
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata of the checkpoint with the new memory, and its part about the new memory."""
    recorded = checkpoint.read_meta(location)
    base_stream = next(iter(decomposition.streams.values())).base
    recipe = {
        **recorded.get("recipe", {}),
        **spec.recipe.model_dump(exclude=_LATTICE_KEYS),
        "bits": base_stream.bits,
        "group_size": base_stream.group_size,
    }
    memory_meta = {"recipe": recipe, "base": base_label(spec)}
    return {**recorded, "added": {**recorded.get("added", {}), name: memory_meta}}, memory_meta


def _summarise(
    built: BuiltModel, record: Mapping[str, Any], seconds: float, *, cache_line: str, held_out: str, next_line: str
) -> CheckpointSummary:
    """The summary of a written checkpoint; ``record`` has recipe, base and report of this decomposition."""
    model: torch.nn.Module = built.model
    streams, info = get_streams(model), built.info()
    return CheckpointSummary(
        directory=str(built.location),
        layers=len(streams),
        weights=sum(layer.n_weights for layer in streams.values()),
        density=info["density"],
        bits_per_weight=info["bits_per_weight"],
        base=record["base"],
        target=record["report"]["target"],
        recipe=record["recipe"],
        checkpoint=info["checkpoint"],
        seconds=round(seconds, 1),
        cache=cache_line,
        held_out=held_out,
        next=next_line,
        memories=next(iter(ortho_layers(model).values())).memories,
    )


def lm_eval_line(directory: Path, spec: ModelSpec, *, measures_held_out: bool = False) -> str:
    """The ``lm_eval`` command that measures the checkpoint at alpha=0, quoted for a shell.

    It measures forgetting on the forget rows, and what stays on the retain rows that were held out, if there are any.
    """
    args: dict[str, Any] = {"pretrained": str(directory)}
    args |= {name: path for name in ("forget", "retain") if (path := getattr(spec, name))}
    if spec.retain and measures_held_out:
        args["held_out"] = spec.held_out
    if spec.trust_remote_code:
        args["trust_remote_code"] = True
    args["alpha"] = 0
    tasks = "tofu_forget,tofu_retain" if spec.pretrained is None else "forget_set,retain_set"
    return f"lm_eval --model libortho --model_args {shlex.quote(format_model_args(args))} --tasks {tasks}"
