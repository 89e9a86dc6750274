"""From arguments to a model with two streams: shipped, cached, loaded or decomposed now.

The one way in for lm-eval, the verdict and the command line.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lm_ortho
from lm_ortho import checkpoint, world
from lm_ortho import finetune as implant
from lm_ortho.checkpoint import cache
from lm_ortho.checkpoint.manifest import read_manifest
from lm_ortho.config import Recipe
from lm_ortho.data.rows import Row
from lm_ortho.errors import UserError
from lm_ortho.files import WRITE_ERRORS, describe_write_error
from lm_ortho.finetune import load_causal_lm, load_config, merge_adapter, round_to_bf16
from lm_ortho.layer import get_streams, ortho_layers, patch, set_alpha
from lm_ortho.pipeline.decomposition import Decomposition, decompose
from lm_ortho.pipeline.memories import decompose_memories
from lm_ortho.pipeline.spec import (
    RECIPE_ARGUMENTS,
    ModelSpec,
    ResolvedModel,
    base_label,
    calibration_sets,
    download,
    locate_model,
    recorded_in,
)
from lm_ortho.runtime.offload import offload_blocks
from lm_ortho.runtime.progress import ProgressBars, ProgressCallback
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder
from lm_ortho.streams import UNNAMED, bits_per_weight, density

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only


@dataclass(frozen=True)
class BuiltModel:
    """A patched model, what its checkpoint says about it, and where that checkpoint is (None: nowhere)."""

    model: torch.nn.Module
    meta: Mapping[str, Any]
    location: Path | None

    def info(self) -> dict[str, Any]:
        """What a results file should say about the model; sizes are counted from the tensors."""
        streams, recorded = get_streams(self.model), recorded_in(self.meta)
        named = {name: recorded[name] for name in (*RECIPE_ARGUMENTS, "base", "target") if name in recorded}
        return {
            **named,
            "density": density(streams),
            "density_budget": named.get("density"),
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
    source: ResolvedModel,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    alpha: float | Mapping[str, float] = 0.0,
    progress: ProgressCallback | None = None,
    **placement: Any,
) -> BuiltModel:
    """The patched model at ``alpha``; a decomposition made for it is kept in the cache.

    A decomposition is always read back from its checkpoint, so that the first run and the next ones have the
    same bits. A model object is decomposed in place. ``placement`` (device_map, ...) goes to transformers.
    """
    progress = progress or ProgressBars()
    if source.kind == "object":
        meta = _decompose_in_place(source, progress)
        model, location = source.location, None
    else:
        location = Path(source.location) if source.kind == "checkpoint" else ensure_cached(source, progress, device)
        model = checkpoint.load(location, dtype, device, **access_options(source.order), **placement)
        meta = checkpoint.read_meta(location)
    set_alpha(model, alpha)
    return BuiltModel(model, meta, location)


def ensure_cached(source: ResolvedModel, progress: ProgressCallback, device: str = "cpu") -> Path:
    """The directory of the decomposition of a model: found in the cache, or made on ``device`` and put there."""
    key = key_of(source)
    kept = None if source.order.fresh else cache.lookup(key)
    if kept is not None:
        log.info("decomposition: found in the cache, %s", kept)
        return kept
    log.info("decomposition: made now (%s)", "fresh=true" if source.order.fresh else "not in the cache")
    resume = ResumeFolder(cache.unfinished_directory(key))
    made = decompose_model(source, progress, resume, device)
    name = source.order.pretrained or "embedded model"
    try:
        stored = cache.store(key, *made, description=f"{name}, {source.recipe.sieve} {source.recipe.density:g}")
        resume.clear()
        return stored
    except WRITE_ERRORS as error:
        why = describe_write_error(error)
        raise UserError(
            f"cache: {cache.cache_dir()} cannot be written ({why}); set LM_ORTHO_CACHE to a folder of yours"
        ) from None


def resume_folder(source: ResolvedModel) -> ResumeFolder:
    """What an interrupted decomposition of the same model, rows and recipe has reached."""
    return ResumeFolder(cache.unfinished_directory(key_of(source)))


def decompose_model(
    source: ResolvedModel,
    progress: ProgressCallback,
    resume: ResumeFolder = NO_RESUME,
    device: str = "cpu",
    offload: bool = False,
) -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    """The model of ``source``, decomposed now and patched, its tokenizer, and what to write beside it.

    What an interrupted run left in ``resume`` is not done again. With ``offload`` blocks come to ``device`` in turn.
    """
    model, base_model = load_models(source)
    tokenizer = load_tokenizer(source)
    forget, retain = calibration_sets(source)
    with ExitStack() as stack:
        for each in filter(None, (model, base_model)):
            if offload:
                stack.enter_context(offload_blocks(each, device))
            else:
                each.to(device)
        made = _decompose(model, tokenizer, forget, retain, source.recipe, base_model, progress, resume)
    patch(model, made.streams)
    return model, tokenizer, checkpoint_metadata(source, made.report)


def _decompose(
    model: torch.nn.Module,
    tokenizer: Any,
    forget: Mapping[str, Sequence[Row]],
    retain: Sequence[Row],
    recipe: Recipe,
    base_model: torch.nn.Module | None,
    progress: ProgressCallback,
    resume: ResumeFolder = NO_RESUME,
) -> Decomposition:
    """One memory without a name, or one or more with names."""
    options: dict[str, Any] = {"base_model": base_model, "progress": progress, "resume": resume}
    if set(forget) == {UNNAMED}:
        return decompose(model, tokenizer, forget[UNNAMED], retain, recipe, **options)
    return decompose_memories(model, tokenizer, forget, retain, recipe, **options)


def load_models(source: ResolvedModel) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """The merged model, and the one before fine-tuning if it is known; float32 holding BF16 values."""
    order, where = source.order, source.order.source
    peft = str(world.path("memory")) if source.kind == "embedded" else order.peft
    model = load_causal_lm(source.location, **where)
    before: torch.nn.Module | None = None
    if order.base not in ("auto", "none"):
        before = load_base(order)
    elif peft and order.base == "auto":
        before = copy.deepcopy(model)
    return (merge_adapter(model, peft) if peft else model), before


def load_base(order: ModelSpec) -> torch.nn.Module:
    """The model before fine-tuning that ``order.base`` names; it may bring code as the fine-tuned one may."""
    return load_causal_lm(locate_model(order.base), argument="base", **access_options(order))


def access_options(order: ModelSpec) -> dict[str, Any]:
    """What may be passed on for another model than ``pretrained``, whose revision and subfolder are its own."""
    token = {"token": order.source["token"]} if order.source.get("token") else {}
    return {"trust_remote_code": bool(order.source.get("trust_remote_code")), **token}


def load_tokenizer(source: ResolvedModel) -> Any:
    """The tokenizer that was named, or the one beside the model; ``UserError`` where there is none."""
    named = source.order.tokenizer
    if named is not None and not isinstance(named, str):
        return named
    place = named or (source.location.name_or_path if source.kind == "object" else source.location)
    return implant.load_tokenizer(place, **source.order.source)


def checkpoint_metadata(source: ResolvedModel, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint of a decomposition that was ordered should say about how it was made."""
    return meta_for(source.recipe, base_label(source.order), report)


