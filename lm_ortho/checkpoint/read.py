"""Loading a checkpoint, after verifying every file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_ortho.checkpoint.manifest import (
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    check_settings,
    check_version,
    ortho_file,
    read_json,
    read_libortho_settings,
    read_manifest,
    verify,
)
from lm_ortho.errors import UserError
from lm_ortho.hub import describe_hub_error
from lm_ortho.streams import DEFAULT_MEMORY


def is_checkpoint(path: str | PathLike[str]) -> bool:
    """Whether ``path`` is a local directory with a decomposed model, damaged or not."""
    try:
        return _read_settings(Path(path)) is not None
    except UserError:
        return False


def load(
    directory: str | PathLike[str],
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    **kwargs: Any,
) -> nn.Module:
    """Loads a checkpoint as a patched model, at alpha 0 and in evaluation mode.

    ``dtype`` is that of the parameters outside the streams and of the activations (None: as stored, BF16); its older
    name ``torch_dtype`` works, too. ``kwargs`` are passed to ``AutoModelForCausalLM.from_pretrained``. A memory whose
    ortho file is missing works at alpha=0 only.

    Raises:
        UserError: for a directory that is no checkpoint, a newer format, and files that are missing, truncated,
            changed or not listed in the manifest.
    """
    path = Path(directory)
    verify_checkpoint(path)
    from transformers import AutoModelForCausalLM

    from lm_ortho.checkpoint.hf import register, skip_verification

    register()
    dtype = kwargs.pop("torch_dtype", dtype)
    defaults = {"dtype": "auto" if dtype is None else dtype, "local_files_only": True, "trust_remote_code": False}
    try:
        with skip_verification():
            model: nn.Module = AutoModelForCausalLM.from_pretrained(str(path), **(defaults | kwargs))
    except UserError:
        raise
    except (ImportError, KeyError, OSError, ValueError) as error:
        raise UserError(f"{path}: transformers cannot load it ({describe_hub_error(error)})") from error
    return model if torch.device(device).type == "cpu" else model.to(device)


def list_memories(directory: str | PathLike[str]) -> list[str]:
    """The memories that a checkpoint was made with, also those whose files are missing. Raises ``UserError``."""
    settings = _read_settings(Path(directory)) or {}
    return settings.get("memories") or [DEFAULT_MEMORY]


def verify_checkpoint(path: Path) -> None:
    """Raises ``UserError`` unless every file is as it was written; ortho files may be missing."""
    if not path.is_dir():
        raise UserError(f"{path} is not a checkpoint: there is no such directory")
    settings = _read_settings(path)
    if settings is None:
        raise UserError(f"{path} is not an lm-ortho checkpoint: its {CONFIG_FILE} names no libortho quantization")
    check_version(settings.get("format_version"), path)
    check_settings(settings, path)
    if not (path / MANIFEST_FILE).exists():
        raise UserError(f"{path}: {MANIFEST_FILE} is missing; the checkpoint is incomplete")
    manifest = read_manifest(path)
    ortho_files = [ortho_file(name) for name in settings.get("memories") or [DEFAULT_MEMORY]]
    verify(path, manifest, {**dict.fromkeys((CONFIG_FILE, INDEX_FILE)), **manifest.files}, optional=ortho_files)
    shards = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{path}: {INDEX_FILE} has no weight_map")
    weight_files = [*shards.values(), *(name for name in ortho_files if (path / name).exists())]
    verify(path, manifest, [name for name in dict.fromkeys(weight_files) if name not in manifest.files])


def _read_settings(path: Path) -> dict[str, Any] | None:
    if not (path / CONFIG_FILE).exists():
        raise UserError(f"{path} is not a checkpoint: it has no {CONFIG_FILE}")
    return read_libortho_settings(path / CONFIG_FILE)
