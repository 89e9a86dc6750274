"""The cache key of a decomposition: hashes of the model files, the rows and the recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_ortho
from lm_ortho.checkpoint import cache
from lm_ortho.data.rows import Row
from lm_ortho.data.tokenizer import describe_vocabulary
from lm_ortho.edit import EDITS
from lm_ortho.finetune import load_config
from lm_ortho.finetune.loading import split_gguf
from lm_ortho.pipeline.spec import ResolvedModel, download_model
from lm_ortho.projection import PROJECTIONS
from lm_ortho.runtime.progress import track
from lm_ortho.sieve import SIEVES


def decomposition_key(resolved: ResolvedModel) -> str:
    """The cache key of the decomposition of ``resolved``."""
    return cache.compute_key(key_parts(resolved))


def key_parts(resolved: ResolvedModel) -> dict[str, Any]:
    """Everything that decides the result of the decomposition, as plain JSON."""
    spec = resolved.spec
    forget, retain = resolved.calibration_sets
    recipe = spec.recipe
    entries = ((SIEVES, recipe.sieve), (PROJECTIONS, recipe.projection), (EDITS, recipe.edit))
    plugins = [plugin for registry, name in entries if (plugin := registry.find_plugin(name))]
    return {
        "version": lm_ortho.__version__,
        "recipe": recipe.model_dump(),
        **({"plugins": plugins} if plugins else {}),
        "tokenizer": tokenizer_hash(resolved.tokenizer),
        "forget": [[name, rows_hash(rows)] for name, rows in forget.items()],  # in order, which decides the supports
        "retain": rows_hash(retain),
        "pretrained": files_hash(resolved.location, **spec.loading_options),
        "peft": adapter_hash(resolved.adapter),
        "base": spec.base if spec.base in ("auto", "none") else files_hash(spec.base, "base", **spec.access_options),
    }


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a named tokenizer: of its files; for an object, of its backend or vocabulary and its chat template."""
    if not tokenizer or isinstance(tokenizer, str):
        return files_hash(tokenizer) if tokenizer and Path(tokenizer).expanduser().is_dir() else str(tokenizer or "")
    content = [describe_vocabulary(tokenizer), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def rows_hash(rows: Sequence[Row]) -> str:
    """Hash of the content of the rows."""
    return hashlib.sha256(json.dumps([row.as_dict() for row in rows], sort_keys=True).encode()).hexdigest()


def adapter_hash(peft: str | None) -> str:
    """Hash of the files of an adapter; one from the hub is downloaded for it."""
    if peft is None or Path(peft).expanduser().is_dir():
        return files_hash(peft)
    return files_hash(download_model("peft", peft))


def files_hash(location: str | None, argument: str = "pretrained", **source: Any) -> str:
    """Hash of the files of a model or adapter: of the content of a directory, of the commit on the hub."""
    if location is None:
        return ""
    place, source = split_gguf(location, source)
    path, subfolder, gguf_file = Path(place).expanduser(), source.get("subfolder", ""), source.get("gguf_file")
    if not path.is_dir():
        commit = getattr(load_config(location, argument=argument, **source), "_commit_hash", None)
        return f"{location}@{commit or source.get('revision', 'main')}" + "".join(
            f"/{part}" for part in (subfolder, gguf_file) if part
        )
    digest = hashlib.sha256()
    files = sorted(entry for entry in (path / subfolder).iterdir() if entry.is_file())
    files = [path / subfolder / gguf_file] if gguf_file else files
    for file in track(files, "hashing", str(location)):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