def meta_for(recipe: Recipe, base: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a recipe and what ``base`` was; the same for the same inputs, so without times."""
    target = report.get("target")
    return {
        "recipe": recipe.model_dump(),
        "base": base,
        "target": target["name"] if target else "none",
        "report": _plain({name: value for name, value in report.items() if name != "seconds"}),
        "version": lm_ortho.__version__,
    }


def _plain(value: Any) -> Any:
    """JSON without NaN and infinities, which become None."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _decompose_in_place(source: ResolvedModel, progress: ProgressCallback) -> dict[str, Any]:
    """Patches a model object unless it is patched; a float32 copy holding BF16 values is decomposed."""
    model = source.location
    if ortho_layers(model):
        return {}
    forget, retain = calibration_sets(source)
    base = source.order.base
    device = next(model.parameters()).device
    before = None if base in ("auto", "none") else load_base(source.order).to(device)
    merged = round_to_bf16(copy.deepcopy(model).float())
    tokenizer = load_tokenizer(source)
    made = _decompose(merged, tokenizer, forget, retain, source.recipe, before, progress)
    patch(model, made.streams)
    meta = checkpoint_metadata(source, made.report)
    checkpoint.attach(model, meta)
    return meta


def key_of(source: ResolvedModel) -> str:
    """The cache key of the decomposition that ``source`` asks for."""
    return cache.key(cache_key(source, *calibration_sets(source)))


def cache_key(source: ResolvedModel, forget: Mapping[str, Sequence[Row]], retain: Sequence[Row]) -> dict[str, Any]:
    order = source.order
    embedded = source.kind == "embedded"
    weights = {
        "pretrained": files_hash(source.location, **order.source),
        "peft": adapter_hash(str(world.path("memory")) if embedded else order.peft),
        "base": order.base
        if order.base in ("auto", "none")
        else files_hash(order.base, "base", **access_options(order)),
    }
    return {
        "version": lm_ortho.__version__,
        "recipe": source.recipe.model_dump(),
        "tokenizer": tokenizer_hash(order.tokenizer),
        "forget": [[name, rows_hash(rows)] for name, rows in forget.items()],  # in order, which decides the supports
        "retain": rows_hash(retain),
        **weights,
    }


def tokenizer_hash(tokenizer: Any) -> str:
    """What tells a named tokenizer from others: its files, or for an object what it does and its chat template."""
    if not tokenizer or isinstance(tokenizer, str):
        return files_hash(tokenizer) if tokenizer and Path(tokenizer).expanduser().is_dir() else str(tokenizer or "")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = [backend.to_str() if backend else sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def rows_hash(rows: Sequence[Row]) -> str:
    """Hash of the content of a set."""
    return hashlib.sha256(json.dumps([row.as_dict() for row in rows], sort_keys=True).encode()).hexdigest()


def adapter_hash(peft: str | None) -> str:
    """Hash of the files of an adapter; one from the hub is fetched for it."""
    if peft is None or Path(peft).expanduser().is_dir():
        return files_hash(peft)
    return files_hash(download("peft", peft, None))


def files_hash(location: str | None, argument: str = "pretrained", **source: Any) -> str:
    """Hash of a model's or adapter's files: of the content of a directory, of the commit on the hub."""
    if location is None:
        return ""
    path, inside = Path(location).expanduser(), source.get("subfolder", "")
    if not path.is_dir():
        commit = getattr(load_config(location, argument=argument, **source), "_commit_hash", None)
        return f"{location}@{commit or source.get('revision', 'main')}" + (f"/{inside}" if inside else "")
    digest = hashlib.sha256()
    for file in sorted(entry for entry in (path / inside).iterdir() if entry.is_file()):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
