"""Loading a checkpoint, after verifying every file."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lm_ortho.checkpoint.manifest import CONFIG_FILE, read_libortho_settings
from lm_ortho.checkpoint.settings import check_settings
from lm_ortho.checkpoint.verification import verify_checkpoint
from lm_ortho.errors import UserError
from lm_ortho.hub import describe_hub_error
from lm_ortho.streams import DEFAULT_MEMORY

__all__ = ["is_checkpoint", "list_memories", "load", "verify_checkpoint"]


def is_checkpoint(path: str | PathLike[str]) -> bool:
    """Whether ``path`` is a local directory with a decomposed model, damaged or not."""
    try:
        return _read_settings(Path(path)) is not None
    except UserError:
        return False


def load(
    directory: str | PathLike[str] | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    **kwargs: Any,
) -> nn.Module:
    """Loads a checkpoint as a patched model, at alpha 0 and in evaluation mode.

    ``dtype`` is that of the parameters outside the streams and of the activations (None: as stored, BF16); its older
    name ``torch_dtype`` works, too. ``kwargs`` are passed to ``AutoModelForCausalLM.from_pretrained``. A memory whose
    ortho file is missing works at alpha=0 only.

    Raises:
        UserError: for a directory that is no checkpoint, a newer format, files that are missing, truncated, changed or
            not listed in the manifest, other weights in the directory, and tensors that do not fit.
    """
    if directory is None:
        raise UserError(
            'directory is missing: lm_ortho.load("my/split") loads the checkpoint that '
            "`lm-ortho decompose --out my/split` wrote"
        )
    path = Path(directory)
    verify_checkpoint(path, trust_remote_code=bool(kwargs.get("trust_remote_code")))
    from transformers import AutoModelForCausalLM

    from lm_ortho.checkpoint.hf import register, skip_verification

    register()
    dtype = kwargs.pop("torch_dtype", dtype)
    defaults = {"dtype": "auto" if dtype is None else dtype, "local_files_only": True, "trust_remote_code": False}
    try:
        with skip_verification(path):
            model: nn.Module = AutoModelForCausalLM.from_pretrained(str(path), **(defaults | kwargs))
    except UserError:
        raise
    except Exception as error:  # the configuration may hold anything, and so its errors are of any class
        raise UserError(f"{path}: transformers cannot load it ({describe_hub_error(error)})") from error
    return model if torch.device(device).type == "cpu" else model.to(device)


def list_memories(directory: str | PathLike[str]) -> list[str]:
    """The memories that a checkpoint was made with, also those whose files are missing. Raises ``UserError``."""
    settings = _read_settings(Path(directory))
    if settings is None:
        return [DEFAULT_MEMORY]
    check_settings(settings, directory)
    return settings.get("memories") or [DEFAULT_MEMORY]


def _read_settings(path: Path) -> dict[str, Any] | None:
    if not os.path.lexists(path / CONFIG_FILE):
        raise UserError(f"{path} is not a checkpoint: it has no {CONFIG_FILE}")
    return read_libortho_settings(path / CONFIG_FILE)
