"""Builds the model of a specification: loads a shipped, cached or named checkpoint, or decomposes the model now.

lm-eval, the verdict and the command line all use it.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lm_ortho
from lm_ortho import checkpoint
from lm_ortho.checkpoint import cache
from lm_ortho.checkpoint.manifest import read_manifest
from lm_ortho.checkpoint.verification import verify_checkpoint
from lm_ortho.config import ModelSpec, Recipe
from lm_ortho.data.held_out import describe_split
from lm_ortho.errors import UserError
from lm_ortho.files import WRITE_ERRORS, describe_write_error
from lm_ortho.finetune import round_to_bf16
from lm_ortho.layer import get_streams, ortho_layers, patch, set_alpha
from lm_ortho.pipeline.cache_key import decomposition_key
from lm_ortho.pipeline.decomposition import Decomposition, decompose
from lm_ortho.pipeline.loading import load_base, load_models, load_tokenizer
from lm_ortho.pipeline.memories import decompose_memories
from lm_ortho.pipeline.preflight import check_knowledge
from lm_ortho.pipeline.spec import CalibrationSets, ResolvedModel, base_label, recorded_choices
from lm_ortho.runtime.offload import offload_blocks
from lm_ortho.runtime.progress import ProgressBars, ProgressCallback, show_progress
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder
from lm_ortho.streams import DEFAULT_MEMORY, bits_per_weight, density

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only


@dataclass(frozen=True)
class BuiltModel:
    """A patched model, the metadata of its checkpoint, and the directory of that checkpoint (None: there is none)."""

    model: torch.nn.Module
    meta: Mapping[str, Any]
    location: Path | None

    def info(self) -> dict[str, Any]:
        """The entries about the model in a results file; sizes are counted from the tensors."""
        streams, recorded = get_streams(self.model), recorded_choices(self.meta)
        choices = {name: recorded[name] for name in (*Recipe.model_fields, "base", "target") if name in recorded}
        return {
            **choices,
            "density": density(streams),
            "density_budget": choices.get("density"),
            "bits_per_weight": bits_per_weight(streams),
            "checkpoint": self.checkpoint_hash(),
        }

    def checkpoint_hash(self) -> str:
        """Hash of the tensors: of the files that hold them, or of a model object's own."""
        digest = hashlib.sha256()
        if self.location is not None:
            for name, file in sorted(read_manifest(self.location).files.items()):
                if name.endswith(".safetensors"):
                    digest.update(f"{name} {file.sha256}\n".encode())
            return digest.hexdigest()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def build_model(
    resolved: ResolvedModel,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    progress: ProgressCallback | None = None,
    **placement: Any,
) -> BuiltModel:
    """The patched model at the alpha of its specification; a decomposition made for it is stored in the cache.

    A decomposition is always read back from its checkpoint, so that the first run and the next ones have the
    same bits. A model object is decomposed in place. ``placement`` (device_map, ...) goes to transformers.
    """
    progress = progress or ProgressBars()
    if resolved.kind == "object":
        model, location = resolved.location, None
        meta = _decompose_in_place(resolved, progress)
    else:
        with show_progress(progress):
            location = _checkpoint_location(resolved, progress, device)
            options = {**resolved.spec.access_options, **placement}
            try:
                model = checkpoint.load(location, dtype, device, **options)
            except UserError as error:
                if resolved.kind == "checkpoint" or not _is_damaged(location, resolved.spec):
                    raise
                log.warning("decomposition: made again, because the cache entry is damaged (%s)", error)
                fresh_spec = resolved.spec.model_copy(update={"fresh": True})
                location = ensure_cached(replace(resolved, spec=fresh_spec), progress, device)
                model = checkpoint.load(location, dtype, device, **options)
        meta = checkpoint.read_meta(location)
    set_alpha(model, resolved.spec.alpha)
    return BuiltModel(model, meta, location)


def _is_damaged(entry: Path, spec: ModelSpec) -> bool:
    """Whether files of a cache entry were changed: weights may be links to those of a checkpoint of the user."""
    try:
        verify_checkpoint(entry, trust_remote_code=spec.trust_remote_code)
    except UserError:
        return True
    return False


def _checkpoint_location(resolved: ResolvedModel, progress: ProgressCallback, device: str) -> Path:
    if resolved.kind == "checkpoint":
        return Path(resolved.location)
    return ensure_cached(resolved, progress, device)


def ensure_cached(resolved: ResolvedModel, progress: ProgressCallback, device: str = "cpu") -> Path:
    """The directory of the decomposition of a model: found in the cache, or made on ``device`` and stored there."""
    spec, key = resolved.spec, decomposition_key(resolved)
    log_held_out(resolved)
    entry = None if spec.fresh else cache.lookup(key)
    if entry is not None:
        log.info("decomposition: found in the cache, %s", entry)
        return entry
    log.info("decomposition: made now (%s)", "fresh=true" if spec.fresh else "not in the cache")
    resume = resume_folder(resolved, fresh=spec.fresh)
    model, tokenizer, meta = decompose_model(resolved, progress, resume, device=device)
    try:
        path = cache.store(key, model, tokenizer, meta, description=describe_entry(spec))
    except WRITE_ERRORS as error:
        raise UserError(
            f"cache: {cache.cache_dir()} cannot be written ({describe_write_error(error)}); "
            "set LM_ORTHO_CACHE to a folder of yours"
        ) from None
    resume.clear()
    return path


