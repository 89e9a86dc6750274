"""Reading a decomposed model back, after checking every file."""

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
    libortho_settings,
    ortho_file,
    read_json,
    read_manifest,
    verify,
)
from lm_ortho.errors import UserError
from lm_ortho.hub import describe_hub_error
from lm_ortho.streams import UNNAMED


def is_checkpoint(path: str | PathLike[str]) -> bool:
    """Whether ``path`` is a local directory with a decomposed model, sound or not."""
    try:
        return _settings(Path(path)) is not None
    except UserError:
        return False


def load(
    directory: str | PathLike[str],
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    **kwargs: Any,
) -> nn.Module:
    """The patched model of a checkpoint, at alpha 0 and in evaluation mode.

    ``dtype`` is that of the parameters outside the streams and of the activations (None: as stored, BF16), also by
    its older name ``torch_dtype``; ``kwargs`` go to ``AutoModelForCausalLM.from_pretrained``. Without the ortho file
    of a memory the model can only do alpha=0 there. Raises ``UserError`` for a directory that is no checkpoint, a
    newer format, and files that are missing, truncated, changed or not the manifest's.
    """
    path = Path(directory)
    check(path)
    from transformers import AutoModelForCausalLM

    from lm_ortho.checkpoint import hf

    hf.register()
    dtype = kwargs.pop("torch_dtype", dtype)
    defaults = {"dtype": "auto" if dtype is None else dtype, "local_files_only": True, "trust_remote_code": False}
    try:
        with hf.files_are_verified():
            model: nn.Module = AutoModelForCausalLM.from_pretrained(str(path), **(defaults | kwargs))
    except UserError:
        raise
    except (ImportError, KeyError, OSError, ValueError) as error:
        raise UserError(f"{path}: transformers cannot load it ({describe_hub_error(error)})") from error
    return model if torch.device(device).type == "cpu" else model.to(device)


def memories(directory: str | PathLike[str]) -> list[str]:
    """The memories a checkpoint was made with, whether their files are there or not. Raises ``UserError``."""
    settings = _settings(Path(directory)) or {}
    return settings.get("memories") or [UNNAMED]


def check(path: Path) -> None:
    """Raises ``UserError`` unless every file is as it was written; the ortho file may be absent."""
    if not path.is_dir():
        raise UserError(f"{path} is not a checkpoint: there is no such directory")
    settings = _settings(path)
    if settings is None:
        raise UserError(f"{path} is not an lm-ortho checkpoint: its {CONFIG_FILE} names no libortho quantization")
    check_version(settings.get("format_version"), path)
    check_settings(settings, path)
    if not (path / MANIFEST_FILE).exists():
        raise UserError(f"{path}: {MANIFEST_FILE} is missing; the checkpoint is incomplete")
    manifest = read_manifest(path)
    orthos = [ortho_file(name) for name in settings.get("memories") or [UNNAMED]]
    verify(path, manifest, {**dict.fromkeys((CONFIG_FILE, INDEX_FILE)), **manifest.files}, optional=orthos)
    shards = read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{path}: {INDEX_FILE} has no weight_map")
    there = [*shards.values(), *(name for name in orthos if (path / name).exists())]
    verify(path, manifest, [name for name in dict.fromkeys(there) if name not in manifest.files])


def _settings(path: Path) -> dict[str, Any] | None:
    if not (path / CONFIG_FILE).exists():
        raise UserError(f"{path} is not a checkpoint: it has no {CONFIG_FILE}")
    return libortho_settings(path / CONFIG_FILE)