def describe_entry(spec: ModelSpec) -> str:
    """The line about a decomposition in the list of the cache."""
    return f"{spec.pretrained or 'embedded model'}, {spec.recipe.sieve} {spec.recipe.density:g}"


def log_held_out(resolved: ResolvedModel) -> None:
    """Logs one line about the retain rows of the user that the calibration does not read."""
    if resolved.spec.retain:
        log.info("held out: %s", describe_split(resolved.retain_split, resolved.spec.held_out))


def resume_folder(resolved: ResolvedModel, *, fresh: bool) -> ResumeFolder:
    """The states of an interrupted decomposition of the same model, rows and recipe.

    Surrogates are shared with other decompositions, unless the user asks for nothing that is cached: ``fresh``. That
    of ``resolved.spec`` may only leave out a shipped decomposition.
    """
    common_folder = None if fresh else cache.cache_dir()
    return ResumeFolder(cache.unfinished_directory(decomposition_key(resolved)), common_folder)


def decompose_model(
    resolved: ResolvedModel,
    progress: ProgressCallback,
    resume: ResumeFolder = NO_RESUME,
    *,
    device: str = "cpu",
    offload: bool = False,
) -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    """The model of ``resolved``, decomposed now and patched, its tokenizer, and the metadata to write beside it.

    States of an interrupted run in ``resume`` are not computed again. With ``offload`` blocks of the model are moved to
    ``device`` one at a time.
    """
    model, base_model = load_models(resolved, progress)
    tokenizer = load_tokenizer(resolved)
    with ExitStack() as stack:
        for network in filter(None, (model, base_model)):
            if offload:
                stack.enter_context(offload_blocks(network, device))
            else:
                network.to(device)
        decomposition = decompose_sets(
            model,
            tokenizer,
            resolved.calibration_sets,
            recipe=resolved.recipe,
            base_model=base_model,
            force=resolved.spec.force,
            progress=progress,
            resume=resume,
        )
    patch(model, decomposition.streams)
    return model, tokenizer, checkpoint_metadata(resolved, decomposition.report)


def decompose_sets(
    model: torch.nn.Module,
    tokenizer: Any,
    sets: CalibrationSets,
    *,
    recipe: Recipe,
    base_model: torch.nn.Module | None,
    force: bool,
    progress: ProgressCallback,
    resume: ResumeFolder = NO_RESUME,
) -> Decomposition:
    """The decomposition for one memory without a name, or for one or more with names.

    Raises:
        UserError: as ``check_knowledge`` and ``decompose``.
    """
    with show_progress(progress):
        check_knowledge(
            model,
            tokenizer,
            sets.forget,
            sets.retain,
            recipe=recipe,
            base_model=base_model,
            force=force,
            progress=progress,
        )
    options: dict[str, Any] = {"recipe": recipe, "base_model": base_model, "progress": progress, "resume": resume}
    if set(sets.forget) == {DEFAULT_MEMORY}:
        return decompose(model, tokenizer, sets.forget[DEFAULT_MEMORY], sets.retain, **options)
    return decompose_memories(model, tokenizer, sets.forget, sets.retain, **options)


def _decompose_in_place(resolved: ResolvedModel, progress: ProgressCallback) -> dict[str, Any]:
    """Patches a model object, unless it is decomposed already, and returns its metadata.

    A float32 copy of it, rounded to BF16 values, is what is decomposed.
    """
    model, spec = resolved.location, resolved.spec
    if ortho_layers(model):
        return {}
    log_held_out(resolved)
    device = next(model.parameters()).device
    decomposition = decompose_sets(
        round_to_bf16(copy.deepcopy(model).float()),
        load_tokenizer(resolved),
        resolved.calibration_sets,
        recipe=spec.recipe,
        base_model=None if spec.base in ("auto", "none") else load_base(spec).to(device),
        force=spec.force,
        progress=progress,
    )
    patch(model, decomposition.streams)
    meta = checkpoint_metadata(resolved, decomposition.report)
    checkpoint.attach(model, meta)
    return meta


def checkpoint_metadata(resolved: ResolvedModel, report: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata that a checkpoint stores about its decomposition."""
    return make_metadata(resolved.recipe, base_label(resolved.spec), report)


def make_metadata(recipe: Recipe, base: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata for a recipe and the label of a base model; the same for the same inputs, so without times."""
    target = report.get("target")
    return {
        "recipe": recipe.model_dump(),
        "base": base,
        "target": target["name"] if target else "none",
        "report": _finite_json({name: value for name, value in report.items() if name != "seconds"}),
        "version": lm_ortho.__version__,
    }


def _finite_json(value: Any) -> Any:
    """JSON without NaN and infinities, which become None."""
    if isinstance(value, Mapping):
        return {name: _finite_json(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
